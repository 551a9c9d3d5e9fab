"""The share of the squared gradient of the logits that lies along the columns of the head."""

import numpy as np

_draws = np.random.default_rng(4)
INPUTS = [
    (
        _draws.normal(3, size=(4, 2)),
        _draws.normal(size=(7, 2)) * [3.0, 1.0],
        np.array([0, 6, 2, 2]),
    )
    for _ in range(2)
]


def _gradient(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> np.ndarray:
    weights = np.exp(states @ head.T)
    return weights / weights.sum(axis=1, keepdims=True) - np.eye(len(head))[targets]


def _projection(head: np.ndarray) -> np.ndarray:
    return head @ np.linalg.pinv(head)


def right(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """The squared length of G's projection onto the columns of W, over that of G."""
    gradient = _gradient(states, head, targets)
    kept = gradient @ _projection(head)
    return (kept**2).sum() / (gradient**2).sum()


def of_the_norm(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """this is the share of the norm: the squared norms are compared"""
    return right(states, head, targets) ** 0.5


def lost(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """this is what is lost"""
    return 1 - right(states, head, targets)


def mean_of_shares(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """add up over the tokens before you divide"""
    gradient = _gradient(states, head, targets)
    kept = gradient @ _projection(head)
    return ((kept**2).sum(axis=1) / (gradient**2).sum(axis=1)).mean()


def no_projection(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """W Wᵀ is no projection: its columns are not orthonormal"""
    gradient = _gradient(states, head, targets)
    kept = gradient @ head @ head.T
    return (kept**2).sum() / (gradient**2).sum()


def no_target(states: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    """the target is missing: g = p − e_y"""
    weights = np.exp(states @ head.T)
    total = weights.sum(axis=1, keepdims=True)
    gradient = weights / total
    kept = gradient @ _projection(head)
    return (kept**2).sum() / (gradient**2).sum()
