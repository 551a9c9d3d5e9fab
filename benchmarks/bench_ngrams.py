"""Spectrum of the docstrings' trigram matrix: ours against the usual truncated SVDs; and the counting alone."""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

VOCAB, RANK, ORDER = 8192, 1024, 3
DEPTHS = [64, 256, 576, 1024]
SECONDS = 600  # a contender's limit
TILES = 8  # of the corpus, each with its ids permuted, for the counting at scale


def tail(values, squares):
    """W-error at DEPTHS from leading singular values and the exact squared norm."""
    caught = np.cumsum(np.asarray(values, np.float64) ** 2)
    return np.sqrt(np.clip(1 - caught[np.array(DEPTHS) - 1] / squares, 0, None)).tolist()


def exact(tokens):
    from headbound import ngrams

    values = ngrams.singular_values(ngrams.gram(tokens, ORDER, VOCAB))
    return values, float((values**2).sum())


def counting(tokens):
    from headbound import ngrams

    for counts in ngrams.count(tokens, ORDER, VOCAB):
        del counts


def peer(kind, tokens):
    from headbound import ngrams

    matrix = ngrams.context_matrix(tokens, ORDER, VOCAB)
    squares = float((matrix.data**2).sum())
    if kind == "scipy svds":
        from scipy.sparse.linalg import svds

        return svds(matrix, RANK, return_singular_vectors=False)[::-1], squares
    if kind == "scikit-learn randomized_svd":
        from sklearn.utils.extmath import randomized_svd

        return randomized_svd(matrix, RANK, random_state=0)[1], squares
    import torch

    coo = matrix.tocoo()
    sparse = torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, coo.shape, check_invariants=False)
    return torch.svd_lowrank(sparse, RANK)[1].numpy(), squares


def child(kind, path):
    """Run one contender, sampling its memory (what is its own: mapped files are not counted)."""
    for module in ("scipy.sparse.linalg", "sklearn.utils.extmath", "torch", "headbound.ngrams"):
        importlib.import_module(module)  # before the memory is measured

    def own():
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def watch():
        while not done.wait(0.02):
            peak.append(max(peak.pop(), own()))

    tokens = np.load(path, mmap_mode="r")
    before, peak, done = own(), [0], threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    if kind == "counting":
        counting(tokens)
        result = None
    else:
        values, squares = exact(tokens) if kind == "ours" else peer(kind, tokens)
        result = tail(values, squares)
    row = {"s": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    done.set()
    watcher.join()
    print(json.dumps({**row, "GB": (peak[0] - before) / 1e9, "w_error": result}))


def contend(kind, path):
    """A contender in a process of its own that can neither fill the memory nor run forever."""
    most = int(os.environ.get("BENCH_GB", 0)) * 2**30 or int(0.7 * psutil.virtual_memory().available)
    command = [sys.executable, __file__, "child", kind, str(path)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        )
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1][:60]
        memory = "emory" in done.stderr or done.returncode < 0
        return f"out of memory ({most / 2**30:.0f} GiB allowed)" if memory else last
    return json.loads(done.stdout.splitlines()[-1])


def against_dense(tokens):
    """Largest difference in W-error, over all ranks, from a dense float64 SVD on a subsample."""
    from headbound import ngrams

    part = np.asarray(tokens[:4000])
    dense = np.linalg.svd(ngrams.context_matrix(part, ORDER, VOCAB).toarray(), compute_uv=False)
    ours = ngrams.singular_values(ngrams.gram(part, ORDER, VOCAB))

    def curve(values):
        squares = np.cumsum(np.sort(np.append(values, np.zeros(VOCAB - len(values)))) ** 2)
        return np.sqrt(squares / squares[-1])

    return float(np.abs(curve(ours) - curve(dense)).max())


def spectrum_rows(path):
    results = {"ours": contend("ours", path)}
    for kind in ("scipy svds", "scikit-learn randomized_svd", "torch.svd_lowrank"):
        results[kind] = contend(kind, path)
    ours = results["ours"]
    rows = []
    for kind, got in results.items():
        name = f"{kind}, {'all ' + str(VOCAB) if kind == 'ours' else 'top ' + str(RANK)} values"
        if isinstance(got, str) or isinstance(ours, str):
            rows.append((name, got if isinstance(got, str) else f"{got['s']:.1f}", *[""] * 4))
            continue
        error = against_dense(np.load(path, mmap_mode="r")) if kind == "ours" else None
        error = error if kind == "ours" else float(np.abs(np.subtract(got["w_error"], ours["w_error"])).max())
        ratio = got["s"] / ours["s"]
        rows.append((name, f"{got['s']:.1f}", f"{got['cpu']:.1f}", f"{got['GB']:.2f}", f"{error:.1e}", f"{ratio:.1f}"))
    columns = ["contender", "seconds", "CPU seconds", "extra GB", "error of W-error", "time / ours"]
    return pd.DataFrame(rows, columns=columns)


def counting_rows(tokens, folder):
    permuted = [np.random.default_rng(i).permutation(VOCAB).astype(np.int32) for i in range(TILES)]
    rows = []
    for share in (1 / 8, 1, TILES):
        parts = [p[tokens[: int(share * len(tokens))]] for p in permuted[: max(1, int(share))]]
        path = Path(folder) / "counting.npy"
        np.save(path, np.concatenate(parts))
        size = sum(map(len, parts))
        got = contend("counting", path)
        cells = (got, "", "") if isinstance(got, str) else (got["s"], size / got["s"] / 1e6, got["GB"])
        rows.append((f"{size:,}", *cells))
    return pd.DataFrame(rows, columns=["tokens", "seconds", "M tokens/s", "extra GB"])


def main():
    from headbound import text
    from headbound import tokens as streams

    texts = text.load("docstrings")
    tokens = streams.encode(streams.train_bpe(texts, VOCAB), texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, tokens)
        print(f"Singular values of the docstrings' {ORDER}-gram matrix, V = {VOCAB:,}, {len(tokens):,} tokens.")
        print("Error: ours against a dense float64 SVD of a subsample (all ranks); others against ours,")
        print(f"largest at d = {DEPTHS}. Extra memory: the process's own, at the peak.\n")
        print(spectrum_rows(path).to_string(index=False), "\n")
        print(f"Counting {ORDER}-grams; the largest corpus is {TILES} copies with their ids permuted (new contexts).\n")
        print(counting_rows(np.asarray(tokens), folder).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
