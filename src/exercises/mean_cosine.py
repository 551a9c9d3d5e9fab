"""The mean cosine of all pairs of different hidden states."""

import numpy as np

_draws = np.random.default_rng(1)
INPUTS = [
    (_draws.normal(1, size=(9, 4)),),
    (_draws.normal(1, size=(5, 4)) * [[1.0], [10.0], [0.1], [5.0], [2.0]],),
]


def _cosines(states: np.ndarray) -> np.ndarray:
    units = states / np.linalg.norm(states, axis=1, keepdims=True)
    return units @ units.T


def _mean_of_pairs(matrix: np.ndarray) -> float:
    count = len(matrix)
    return (matrix.sum() - np.trace(matrix)) / (count * (count - 1))


def right(states: np.ndarray) -> float:
    """The mean of the matrix of cosines, without its diagonal."""
    return _mean_of_pairs(_cosines(states))


def with_the_diagonal(states: np.ndarray) -> float:
    """the diagonal i = j is in: leave out each state's cosine with itself"""
    return _cosines(states).mean()


def dot_products(states: np.ndarray) -> float:
    """these are dot products: divide each state by its norm first"""
    return _mean_of_pairs(states @ states.T)


def half_of_the_pairs(states: np.ndarray) -> float:
    """you added up i < j and divided by all N(N - 1) pairs"""
    return _mean_of_pairs(np.triu(_cosines(states)))


def centred(states: np.ndarray) -> float:
    """do not subtract the mean state: it is what is measured"""
    return _mean_of_pairs(_cosines(states - states.mean(axis=0)))
