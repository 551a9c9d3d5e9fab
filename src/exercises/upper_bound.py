"""The plain upper bound on the loss gap of a head of rank d, from the logits' singular values."""

import numpy as np

_draws = np.random.default_rng(3)
INPUTS = [(_draws.normal(2, size=(6, 5)), 1), (_draws.normal(2, size=(9, 5)), 2)]


def _tail(logits: np.ndarray, first: int) -> float:
    sigma = np.linalg.svd(logits, compute_uv=False)
    return (sigma[first:] ** 2).sum() / (4 * len(logits))


def _without_row_means(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=1, keepdims=True)


def right(logits: np.ndarray, rank: int) -> float:
    """A quarter of the mean squared tail, after each row's mean is taken off."""
    return _tail(_without_row_means(logits), rank)


def with_row_constants(logits: np.ndarray, rank: int) -> float:
    """the row constant: take each row's mean off first"""
    return _tail(logits, rank)


def one_mean_for_all(logits: np.ndarray, rank: int) -> float:
    """you took off one mean of the whole matrix: each row has its own"""
    return _tail(logits - logits.mean(), rank)


def columns_centred(logits: np.ndarray, rank: int) -> float:
    """you centred the columns: each row is free up to a constant"""
    return _tail(logits - logits.mean(axis=0), rank)


def one_too_early(logits: np.ndarray, rank: int) -> float:
    """the tail starts after the first d values"""
    return _tail(_without_row_means(logits), rank - 1)


def not_squared(logits: np.ndarray, rank: int) -> float:
    """the values are squared"""
    sigma = np.linalg.svd(_without_row_means(logits), compute_uv=False)
    return sigma[rank:].sum() / (4 * len(logits))


def summed(logits: np.ndarray, rank: int) -> float:
    """the mean over contexts: divide by N"""
    return len(logits) * right(logits, rank)
