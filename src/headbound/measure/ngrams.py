"""Exact spectra of a text's n-gram matrix in bounded memory, and how much of them is sampling noise.

Row c of the matrix W is p(next token | context c), from counts. W-error depends on `WᵀW` (V × V) alone, a sum over
contexts: these are split by a hash, a partition at a time is counted by sorting, added up in float64, and forgotten.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float64, Integer
from scipy.sparse import csr_array, diags_array, vstack
from scipy.sparse.linalg import LinearOperator, eigsh

from headbound import device

Tokens = Integer[np.ndarray, " tokens"]
BLOCK, PARTITION = 1 << 22, 1 << 23  # n-grams read at once, and sorted at once (about 0.4 GB)
COLUMNS = 512  # columns of the Gram matrix computed at once


class Gram(NamedTuple):
    """`WᵀW`, how many rows (contexts) W has, and the n-grams counted in them."""

    matrix: Float64[np.ndarray, "vocab vocab"]
    contexts: int
    ngrams: int


class SplitHalf(NamedTuple):
    """What two halves of a text agree on; entry d of a curve belongs to rank d, and `rank` has the least `held_out`.

    The W-error without sampling noise lies between `floor` (a half judged by itself: flattering) and `ceiling`
    (judged by the other: what was really found).
    """

    rank: int
    held_out: Float64[np.ndarray, " ranks"]
    floor: Float64[np.ndarray, " ranks"]
    ceiling: Float64[np.ndarray, " ranks"]


def count(
    tokens: Tokens,
    order: int,
    vocab_size: int,
    targets: Integer[np.ndarray, " ngrams"] | None = None,
    partitions: int | None = None,
    only: Iterable[int] | None = None,
) -> Iterator[csr_array]:
    """Counts (contexts × vocabulary), one partition of the contexts after the other.

    **Arguments:**

    - `tokens`: the corpus, perhaps memory-mapped: it is read in blocks, once for each partition.
    - `order`: tokens in an n-gram, 2 or more; a context has one less.
    - `targets`: what follows each context, `len(tokens) - order + 1` ids; by default what does in `tokens`.
    - `partitions`: how many; by default enough for `PARTITION` n-grams in each. `only`: those wanted (all).

    **Raises:** `ValueError` for an order, ids, targets or partitions that don't fit.
    """
    ngrams = len(tokens) - order + 1
    if order < 2 or ngrams < 1:
        raise ValueError(
            f"order = {order}: must be from 2 to the number of tokens, {len(tokens)}; give more text"
        )
    if targets is not None and len(targets) != ngrams:
        raise ValueError(
            f"{len(targets)} targets: {ngrams} contexts need one each; cut or extend them"
        )
    partitions = partitions or -(-ngrams // PARTITION)
    tables = np.random.default_rng(0).integers(0, 2**16, (order - 1, vocab_size), np.uint16)
    for part in range(partitions) if only is None else only:
        if not 0 <= part < partitions:
            raise ValueError(
                f"partition = {part}: must be from 0 to {partitions - 1}; choose partitions there"
            )
        chosen = []
        for first in range(0, ngrams, BLOCK):
            last = min(first + BLOCK, ngrams)
            windows = [tokens[first + k : last + k] for k in range(order)]
            windows[-1] = windows[-1] if targets is None else targets[first:last]
            checked = (tokens[first : last + order - 1], windows[-1])
            low, high = min(x.min() for x in checked), max(x.max() for x in checked)
            if low < 0 or high >= vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"token id {wrong}: outside the vocabulary of {vocab_size}; use its own tokenizer"
                )
            if partitions > 1:
                hashed = reduce(
                    np.bitwise_xor, (t[x] for t, x in zip(tables, windows, strict=False))
                )
                bounds = [i * 2**16 // partitions for i in (part, part + 1)]
                here = np.flatnonzero((hashed >= bounds[0]) & (hashed < bounds[1]))
                windows = [x[here] for x in windows]
            chosen.append(windows)
        columns = [np.concatenate(pieces) for pieces in zip(*chosen, strict=True)]
        yield _runs(columns, vocab_size)


def _runs(columns: list[np.ndarray], vocab_size: int) -> csr_array:
    """Sort n-grams as 64-bit keys and count runs; a context that needs more bits is replaced by its rank."""
    bits = (vocab_size - 1).bit_length()
    key, used = columns[0].astype(np.uint64), bits
    for column in columns[1:]:
        if used + bits > 64:
            key = np.unique(key, return_inverse=True)[1].astype(np.uint64)
            used = len(key).bit_length()
        key = (key << bits) | column.astype(np.uint64)
        used += bits
    key.sort()
    first = np.flatnonzero(np.diff(key, prepend=~key[:1]))
    counts, key = np.diff(first, append=len(key)).astype(np.float64), key[first]
    context = key >> bits
    start = np.append(np.flatnonzero(np.diff(context, prepend=~context[:1])), len(key)).astype(
        np.int32
    )
    followers = (key & ((1 << bits) - 1)).astype(np.int32)
    return csr_array((counts, followers, start), shape=(len(start) - 1, vocab_size))


def _rows(
    counts: csr_array,
    weighting: str,
    min_count: int,
    smoothing: float = 0.0,
    unbiased: bool = False,
) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Weighted rows, the factors that made them of counts, and how often each context occurs."""
    if weighting not in ("contexts", "tokens"):
        raise ValueError(
            f"weighting = {weighting!r}: must be 'contexts' (the paper's) or 'tokens' (the loss's)"
        )
    n = counts.sum(axis=1)
    kept = n >= max(min_count, 2 if unbiased else 1)
    counts, n = counts[kept], n[kept]
    factor = 1 / np.sqrt(n * (n - 1)) if unbiased else 1 / (n + smoothing)
    factor = factor * np.sqrt(n) if weighting == "tokens" else factor
    return diags_array(factor).tocsr() @ counts, factor, n


def context_matrix(
    tokens: Tokens, order: int, vocab_size: int, weighting: str = "contexts"
) -> csr_array:
    """W itself, sparse, with arguments as of `gram`; it grows with the corpus, which `gram`'s memory does not."""
    return vstack(
        [_rows(k, weighting, 1)[0] for k in count(tokens, order, vocab_size)], format="csr"
    )


def gram(
    tokens: Tokens,
    order: int,
    vocab_size: int,
    weighting: str = "contexts",
    min_count: int = 1,
    smoothing: float = 0.0,
    unbiased: bool = False,
    **counting: Any,
) -> Gram:
    """`WᵀW` of the rows `√w (k + s·u) / (n + s)`: k a context's counts, n their sum, u the unigram shares.

    With `unbiased`, `Σ w (k kᵀ − diag k) / (n (n − 1))`, the mean over pairs of *different* occurrences: its mean
    is `WᵀW` of the true probabilities, which the plain one exceeds by sampling noise.

    **Arguments:**

    - `weighting`: `"contexts"`, w = 1 (the paper's), or `"tokens"`, w = n (what the loss sees).
    - `min_count`: contexts that occur less often are left out (`unbiased`: those that occur once, always).
    - `smoothing`: s, in tokens; 0 if `unbiased`.
    - `counting`: `targets`, `partitions` and `only`, as of `count`; what jobs compute apart, `combine` adds up.

    **Raises:** `ValueError` for bad arguments, or a V × V matrix beyond the free memory.
    """
    free = psutil.virtual_memory().available
    if 16 * vocab_size**2 > free:
        need, most = 16e-9 * vocab_size**2, int((free / 16) ** 0.5)
        raise ValueError(
            f"vocab_size = {vocab_size}: its spectrum needs {need:.1f} GB, {free / 1e9:.1f} GB are free; "
            f"take a tokenizer of at most {most} tokens, or leading_values"
        )
    if smoothing < 0 or (smoothing and unbiased):
        raise ValueError(f"smoothing = {smoothing}: must be 0 or more tokens, and 0 if unbiased")
    total, contexts, ngrams = np.zeros((vocab_size, vocab_size)), 0, 0
    diagonal, cross, level = np.zeros(vocab_size), np.zeros(vocab_size), 0.0
    for counts in count(tokens, order, vocab_size, **counting):
        rows, factor, n = _rows(counts, weighting, min_count, smoothing, unbiased)
        contexts, ngrams = contexts + len(n), ngrams + int(n.sum())
        diagonal -= rows.T @ factor * unbiased
        cross, level = (
            cross + rows.T @ (smoothing * factor),
            level + float(np.sum((smoothing * factor) ** 2)),
        )
        # A context with one follower only adds to the diagonal, and most are such.
        single = np.diff(rows.indptr) == 1
        alone, rows = rows[single], rows[~single]
        diagonal += np.bincount(alone.indices, alone.data**2, vocab_size)
        columns = rows.T.tocsr()

        def add(first: int, columns: csr_array = columns, rows: csr_array = rows) -> None:
            total[first : first + COLUMNS] += (columns[first : first + COLUMNS] @ rows).toarray()

        with ThreadPoolExecutor(
            os.cpu_count()
        ) as pool:  # scipy multiplies without holding Python's lock
            list(pool.map(add, range(0, vocab_size, COLUMNS)))
    total[np.diag_indices(vocab_size)] += diagonal
    if smoothing:
        blocks = (tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK))
        unigram = sum(np.bincount(x, minlength=vocab_size) for x in blocks) / len(tokens)
        mixed = np.outer(cross + level / 2 * unigram, unigram)
        total += mixed + mixed.T
    return Gram(total, contexts, ngrams)


def combine(parts: Iterable[Gram]) -> Gram:
    """The `Gram` of all contexts, from those of disjoint partitions.

    **Raises:** `ValueError` if there are none, or of different vocabularies.
    """
    parts = list(parts)
    sizes = {len(part.matrix) for part in parts}
    if len(sizes) != 1:
        raise ValueError(
            f"vocabularies of {sorted(sizes)} tokens in {len(parts)} parts: give parts of one vocabulary"
        )
    return Gram(
        sum(p.matrix for p in parts), sum(p.contexts for p in parts), sum(p.ngrams for p in parts)
    )


def singular_values(gram: Gram) -> Float64[np.ndarray, " vocab"]:
    """All singular values of W, largest first, as roots of the eigenvalues of `WᵀW`.

    What a float64 `WᵀW` can't tell from zero (below V·ε·σ₁²) is zero: W-error, a ratio of sums of squares, is then good
    to about 1e-15 / W-error; the smallest values themselves are not.

    **Raises:** `ValueError` if no context is left.
    """
    if not gram.contexts:
        raise ValueError("0 contexts: none is frequent enough; lower min_count or give more text")
    values = torch.linalg.eigvalsh(torch.from_numpy(gram.matrix).to(device.precise(device.pick())))
    values = values.cpu().numpy()[::-1]
    return np.sqrt(np.where(values > len(values) * np.finfo(float).eps * values[0], values, 0.0))


def leading_values(matrix: csr_array, ranks: int) -> Float64[np.ndarray, " values"]:
    """The `ranks` largest singular values by Lanczos on `WᵀW`, for vocabularies beyond `gram`.

    The others are given as their root mean square, from `‖W‖²`: W-error(d) is exact for each d up to `ranks`.

    **Raises:** `ValueError` for ranks out of range.
    """
    if not 1 <= ranks < min(matrix.shape):
        raise ValueError(
            f"ranks = {ranks}: must be between 1 and {min(matrix.shape) - 1}; choose ranks there"
        )
    transposed, size = matrix.T.tocsr(), matrix.shape[1]
    square = LinearOperator(
        (size, size), matvec=lambda x: transposed @ (matrix @ x), dtype=np.float64
    )
    values = eigsh(
        square, ranks, v0=np.random.default_rng(0).random(size), return_eigenvectors=False
    )[::-1]
    others = min(matrix.shape) - ranks
    rest = max(0.0, np.sum(matrix.data**2) - values.sum()) / others
    return np.sqrt(np.append(values, np.full(others, rest)))


def split_half(first: Gram, second: Gram) -> SplitHalf:
    """How many dimensions two halves of a text agree on, from their `unbiased` matrices S, S' at trace one.

    With `S = Σ λᵢ vᵢvᵢᵀ`, the rank-d approximation of one half misses the other by `‖S' − Σ_{i≤d} λᵢ vᵢvᵢᵀ‖²`
    `= ‖S'‖² + Σ_{i≤d} (λᵢ² − 2 λᵢ vᵢᵀS'vᵢ)`; `held_out` is its share of `‖S'‖²`. A direction of noise has a λᵢ but
    nothing of S'. Both ways round, averaged. Weigh by `"tokens"`: noise is then alike in all rows.

    **Raises:** `ValueError` if in a half no context occurs twice.
    """
    if not (first.contexts and second.contexts):
        raise ValueError(
            "0 contexts in one half: none occurs twice; give more text or a smaller order"
        )
    halves = [torch.from_numpy(half.matrix / half.matrix.trace()) for half in (first, second)]
    curves = []
    for fit, judge in (halves, halves[::-1]):
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(fit))
        found = ((judge @ vectors) * vectors).sum(0)
        steps = torch.stack([values * (values - 2 * found) / (judge**2).sum(), -values, -found])
        curves.append(1 + torch.nn.functional.pad(steps.cumsum(1), (1, 0)))
    held_out, floor, ceiling = ((curves[0] + curves[1]) / 2).numpy()
    return SplitHalf(
        int(held_out.argmin()), held_out, np.sqrt(floor.clip(0)), np.sqrt(ceiling.clip(0))
    )


def needed_rank(errors: Float64[np.ndarray, " ranks"], level: float) -> int | None:
    """The least d whose error, entry d of the curve, is at most `level`; None if the curve ends above it."""
    below = np.flatnonzero(errors <= level)
    return int(below[0]) if len(below) else None
