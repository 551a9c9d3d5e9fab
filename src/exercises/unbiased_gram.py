"""The matrix of second moments of next-token distributions, from counts, without the noise.

Each context's followers k are paired with those of its *other* occurrences.
"""

import numpy as np

_counts = np.array([[3.0, 1, 0], [0, 2, 2], [1, 0, 1]])
INPUTS = [(_counts,), (np.vstack([_counts, [[0, 0, 1.0]]]),)]


def right(counts: np.ndarray) -> np.ndarray:
    """The sum of (k kᵀ - diag k) / (n (n - 1)) over contexts seen at least twice."""
    total = np.zeros((counts.shape[1], counts.shape[1]))
    for row in counts:
        seen = row.sum()
        if seen >= 2:
            total += (np.outer(row, row) - np.diag(row)) / (seen * (seen - 1))
    return total


def with_itself(counts: np.ndarray) -> np.ndarray:
    """each occurrence is still paired with itself: subtract diag(k)"""
    return sum(np.outer(row, row) / row.sum() ** 2 for row in counts)


def all_squares(counts: np.ndarray) -> np.ndarray:
    """n(n - 1) pairs are left, not n²"""
    often = [row for row in counts if row.sum() >= 2]
    return sum((np.outer(row, row) - np.diag(row)) / row.sum() ** 2 for row in often)


def seen_once(counts: np.ndarray) -> np.ndarray:
    """a context seen once has no pair: leave it out"""
    pairs = [row.sum() * (row.sum() - 1) for row in counts]
    products = [np.outer(row, row) - np.diag(row) for row in counts]
    return sum(product / pair for product, pair in zip(products, pairs, strict=True))


def squares_subtracted(counts: np.ndarray) -> np.ndarray:
    """subtract k, not k²: two occurrences may have the same follower"""
    total = np.zeros((counts.shape[1], counts.shape[1]))
    for row in counts[counts.sum(axis=1) >= 2]:
        seen = row.sum()
        product = np.outer(row, row) - np.diag(row**2)
        total += product / (seen * (seen - 1))
    return total
