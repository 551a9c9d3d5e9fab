"""The singular entropy: how far singular values are from being all equal, in nats."""

import numpy as np

INPUTS = [(np.array([3.0, 1.0, 1.0, 1.0]),), (np.array([5.0, 2.0, 0.5, 0.0]),)]


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return -(positive * np.log(positive)).sum()


def right(sigma: np.ndarray) -> float:
    """ln d less the entropy of the values' shares."""
    return np.log(len(sigma)) - _entropy(sigma / sigma.sum())


def in_bits(sigma: np.ndarray) -> float:
    """the base of the logarithm: nats, not bits"""
    return right(sigma) / np.log(2)


def not_a_number(sigma: np.ndarray) -> float:
    """0 ln 0 counts as 0, yours is NaN"""
    shares = sigma / sigma.sum()
    return np.log(len(sigma)) + (shares * np.log(shares)).sum()


def not_normalised(sigma: np.ndarray) -> float:
    """the values must sum to one: p = s / s.sum()"""
    return np.log(len(sigma)) - _entropy(sigma)


def of_squares(sigma: np.ndarray) -> float:
    """p is made of the values, not of their squares"""
    return right(sigma**2)


def entropy_itself(sigma: np.ndarray) -> float:
    """this is H(p): take it from ln d"""
    return _entropy(sigma / sigma.sum())
