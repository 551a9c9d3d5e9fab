"""Spearman's rank correlation of the changes of two curves from checkpoint to checkpoint."""

import numpy as np
from scipy.stats import pearsonr, spearmanr

_draws = np.random.default_rng(0)
INPUTS = [tuple(np.cumsum(_draws.normal(1, size=(2, 9)), axis=1)) for _ in range(2)]


def right(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation of the differences."""
    return spearmanr(np.diff(x), np.diff(y)).statistic


def of_levels(x: np.ndarray, y: np.ndarray) -> float:
    """curves share time: correlate their changes between checkpoints"""
    return spearmanr(x, y).statistic


def of_values(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's takes the values: Spearman's their ranks"""
    return pearsonr(np.diff(x), np.diff(y)).statistic


def of_orders(x: np.ndarray, y: np.ndarray) -> float:
    """argsort is the order, not the ranks: twice"""
    return np.corrcoef(np.diff(x).argsort(), np.diff(y).argsort())[0, 1]
