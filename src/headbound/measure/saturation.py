"""Is a late drop in a training curve real? A test that allows for noise and for a best picked out of many."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

PLATEAU = (
    4.0  # in squared noise: a rise at the end weaker than two standard errors is taken as level
)
TRUST = 0.03  # residuals, per checkpoint, that the given stderr is worth beside the scatter that is seen


class Saturation(NamedTuple):
    """What `detect` found: `best` … `high` in the metric's units (`drop` > 0: worse), `noise` in stderrs."""

    best_step: int
    best: float
    final: float
    drop: float
    low: float
    high: float
    p_value: float
    likelihood_ratio: float
    noise: float


def detect(
    steps: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None,
    higher_is_better: bool = True,
    resamples: int = 999,
    seed: int = 0,
) -> Saturation:
    r"""Test a curve that improves and then worsens against one that never worsens.

    R₀, R₁: weighted squares left by the best monotone and the best single-peaked fit. The likelihood ratio is
    R₀ − R₁, the statistic (R₀ − R₁)/(R₁ + k): scatter around the peaked curve is its own yardstick, and
    k = 0.03 n keeps a drop within the stderr from passing. Null: the monotone fit, level at the end as far as
    the data allow (there a chance drop is likeliest), plus noise of the stderr or, if larger, of neighbours'
    scatter. Each copy picks its own peak. The climb up to half of the gain is left out.

    **Arguments:**

    - `steps`, `values`: the curve (steps,); three checkpoints at least, in any order, each step once.
    - `stderr`: of each value (zeros are raised to the least positive one), or None: the scatter decides.
    - `resamples`, `seed`: of the bootstrap; the smallest possible p-value is 1/(`resamples` + 1).

    **Returns:** a `Saturation`; `low`, `high`: 95 % interval of the drop between these two checkpoints, noise
    included, their choice not (the p-value has that).

    **Raises:** `ValueError` for a curve too short, a repeated step, a value or stderr that is not a number.

    **Source:** Robertson, Wright & Dykstra 1988, chapter 2 (tests under order restrictions).
    """
    step, value = np.asarray(steps), np.asarray(values, float)
    if len(step) < 3 or value.shape != step.shape:
        raise ValueError(
            f"{len(step)} steps, {len(value)} values: give one value a step, three or more"
        )
    order = np.argsort(step, kind="stable")
    step, value = step[order], value[order]
    if len(again := step[1:][np.diff(step) == 0]):
        raise ValueError(f"step {again[0]} occurs twice: keep one value a step")
    if not np.isfinite(value).all():
        raise ValueError(
            f"the value at step {step[~np.isfinite(value)][0]} is not finite: leave that step out"
        )
    error = np.ones(len(step)) if stderr is None else np.asarray(stderr, float)[order]
    if not (np.isfinite(error) & (error >= 0)).all() or not error.any():
        where = step[~(np.isfinite(error) & (error > 0))][0]
        raise ValueError(
            f"no stderr at step {where}: pass stderr=None to judge by the scatter alone"
        )
    error = np.maximum(error, error[error > 0].min())
    y, floor = (value if higher_is_better else -value), 0.0 if stderr is None else 1.0
    noise = floor
    for _ in range(3):
        null = _null(y, error, noise)
        late = null >= (null[0] + null[-1]) / 2
        late[-max(3, len(y) // 2) :] = True
        noise = max(_scatter(y[late], error[late]), floor)
    draws = np.random.default_rng(seed).standard_normal((resamples, late.sum()))
    copies = np.vstack([y[late], null[late] + noise * error[late] * draws])
    ratio, rest = _compare(copies, error[late])
    statistic = ratio / (rest + max(TRUST * late.sum() * floor, np.finfo(float).tiny))
    p_value = (1 + (statistic[1:] >= statistic[0] * (1 - 1e-9)).sum()) / (resamples + 1)
    best = int(y.argmax())
    drop, half = (
        y[best] - y[-1],
        1.96 * noise * np.hypot(error[best], error[-1]) * (best < len(y) - 1),
    )
    numbers = (value[best], value[-1], drop, drop - half, drop + half, p_value, ratio[0], noise)
    return Saturation(int(step[best]), *map(float, numbers))


def _scatter(y: Float[np.ndarray, " n"], error: Float[np.ndarray, " n"]) -> float:
    """Noise in stderrs, from second differences of neighbours: the lesser of their median and mean square."""
    size = np.abs(y[1:-1] - (y[:-2] + y[2:]) / 2)
    z = size / np.sqrt(error[1:-1] ** 2 + (error[:-2] ** 2 + error[2:] ** 2) / 4)
    return float(min(np.median(z) / 0.6745 or np.inf, np.sqrt((z**2).mean())))


def _null(
    y: Float[np.ndarray, " n"], error: Float[np.ndarray, " n"], noise: float
) -> Float[np.ndarray, " n"]:
    """The monotone fit with the longest level end that costs no more than PLATEAU."""
    weight = error**-2.0
    free = isotonic_regression(y, weights=weight).x
    least = weight @ (y - free) ** 2
    for start in range(len(y)):
        head = isotonic_regression(y[:start], weights=weight[:start]).x if start else y[:0]
        fit = np.append(
            head, np.full(len(y) - start, np.average(y[start:], weights=weight[start:]))
        )
        level = start == 0 or fit[start - 1] <= fit[start]
        if level and weight @ (y - fit) ** 2 <= least + PLATEAU * noise**2:
            return fit
    return free


def _compare(
    curves: Float[np.ndarray, "curves n"], error: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " curves"], Float[np.ndarray, " curves"]]:
    """R₀ − R₁ and R₁ of each curve; a peak may lie anywhere."""
    rising, falling = _costs(curves, error), _costs(curves[:, ::-1], error[::-1])[::-1]
    peaked = (rising + falling).min(0)
    return np.where(rising[-1] - peaked > 1e-9 * rising[-1], rising[-1] - peaked, 0.0), peaked


def _costs(
    curves: Float[np.ndarray, "curves n"], error: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n+1 curves"]:
    """Squares left by a rising fit to the first 0 … n points: pool-adjacent-violators, all curves at once."""
    row = np.arange(len(curves))
    mean, weight = np.empty((2, curves.shape[1], len(curves)))
    top, cost = np.full(len(curves), -1), np.zeros((curves.shape[1] + 1, len(curves)))
    for i, value in enumerate(curves.T):
        top += 1
        mean[top, row], weight[top, row], cost[i + 1] = value, error[i] ** -2.0, cost[i]
        r = row[top > 0]
        while len(r := r[mean[top[r] - 1, r] > mean[top[r], r]]):
            t = top[r]
            a, b, u, v = mean[t - 1, r], mean[t, r], weight[t - 1, r], weight[t, r]
            cost[i + 1, r] += u * v / (u + v) * (a - b) ** 2
            mean[t - 1, r], weight[t - 1, r], top[r] = (u * a + v * b) / (u + v), u + v, t - 1
            r = r[top[r] > 0]
    return cost
