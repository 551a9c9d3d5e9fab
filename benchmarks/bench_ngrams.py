"""Spectrum of the docstrings' trigram matrix: ours against the usual truncated SVDs; and the counting alone."""

import importlib
import json
import sys
import sysconfig
import tempfile
from pathlib import Path

import contest
import numpy as np
import pandas as pd

VOCAB, RANK, ORDER = 8192, 1024, 3
DEPTHS = [64, 256, 576, 1024]
SECONDS = 600  # a contender's limit


def tail(values, squares):
    """W-error at DEPTHS from leading singular values and the exact squared norm."""
    caught = np.cumsum(np.asarray(values, np.float64) ** 2)
    return np.sqrt(np.clip(1 - caught[np.array(DEPTHS) - 1] / squares, 0, None)).tolist()


def exact(tokens):
    from headbound.measure import ngrams

    values = ngrams._singular_values(ngrams.gram(tokens, ORDER, VOCAB))
    return values, float((values**2).sum())


def counting(tokens):
    from headbound.measure import ngrams

    for counts in ngrams.count(tokens, ORDER, VOCAB):
        del counts


def peer(kind, tokens):
    from headbound.measure import ngrams

    matrix = ngrams._context_matrix(tokens, ORDER, VOCAB)
    squares = float((matrix.data**2).sum())
    if kind == "scipy svds":
        from scipy.sparse.linalg import svds

        return svds(matrix, RANK, return_singular_vectors=False)[::-1], squares
    if kind == "scikit-learn randomized_svd":
        from sklearn.utils.extmath import randomized_svd

        return randomized_svd(matrix, RANK, random_state=0)[1], squares
    import torch

    coo = matrix.tocoo()
    sparse = torch.sparse_coo_tensor(
        np.stack([coo.row, coo.col]), coo.data, coo.shape, check_invariants=False
    )
    return torch.svd_lowrank(sparse, RANK)[1].numpy(), squares


def child(kind, path):
    """Run one contender."""
    for module in (
        "scipy.sparse.linalg",
        "sklearn.utils.extmath",
        "torch",
        "headbound.measure.ngrams",
    ):
        importlib.import_module(module)  # before the memory is measured
    tokens = np.load(path, mmap_mode="r")

    def run():
        if kind == "counting":
            return counting(tokens)
        values, squares = exact(tokens) if kind == "ours" else peer(kind, tokens)
        return tail(values, squares)

    print(json.dumps(contest.measured(run)))


def against_dense(tokens):
    """Largest difference in W-error, over all ranks, from a dense float64 SVD on a subsample."""
    from headbound.measure import ngrams

    part = np.asarray(tokens[:4000])
    dense = np.linalg.svd(ngrams._context_matrix(part, ORDER, VOCAB).toarray(), compute_uv=False)
    ours = ngrams._singular_values(ngrams.gram(part, ORDER, VOCAB))

    def curve(values):
        squares = np.cumsum(np.sort(np.append(values, np.zeros(VOCAB - len(values)))) ** 2)
        return np.sqrt(squares / squares[-1])

    return float(np.abs(curve(ours) - curve(dense)).max())


def spectrum_rows(path):
    results = {"ours": contest.contend("ours", path)}
    for kind in ("scipy svds", "scikit-learn randomized_svd", "torch.svd_lowrank"):
        results[kind] = contest.contend(kind, path, seconds=SECONDS)
    ours = results["ours"]
    rows = []
    for kind, got in results.items():
        name = f"{kind}, {'all ' + str(VOCAB) if kind == 'ours' else 'top ' + str(RANK)} values"
        if isinstance(got, str) or isinstance(ours, str):
            rows.append((name, got if isinstance(got, str) else f"{got['s']:.1f}", *[""] * 4))
            continue
        if kind == "ours":
            error = against_dense(np.load(path, mmap_mode="r"))
        else:
            error = float(np.abs(np.subtract(got["result"], ours["result"])).max())
        ratio = got["s"] / ours["s"]
        rows.append(
            (
                name,
                f"{got['s']:.1f}",
                f"{got['cpu']:.1f}",
                f"{got['MB'] / 1e3:.2f}",
                f"{error:.1e}",
                f"{ratio:.1f}",
            )
        )
    columns = ["contender", "seconds", "CPU seconds", "extra GB", "error of W-error", "time / ours"]
    return pd.DataFrame(rows, columns=columns)


def python_source():
    """All Python source of the environment: the standard library and what is installed."""
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    files = sorted({path for folder in folders for path in Path(folder).rglob("*.py")})
    return [text for path in files if (text := path.read_text(errors="ignore"))]


def counting_rows(corpora, folder):
    for name, tokens in corpora.items():
        path = Path(folder) / "counting.npy"
        np.save(path, tokens)
        got = contest.contend("counting", path)
        rate = (
            (got, "", "")
            if isinstance(got, str)
            else (got["s"], len(tokens) / got["s"] / 1e6, got["MB"] / 1e3)
        )
        yield name, f"{len(tokens):,}", *rate


def main():
    from headbound import corpus
    from headbound import corpus as streams

    texts = corpus.load("docstrings")
    tokenizer = streams.train_bpe(texts, VOCAB)
    tokens = streams.encode(tokenizer, texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, tokens)
        print(
            f"Singular values of the docstrings' {ORDER}-gram matrix, V = {VOCAB:,}, {len(tokens):,} tokens."
        )
        print(
            "Error: ours against a dense float64 SVD of a subsample (all ranks); others against ours,"
        )
        print(f"largest at d = {DEPTHS}. Extra memory: the process's own, at the peak.\n")
        print(spectrum_rows(path).to_string(index=False), "\n")
        source = streams.encode(tokenizer, python_source())
        corpora = {"an eighth of the docstrings": tokens[: len(tokens) // 8], "docstrings": tokens}
        corpora["all Python source here"] = source
        columns = ["corpus", "tokens", "seconds", "M tokens/s", "extra GB"]
        print(f"Counting {ORDER}-grams, V = {VOCAB:,}, on {contest.THREADS} threads.\n")
        frame = pd.DataFrame(counting_rows(corpora, folder), columns=columns)
        print(frame.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
