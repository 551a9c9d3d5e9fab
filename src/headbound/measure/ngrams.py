"""Exact spectra of a text's n-gram matrix in bounded memory, and how much of them is noise.

Row c of the matrix W is p(next token | context c), from counts. W-error depends on WᵀW alone, a sum
over contexts. A hash deals these out; a partition at a time is counted by sorting and added up.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float64, Integer
from scipy.sparse import csr_array, diags_array, vstack
from scipy.sparse.linalg import svds
from scipy.special import expit, logit
from statsmodels.api import OLS, add_constant
from torch.nn.functional import pad

from headbound import device
from headbound.measure import spectrum
from headbound.stats import Estimate

Tokens = Integer[np.ndarray, " tokens"]
Pieces = Sequence[Integer[np.ndarray, " _"]]
Curve = Float64[np.ndarray, " ranks"]  # entry d belongs to rank d
BLOCK = 1 << 22  # n-grams read at once
PARTITION = 1 << 23  # n-grams sorted at once (about 0.4 GB)
COLUMNS = 512  # columns of the Gram matrix computed at once
SLOTS = 1 << 16  # values of the hash that deals out contexts
EPSILON = np.finfo(float).eps


class _SplitHalf(NamedTuple):
    """What two halves of a text agree on: the rank, and W-error without noise.

    It lies between `floor` (a half judged by itself) and `ceiling` (judged by the other half).
    """

    rank: int
    floor: Curve
    ceiling: Curve


def count(
    tokens: Tokens,
    order: int,
    vocab_size: int,
    *,
    targets: Integer[np.ndarray, " ngrams"] | None = None,
    partitions: int | None = None,
) -> Iterator[csr_array]:
    """Counts (contexts × vocabulary), one partition of the contexts after the other.

    An n-gram has `order` tokens, its context one less. `targets` may say what follows each context.
    By default a partition has `PARTITION` n-grams.

    **Raises:** `ValueError` for an order or ids that don't fit.
    """
    ngrams = len(tokens) - order + 1
    if order < 2 or ngrams < 1:
        raise ValueError(f"order = {order}: must be from 2 to the {len(tokens)} tokens of the text")
    targets = tokens[order - 1 :] if targets is None else targets
    for extreme in (tokens.min(), tokens.max(), targets.min(), targets.max()):
        if not 0 <= extreme < vocab_size:
            raise ValueError(f"token id {extreme}: outside the vocabulary of {vocab_size}")
    columns = [tokens[place : place + ngrams] for place in range(order - 1)]
    columns.append(targets)
    partitions = partitions or -(-ngrams // PARTITION)
    for part in range(partitions):
        first = part * SLOTS // partitions
        end = (part + 1) * SLOTS // partitions
        slots = range(first, end)
        chosen = _selected(columns, vocab_size, slots)
        yield _runs(chosen, vocab_size)


def _context_matrix(
    tokens: Tokens, order: int, vocab_size: int, weighting: str = "contexts"
) -> csr_array:
    """W itself, sparse; unlike `gram` it grows with the corpus."""
    parts = count(tokens, order, vocab_size)
    return vstack([_rows(counts, weighting)[0] for counts in parts], format="csr")


def gram(
    tokens: Tokens,
    order: int,
    vocab_size: int,
    weighting: str = "contexts",
    unbiased: bool = False,
    **counting: Any,
) -> Float64[np.ndarray, "vocab vocab"]:
    """WᵀW of the rows √w · k / n: k a context's counts, n their sum.

    The `weighting` is `contexts`, w = 1 (the paper's), or `tokens`, w = n (what the loss sees).
    With `unbiased`, Σ w (k kᵀ − diag k) / (n (n − 1)), over pairs of *different* occurrences. Its
    mean is WᵀW of the true probabilities, which the plain one exceeds by sampling noise. Contexts
    seen once are then left out. `counting` is what `count` takes.

    **Raises:** `ValueError` for bad arguments, or a V × V matrix beyond the free memory.
    """
    _check_memory(vocab_size)
    total = np.zeros((vocab_size, vocab_size))
    diagonal = np.zeros(vocab_size)
    for counts in count(tokens, order, vocab_size, **counting):
        rows, factor = _rows(counts, weighting, unbiased)
        if unbiased:
            diagonal -= rows.T @ factor
        # A context with one follower only adds to the diagonal, and most are such.
        single = np.diff(rows.indptr) == 1
        alone = rows[single]
        diagonal += np.bincount(alone.indices, alone.data**2, vocab_size)
        _add_square(total, rows[~single])
    total[np.diag_indices(vocab_size)] += diagonal
    return total


def _singular_values(gram: Float64[np.ndarray, "vocab vocab"]) -> Float64[np.ndarray, " vocab"]:
    """All singular values of W, the largest first, from WᵀW.

    Those that float64 can't tell from zero are zero. W-error is good to 1e-15 / W-error.
    """
    where = device.precise(device.pick())
    matrix = torch.from_numpy(gram).to(where)
    values = torch.linalg.eigvalsh(matrix).flip(0).cpu().numpy()
    least = len(values) * EPSILON * values[0]
    values[values < least] = 0.0
    return np.sqrt(values)


def _leading_values(matrix: csr_array, ranks: int) -> Float64[np.ndarray, " values"]:
    """The `ranks` largest singular values by Lanczos, for vocabularies beyond `gram`.

    The others are given as their root mean square, from ‖W‖: W-error is exact up to `ranks`.
    """
    start = np.random.default_rng(0).random(min(matrix.shape))
    found = svds(matrix, ranks, v0=start, return_singular_vectors=False)
    values = np.sort(found)[::-1]
    others = min(matrix.shape) - ranks
    squares = np.sum(matrix.data**2)
    left = max(0.0, squares - values @ values)
    rest = math.sqrt(left / others)
    return np.append(values, np.full(others, rest))


def errors(tokens: Tokens, order: int, vocab_size: int, leading: int = 0, **rows: Any) -> Curve:
    """W-error of the best matrix of rank d, for each d from 0 to V, or to `leading` where given.

    `rows` is what `gram` takes; with `leading`, `weighting` alone.

    >>> errors(np.array([0, 1, 2, 0, 1, 2]), 2, 3).round(3)
    array([1.   , 0.816, 0.577, 0.   ])
    """
    if leading:
        matrix = _context_matrix(tokens, order, vocab_size, **rows)
        values = _leading_values(matrix, leading)
        return spectrum.w_error(values, range(leading + 1))
    values = _singular_values(gram(tokens, order, vocab_size, **rows))
    return spectrum.w_error(values, range(len(values) + 1))


def split_half(pieces: Pieces, order: int, vocab_size: int) -> _SplitHalf:
    """What two halves of a text agree on: every other piece, and the pieces between.

    The halves have `unbiased` matrices S and S', weighted by tokens, so that noise is alike in all
    rows, and scaled to trace one. With S = Σ λᵢ vᵢvᵢᵀ the rank-d part of one misses the other by

        ‖S' − Σ_{i≤d} λᵢ vᵢvᵢᵀ‖² = ‖S'‖² + Σ_{i≤d} (λᵢ² − 2 λᵢ vᵢᵀS'vᵢ)

    The rank is where this is least, both ways round and averaged. A direction of noise has a λᵢ but
    nothing of S'.

    **Raises:** `ValueError` if in a half no token follows the same context twice.
    """
    halves = []
    for half in (0, 1):
        tokens = np.concatenate(pieces[half::2])
        found = gram(tokens, order, vocab_size, "tokens", unbiased=True)
        if found.trace() <= 0:
            raise ValueError("in one half no token follows a context twice; give more text")
        halves.append(torch.from_numpy(found / found.trace()))
    both = (_judged(*halves) + _judged(*halves[::-1])) / 2
    floor, ceiling = both[1:].clamp(min=0).sqrt().numpy()
    return _SplitHalf(int(both[0].argmin()), floor, ceiling)


def study(
    pieces: Pieces, order: int, vocab_size: int, seed: int = 0
) -> tuple[Curve, Curve, _SplitHalf]:
    """W-errors, weighted by tokens, of texts and of the same with what follows shuffled; halves.

    The shuffled matrix has true rank one.
    """
    tokens = np.concatenate(pieces)
    following = tokens[order - 1 :]
    targets = np.random.default_rng(seed).permutation(following)
    counted = errors(tokens, order, vocab_size, weighting="tokens")
    shuffled = errors(tokens, order, vocab_size, weighting="tokens", targets=targets)
    return counted, shuffled, split_half(pieces, order, vocab_size)


def needed_rank(errors: Curve, level: float) -> int | None:
    """The least d whose error is at most `level`; None if the curve ends above it."""
    below = np.flatnonzero(errors <= level)
    return int(below[0]) if len(below) else None


def carried(vocab_sizes: Sequence[int], ranks: Sequence[float | int], vocab_size: int) -> Estimate:
    """The needed rank d at another vocabulary size, with the interval of a prediction.

    logit(d / V) = a + b ln V, by least squares
    """
    sizes = np.array(vocab_sizes, float)
    shares = np.array(ranks) / sizes
    inputs = add_constant(np.log(sizes))
    fit = OLS(logit(shares), inputs).fit()
    there = [1.0, np.log(vocab_size)]
    prediction = fit.get_prediction(there)
    found = prediction.summary_frame(alpha=0.05).iloc[0]
    shares = expit(found[["mean", "obs_ci_lower", "obs_ci_upper"]])
    value, low, high = (vocab_size * shares).tolist()
    return Estimate(value, low, high, len(sizes))


def _check_memory(vocab_size: int) -> None:
    free = psutil.virtual_memory().available
    most = int((free / 16) ** 0.5)
    if vocab_size > most:
        needs = f"its spectrum needs {16e-9 * vocab_size**2:.1f} GB, {free / 1e9:.1f} are free"
        fix = f"take at most {most} tokens, or `leading` ones"
        raise ValueError(f"vocab_size = {vocab_size}: {needs}; {fix}")


def _selected(columns: list[np.ndarray], vocab_size: int, slots: range) -> list[np.ndarray]:
    """The n-grams whose context has its hash in `slots`."""
    if len(slots) == SLOTS:
        return columns
    contexts = len(columns) - 1
    tables = np.random.default_rng(0).integers(0, SLOTS, (contexts, vocab_size), np.uint16)
    chosen = []
    for first in range(0, len(columns[-1]), BLOCK):
        windows = [column[first : first + BLOCK] for column in columns]
        pairs = zip(tables, windows, strict=False)
        hashed = reduce(np.bitwise_xor, [table[window] for table, window in pairs])
        inside = (hashed >= slots.start) & (hashed < slots.stop)
        here = np.flatnonzero(inside)
        chosen.append([window[here] for window in windows])
    return [np.concatenate(pieces) for pieces in zip(*chosen, strict=True)]


def _runs(columns: list[np.ndarray], vocab_size: int) -> csr_array:
    """Count n-grams as 64-bit keys; a context of more bits becomes its rank."""
    bits = (vocab_size - 1).bit_length()
    key = columns[0].astype(np.uint64)
    used = bits
    for column in columns[1:]:
        if used + bits > 64:
            ranks = np.unique(key, return_inverse=True)[1]
            key = ranks.astype(np.uint64)
            used = len(key).bit_length()
        key = (key << bits) | column.astype(np.uint64)
        used += bits
    found, counts = np.unique(key, return_counts=True)
    followers = found & ((1 << bits) - 1)
    starts = np.unique(found >> bits, return_index=True)[1]
    pointers = np.append(starts, len(found)).astype(np.int32)
    parts = (counts.astype(float), followers.astype(np.int32), pointers)
    return csr_array(parts, shape=(len(starts), vocab_size))


def _rows(
    counts: csr_array, weighting: str, unbiased: bool = False
) -> tuple[csr_array, np.ndarray]:
    """Weighted rows, and the factors that made them of counts."""
    if weighting not in ("contexts", "tokens"):
        raise ValueError(f"weighting = {weighting!r}: must be 'contexts' or 'tokens'")
    n = counts.sum(axis=1)
    if unbiased:
        counts = counts[n > 1]
        n = n[n > 1]
    factor = 1 / np.sqrt(n * (n - 1)) if unbiased else 1 / n
    if weighting == "tokens":
        factor *= np.sqrt(n)
    return diags_array(factor).tocsr() @ counts, factor


def _add_square(total: np.ndarray, rows: csr_array) -> None:
    """Add rowsᵀ rows, a few columns at a time: scipy multiplies without holding Python's lock."""
    columns = rows.T.tocsr()

    def add(first: int) -> None:
        part = slice(first, first + COLUMNS)
        total[part] += (columns[part] @ rows).toarray()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(add, range(0, len(total), COLUMNS)))


def _judged(fit: torch.Tensor, judge: torch.Tensor) -> torch.Tensor:
    """Held-out error, floor and ceiling for each rank of `fit`, judged by the other half."""
    values, vectors = torch.linalg.eigh(fit)
    found = ((judge @ vectors) * vectors).sum(0)
    missed = values * (values - 2 * found)
    missed /= (judge**2).sum()
    steps = torch.stack([missed, -values, -found])
    sums = steps.flip(1).cumsum(1)
    return 1 + pad(sums, (1, 0))
