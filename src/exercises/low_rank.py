"""The best head of a given rank for hidden states whose second moments are C."""

import numpy as np

_draws = np.random.default_rng(2)
_states = np.abs(_draws.normal(size=(50, 4))) * [3.0, 1.0, 0.5, 0.1]
_second_moments = _states.T @ _states / 50
INPUTS = [(_draws.normal(size=(8, 4)), _second_moments, rank) for rank in (1, 2)]


def _cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, sigma, right_vectors = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right_vectors[:rank]


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**0.5) @ vectors.T


def right(head: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """Cut W C^½ to the rank, and undo the root."""
    root = _root(moments)
    return _cut(head @ root, rank) @ np.linalg.inv(root)


def plain_cut(head: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """you cut W itself: weigh it by the states first"""
    return _cut(head, rank)


def without_the_root(head: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """weigh by the root of C, not by C"""
    return _cut(head @ moments, rank) @ np.linalg.inv(moments)


def not_undone(head: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """undo the root after the cut"""
    return _cut(head @ _root(moments), rank)


def entry_by_entry(head: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """C^½ is no root entry by entry"""
    root = moments**0.5
    return _cut(head @ root, rank) @ np.linalg.inv(root)
