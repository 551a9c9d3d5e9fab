"""The paper's sizes on a GPU: seconds beside torch's plain way and beside what the machine's copies
and products take.

Without a CUDA device the same code runs on the CPU at a fraction of the sizes: that it runs is all
that this shows.
"""

import sys
import time

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy, normalize

from headbound import device
from headbound.measure import anisotropy, lowrank, ngrams, spectrum

RANKS = [64, 128, 256, 512]
SIZES = {  # tokens and width of the states; rows and width of the head; vocabulary of the Gram matrix; tokens to train
    "cuda": ((1_000_000, 2048), (50_304, 5120), 50_304, 65_536),
    "cpu": ((50_000, 256), (5030, 512), 1024, 1024),
}
WHERE = device.pick()
PRECISE = device.precise(WHERE)


def seconds(work, repeats=3):
    """The best of some runs, each waited for to its end; the first one, which sets things up, not counted."""
    best = np.inf
    for number in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if WHERE.type == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - begin)
    return best


def peak(work):
    """GB that a run allocates beyond what is held, on CUDA only."""
    if WHERE.type != "cuda":
        return np.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def product_rate(dtype, size):
    """Floating-point operations a second of a square product."""
    a = torch.randn(size, size, device=PRECISE if dtype == torch.float64 else WHERE, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a)


def cosine(tokens, d):
    x = torch.randn(tokens, d, device=WHERE, dtype=torch.bfloat16) + 0.3
    copy = seconds(x.clone)

    def plain():
        units = normalize(x.float(), dim=1)
        return float((units.sum(0).square().sum() - tokens) / (tokens * (tokens - 1)))

    def ours():
        return anisotropy.mean_cosine(x).value

    yield "mean cosine, bfloat16", f"{tokens:,} x {d:,}", ours, plain, copy, "a copy"


def head_spectrum(rows, d, rate):
    w = torch.randn(rows, d, device=WHERE)
    gram = 2 * rows * d**2 / rate
    yield (
        "singular values of a head",
        f"{rows:,} x {d:,}",
        lambda: spectrum.singular_values(w),
        lambda: torch.linalg.svdvals(w),
        gram,
        "its float64 Gram product",
    )


def gram_spectrum(vocab, rate):
    rows = torch.rand(vocab, vocab // 2, device=PRECISE, dtype=torch.float64)
    found = (rows @ rows.T).cpu().numpy()
    del rows
    plain = (
        None if WHERE.type == "cuda" else lambda: np.linalg.eigvalsh(found)
    )  # hours at V = 50,304
    product = 2 * vocab**3 / rate
    yield (
        "spectrum of an n-gram matrix",
        f"{vocab:,} x {vocab:,}",
        lambda: ngrams._singular_values(found),
        plain,
        product,
        "a float64 product",
    )


def constrained_heads(tokens, rows, d, rate):
    rng = np.random.default_rng(0)
    states, targets = rng.standard_normal((tokens, d), np.float32), rng.integers(rows, size=tokens)
    starts = [
        lowrank.Head.random(torch.empty(rows, d, device=WHERE), rank) for rank in RANKS if rank <= d
    ]
    batch = min(1024, tokens)

    def ours():
        return lowrank.train(lowrank.Examples(states, targets, targets), starts, 1, batch)

    def plain():
        """Every rank by itself, whole logits."""
        for start in starts:
            factors = [x.clone().requires_grad_() for x in start]
            adam = torch.optim.Adam(factors)
            for i in range(0, tokens - batch + 1, batch):
                x, y = (torch.from_numpy(a[i : i + batch]).to(WHERE) for a in (states, targets))
                cross_entropy(x @ factors[1].T @ factors[0].T, y).backward()
                adam.step()
                adam.zero_grad()

    products = sum(6 * tokens * len(start.B) * (rows + d) for start in starts) / rate
    yield (
        f"{len(starts)} heads trained",
        f"{tokens:,} tokens, V = {rows:,}",
        ours,
        plain,
        products,
        "their products",
    )


def main():
    """One table, each contest beside its plain way and its floor."""
    states, head, vocab, tokens = SIZES["cuda" if WHERE.type == "cuda" else "cpu"]
    name = torch.cuda.get_device_name() if WHERE.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}: {' '.join(['python', *sys.argv])}")
    if WHERE.type != "cuda":
        print("No CUDA device: the sizes are cut, and the ratios say nothing about a GPU.")
    size = 8192 if WHERE.type == "cuda" else 1024
    double, single = product_rate(torch.float64, size), product_rate(torch.float32, size)
    print(
        f"Products of {size:,} x {size:,}: {single / 1e12:.3g} TFLOP/s float32, {double / 1e12:.3g} float64\n"
    )
    contests = [
        *cosine(*states),
        *head_spectrum(*head, double),
        *gram_spectrum(vocab, double),
        *constrained_heads(tokens, head[0], states[1], single),
    ]
    rows = []
    for what, shape, ours, plain, floor, named in contests:
        own, others = seconds(ours), seconds(plain, 1) if plain else np.nan
        memory = peak(ours), peak(plain) if plain else np.nan
        rows.append((what, shape, own, own / others, own / floor, named, *memory))
    columns = [
        "what",
        "size",
        "seconds",
        "/ plain",
        "/ floor",
        "floor",
        "extra GB",
        "extra GB, plain",
    ]
    print(
        pd.DataFrame(rows, columns=columns).to_string(
            index=False, float_format="{:.3g}".format, na_rep="-"
        )
    )


if __name__ == "__main__":
    main()
