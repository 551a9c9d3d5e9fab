"""Checks of the book's exercises: a learner's function against what is right, and against the mistakes people make."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from headbound.measure import anisotropy, bounds, gradients, lowrank, saturation, spectrum

Function = Callable[..., Any]


def check(name: str, function: Function) -> None:
    """Print "correct", or a hint at what is wrong with `function`, a learner's answer to the exercise `name`.

    **Raises:** `ValueError` for an exercise that is not there.
    """
    if name not in EXERCISES:
        raise ValueError(f"exercise = {name!r}: must be one of {', '.join(EXERCISES)}")
    print(f"{name}: {_feedback(function, *EXERCISES[name])}")


def _feedback(
    function: Function, right: Function, inputs: Sequence[tuple], wrong: dict[str, Function]
) -> str:
    """The hint of the mistake that answers every input as `function` does; else what is seen from outside."""
    expected = _answers(right, inputs)
    try:
        found = _answers(function, inputs)
    except Exception as error:  # whatever a learner's function may raise
        return f"your function stopped with {type(error).__name__}: {error}"
    if _same(found, expected):
        return "correct"
    for hint, mistaken in wrong.items():
        if _same(found, _answers(mistaken, inputs)):
            return hint
    asked, mine, yours = next(
        x for x in zip(inputs, expected, found, strict=True) if not _same(x[1:2], x[2:])
    )
    if mine.shape != yours.shape:
        return f"your result has the shape {yours.shape}, it should have {mine.shape}"
    factor = float(yours.sum() / mine.sum())
    if np.isfinite(factor) and _same(found, [np.asarray(factor * x) for x in expected]):
        return f"right but for a constant factor: your results are {factor:.4g} times as large"
    return f"not yet: for {', '.join(map(str, asked))} it should give {mine}, yours gives {yours}"


def _answers(function: Function, inputs: Sequence[tuple]) -> list[np.ndarray]:
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return [np.asarray(function(*arguments), float) for arguments in copy.deepcopy(inputs)]


def _same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        a.shape == b.shape and np.allclose(a, b, 1e-5, 1e-9, equal_nan=True) for a, b in pairs
    )


def _cosines(h: np.ndarray) -> np.ndarray:
    return (h @ h.T) / np.outer(*2 * [np.linalg.norm(h, axis=1)])


def _pairs(matrix: np.ndarray) -> float:
    return (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))


def _gram(counts: np.ndarray, least: int = 2, less: int = 1, own: Function = np.asarray) -> Any:
    rows = [k for k in counts if k.sum() >= least]
    return sum((np.outer(k, k) - np.diag(own(k))) / (k.sum() * (k.sum() - less)) for k in rows)


def _cut(weight: np.ndarray, rank: int, by: np.ndarray, back: np.ndarray) -> np.ndarray:
    u, s, v = np.linalg.svd(weight @ by, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ back


def _root(c: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(c)
    return (vectors * values**0.5) @ vectors.T


def _tail(z: np.ndarray, first: int, power: int = 2) -> float:
    return float((np.linalg.svd(z, compute_uv=False)[first:] ** power).sum() / (4 * len(z)))


def _passed(
    h: np.ndarray, w: np.ndarray, y: np.ndarray, by: np.ndarray, target: int = 1
) -> np.ndarray:
    p = np.exp(h @ w.T)
    g = p / p.sum(1, keepdims=True) - target * np.eye(len(w))[y]
    return np.array([((g @ by) ** 2).sum(1), (g**2).sum(1)])


def _onto(w: np.ndarray) -> np.ndarray:
    return w @ np.linalg.pinv(w)


# What is right, inputs to try it on, and hints, each with a function that makes the mistake it is about.
_random = np.random.default_rng(0).normal
_spread = np.abs(_random(size=(50, 4))) * [3.0, 1.0, 0.5, 0.1]
_counts = np.array([[3.0, 1, 0], [0, 2, 2], [1, 0, 1]])

EXERCISES: dict[str, tuple[Function, Sequence[tuple], dict[str, Function]]] = {
    "late_drop": (
        lambda steps, values: saturation.detect(steps, values, None, resamples=1).drop,
        [
            (np.array([0, 4, 1, 3, 2]), np.array([1, 5, 3, 4, 7.0])),
            (np.array([2, 0, 1]), np.array([3, 2, 4.0])),
        ],
        {
            "the last entry is not the final checkpoint: sort by step first": lambda s, v: (
                v.max() - v[-1]
            ),
            "the sign: a drop is positive where the curve got worse": lambda s, v: (
                v[s.argmax()] - v.max()
            ),
            "compare the best with the final checkpoint, not with the worst": lambda s, v: np.ptp(
                v
            ),
        },
    ),
    "correlation_of_changes": (
        lambda x, y: spearmanr(np.diff(x), np.diff(y)).statistic,
        [tuple(np.cumsum(_random(1, size=(2, 9)), 1)) for _ in range(2)],
        {
            "curves share time: correlate their changes between checkpoints": lambda x, y: (
                spearmanr(x, y).statistic
            ),
            "Pearson's takes the values: Spearman's their ranks": lambda *c: (
                pearsonr(*np.diff(c)).statistic
            ),
            "argsort is the order, not the ranks: twice": lambda *c: np.corrcoef(
                np.diff(c).argsort()
            )[0, 1],
        },
    ),
    "mean_cosine": (
        lambda h: anisotropy.mean_cosine(torch.from_numpy(h), resamples=1).value,
        [(_random(1, size=(9, 4)),), (_random(1, size=(5, 4)) * [[1], [10], [0.1], [5], [2]],)],
        {
            "the diagonal i = j is in: leave out each state's cosine with itself": lambda h: (
                _cosines(h).mean()
            ),
            "these are dot products: divide each state by its norm first": lambda h: _pairs(
                h @ h.T
            ),
            "you added up i < j and divided by all N(N - 1) pairs": lambda h: _pairs(
                np.triu(_cosines(h))
            ),
            "do not subtract the mean state: it is what is measured": lambda h: _pairs(
                _cosines(h - h.mean(0))
            ),
        },
    ),
    "singular_entropy": (
        spectrum.singular_entropy,
        [(np.array([3.0, 1, 1, 1]),), (np.array([5, 2, 0.5, 0]),)],
        {
            "the base of the logarithm: nats, not bits": lambda s: (
                spectrum.singular_entropy(s) / np.log(2)
            ),
            "0 ln 0 counts as 0, yours is NaN": lambda s: (
                np.log(len(s)) + (p := spectrum.probabilities(s)) @ np.log(p)
            ),
            "the values must sum to one: p = s / s.sum()": lambda s: (
                np.log(len(s)) + np.nansum(s * np.log(s))
            ),
            "p is made of the values, not of their squares": lambda s: spectrum.singular_entropy(
                s**2
            ),
            "this is H(p): take it from ln d": lambda s: (
                np.log(len(s)) - spectrum.singular_entropy(s)
            ),
        },
    ),
    "unbiased_gram": (
        _gram,
        [(_counts,), (np.vstack([_counts, [[0, 0, 1]]]),)],
        {
            "each occurrence is still paired with itself: subtract diag(k)": lambda k: _gram(
                k, 1, 0, np.zeros_like
            ),
            "n(n - 1) pairs are left, not n²": lambda k: _gram(k, 2, 0),
            "a context seen once has no pair: leave it out": lambda k: _gram(k, 1),
            "subtract k, not k²: two occurrences may have the same follower": lambda k: _gram(
                k, 2, 1, np.square
            ),
        },
    ),
    "low_rank": (
        lambda w, c, r: np.matmul(
            *map(np.asarray, lowrank.low_rank(torch.from_numpy(w), r, torch.from_numpy(c)))
        ),
        [(_random(size=(8, 4)), _spread.T @ _spread / 50, rank) for rank in (1, 2)],
        {
            "you cut W itself: weigh it by the states first": lambda w, c, r: _cut(
                w, r, np.eye(4), np.eye(4)
            ),
            "weigh by the root of C, not by C": lambda w, c, r: _cut(w, r, c, np.linalg.inv(c)),
            "undo the root after the cut": lambda w, c, r: _cut(w, r, _root(c), np.eye(4)),
            "C^½ is no root entry by entry": lambda w, c, r: _cut(
                w, r, c**0.5, np.linalg.inv(c**0.5)
            ),
        },
    ),
    "upper_bound": (
        lambda z, rank: bounds.textbook_upper(z, [rank])[0],
        [(_random(2, size=(6, 5)), 1), (_random(2, size=(9, 5)), 2)],
        {
            "the row constant: take each row's mean off first": lambda z, d: _tail(z, d),
            "you centred the columns: each row is free up to a constant": lambda z, d: _tail(
                z - z.mean(0), d
            ),
            "the tail starts after the first d values": lambda z, d: _tail(
                z - z.mean(1, keepdims=True), d - 1
            ),
            "the values are squared": lambda z, d: _tail(z - z.mean(1, keepdims=True), d, 1),
            "the mean over contexts: divide by N": lambda z, d: (
                len(z) * bounds.textbook_upper(z, [d])[0]
            ),
        },
    ),
    "share_kept": (
        lambda h, w, y: (
            gradients.share_kept(lowrank.Examples(h, y, y), torch.from_numpy(w)).share().value
        ),
        [
            (_random(3, size=(4, 2)), _random(size=(7, 2)) * [3, 1], np.array([0, 6, 2, 2]))
            for _ in range(2)
        ],
        {
            "this is the share of the norm: the squared norms are compared": lambda h, w, y: (
                np.divide(*_passed(h, w, y, _onto(w)).sum(1)) ** 0.5
            ),
            "this is what is lost": lambda h, w, y: (
                1 - np.divide(*_passed(h, w, y, _onto(w)).sum(1))
            ),
            "add up over the tokens before you divide": lambda *c: np.divide(
                *_passed(*c, _onto(c[1]))
            ).mean(),
            "W Wᵀ is no projection: its columns are not orthonormal": lambda h, w, y: np.divide(
                *_passed(h, w, y, w @ w.T).sum(1)
            ),
            "the target is missing: g = p − e_y": lambda h, w, y: np.divide(
                *_passed(h, w, y, _onto(w), 0).sum(1)
            ),
        },
    ),
}
