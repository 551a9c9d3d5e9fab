"""How far the last checkpoint of an accuracy lies below the best one."""

import numpy as np

INPUTS = [
    (np.array([0, 4, 1, 3, 2]), np.array([1.0, 5.0, 3.0, 4.0, 7.0])),
    (np.array([2, 0, 1]), np.array([3.0, 2.0, 4.0])),
]


def right(steps: np.ndarray, values: np.ndarray) -> float:
    """The best value, less the value at the largest step."""
    return values.max() - values[steps.argmax()]


def last_entry(steps: np.ndarray, values: np.ndarray) -> float:
    """the last entry is not the final checkpoint: sort by step first"""
    return values.max() - values[-1]


def other_sign(steps: np.ndarray, values: np.ndarray) -> float:
    """the sign: a drop is positive where the curve got worse"""
    return values[steps.argmax()] - values.max()


def range_of_values(steps: np.ndarray, values: np.ndarray) -> float:
    """compare the best with the final checkpoint, not with the worst"""
    return values.max() - values.min()
