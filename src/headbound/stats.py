"""Estimates that carry their uncertainty and their sample size."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


class Estimate(NamedTuple):
    """A number, its 95 % interval, and the number of independent units (texts, seeds) behind it."""

    value: float
    low: float
    high: float
    n: int

    def map(self, increasing: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the number, as a perplexity from a loss."""
        return Estimate(*map(increasing, self[:3]), self.n)

    def above(self, cut: float) -> bool | None:
        """Whether the whole interval lies above `cut`: None where it holds `cut`, or is unknown."""
        if self.low > cut:
            return True
        return False if self.high <= cut else None

    def within(self, low: float, high: float) -> bool | None:
        """Whether the whole interval lies in a range: None where it crosses an end."""
        if low <= self.low and self.high <= high:
            return True
        return False if self.high < low or self.low > high else None


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "sets units"]], Float[np.ndarray, " sets"]],
    units: int,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval (95 %) over independent units, by their multiplicities.

    Tokens of one text are not independent, so the book resamples *texts*. `statistic` gets a row
    for each resample: how often each unit occurs in it (all ones: the sample itself). It returns
    the number of interest for each row. The interval is NaN with fewer than two units, and where
    the statistic of some resample is NaN.

    **Raises:** `ValueError` if `units` is below one.
    """
    if units < 1:
        raise ValueError(f"units = {units}: a bootstrap needs at least one (text, model or seed)")
    value = float(statistic(np.ones((1, units)))[0])
    if units < 2:
        return Estimate(value, math.nan, math.nan, units)
    drawn = np.random.default_rng(seed).integers(units, size=(resamples, units))
    # Numbers of their own for each resample, so that all are counted at once.
    drawn += units * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=drawn.size)
    weights = counts.reshape(drawn.shape).astype(float)
    # scipy's bootstrap warns where a resample has no value; here the interval is then NaN.
    values = statistic(weights)
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value, float(low), float(high), units)


def mean(
    values: Float[np.ndarray, " n"],
    units: Int[np.ndarray, " n"] | None = None,
    over: Float[np.ndarray, " n"] | None = None,
) -> Estimate:
    """The mean of values, its interval by bootstrap over independent units.

    `units` numbers the unit that each value is from, such as a token's text; None: each is its own.
    With `over` the estimate is Σ values / Σ over, NaN where that sum is zero.

    **Raises:** `ValueError` if there is no value.

    >>> mean(np.array([1.0, 2.0, 3.0, 4.0]), units=np.array([0, 0, 1, 1])).n
    2
    """
    places = np.arange(len(values))
    if units is not None:
        _, places = np.unique(units, return_inverse=True)
    sums = np.bincount(places, values)
    whole = np.bincount(places, over)

    def statistic(weights: Float[np.ndarray, "sets units"]) -> Float[np.ndarray, " sets"]:
        total = weights @ whole
        unknown = np.full(len(total), math.nan)
        return np.divide(weights @ sums, total, out=unknown, where=total != 0)

    return bootstrap(statistic, len(sums))


def jackknife(leave_one_out: Sequence[float], value: float) -> Estimate:
    """Delete-a-group jackknife interval (95 %), for a statistic that no reweighting can give.

    `leave_one_out` is the statistic without each of the g groups in turn, `value` of the whole:

        value ± t(g − 1) √((g − 1)/g Σ(θᵢ − θ̄)²)

    **Raises:** `ValueError` with fewer than two groups.

    **Source:** Efron & Tibshirani 1993, chapter 11.
    """
    groups = len(leave_one_out)
    if groups < 2:
        raise ValueError(f"{groups} groups: a jackknife needs two; split the sample further")
    variance = float(np.var(leave_one_out))
    spread = math.sqrt((groups - 1) * variance)
    half = spread * float(stats.t.ppf(0.975, groups - 1))
    return Estimate(value, value - half, value + half, groups)
