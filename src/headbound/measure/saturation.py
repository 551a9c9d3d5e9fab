"""Does a training curve get worse late? How far, and is it more than noise?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression
from scipy.stats import sem, spearmanr
from scipy.stats import t as student

from headbound.stats import Estimate

Curve = Float[np.ndarray, " n"]
Curves = Float[np.ndarray, "curves n"]
Each = Float[np.ndarray, " curves"]
EARLY = 0.1  # share of the training whose climbs and peaks are a beginning, not a late turn
SEEN = 5.0  # times the noise: one in a hundred level curves has a chance rise as great
PLATEAU = 4.0  # squared noise: a rise at the end below two standard errors is taken as level
TRUST = 0.03  # residuals, per checkpoint, that the given stderr is worth beside the scatter seen
RISING = 1e-9  # relative: below it a ratio is rounding


class _LateRise(NamedTuple):
    """How far a curve that should fall has risen again, in the curve's unit.

    Medians of three checkpoints are compared for `most`, so that one outlier makes no rise.
    """

    least_step: int
    least: float  # past the first tenth of the training
    final: float
    rise: float  # final − least
    worst_step: int  # around which
    most: float  # the curve has stood so far above an earlier value
    noise: float  # standard deviation of a checkpoint about its neighbours

    @property
    def strength(self) -> float:
        """`most`, in units of the noise."""
        return self.most / max(self.noise, np.finfo(float).tiny)

    @property
    def growth(self) -> float:
        """How many times its least value the curve ends at."""
        return self.final / max(self.least, np.finfo(float).tiny)

    @property
    def seen(self) -> bool:
        """Whether `most` exceeds what noise alone does to 99 of 100 level curves."""
        return bool(self.strength > SEEN)


def late_rise(steps: ArrayLike, values: ArrayLike) -> _LateRise:
    """The late rise of a curve in which less is better; the book's one definition.

    The first tenth of the training is left out, by steps: a curve climbs to its first peak there.

    **Raises:** `ValueError` for fewer than three checkpoints past the first tenth, a repeated step,
    a value that is not finite.
    """
    step, value, _ = _checked(steps, values)
    past = step >= EARLY * step[-1]
    step, value = step[past], value[past]
    if len(step) < 3:
        raise ValueError(f"{len(step)} checkpoints past the first tenth of training: give three")
    smooth = np.array([np.median(value[max(0, i - 1) : i + 2]) for i in range(len(value))])
    above = smooth - np.minimum.accumulate(smooth)
    least = int(value.argmin())
    worst = int(above.argmax())
    return _LateRise(
        least_step=int(step[least]),
        least=float(value[least]),
        final=float(value[-1]),
        rise=float(value[-1] - value[least]),
        worst_step=int(step[worst]),
        most=float(above[worst]),
        noise=_scatter(value, np.ones(len(value))),
    )


def together(first: ArrayLike, second: ArrayLike, window: int = 1) -> tuple[float, float]:
    """Spearman's rank correlation of two curves over one run's checkpoints: of levels, of changes.

    Levels correlate when both follow time. Changes over `window` checkpoints have lost that trend.
    """
    curves = np.array([first, second], float)
    changes = curves[:, window:] - curves[:, :-window]
    return float(spearmanr(*curves).statistic), float(spearmanr(*changes).statistic)


def late_change(curve: tuple[ArrayLike, ArrayLike], other: tuple[ArrayLike, ArrayLike]) -> Estimate:
    """How much more one curve changes late in training than another; Welch's interval.

    A curve is a pair of tokens (or steps) and values. Its late change is the mean over the last
    third of training minus that over the middle third.
    """
    thirds = []
    for tokens, values in (curve, other):
        share = np.asarray(tokens, float) / np.max(tokens)
        value = np.asarray(values, float)
        last = share > 2 / 3
        middle = (share > 1 / 3) & ~last
        thirds += [value[last], value[middle]]
    means = [third.mean() for third in thirds]
    signs = [1, -1, -1, 1]
    change = float(np.dot(signs, means))
    sizes = np.array([len(third) for third in thirds])
    errors = np.array([sem(third) for third in thirds])
    total = errors @ errors
    shares = errors**4 / (sizes - 1)
    freedom = total**2 / shares.sum()
    half = float(student.ppf(0.975, freedom) * np.sqrt(total))
    return Estimate(change, change - half, change + half, int(sizes.sum()))


class _Saturation(NamedTuple):
    """What `detect` found, in the metric's units; `drop` > 0 is worse, `noise` counts stderrs."""

    best_step: int
    best: float
    final: float
    drop: float
    low: float
    high: float
    p_value: float
    noise: float


def detect(
    steps: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike,
    higher_is_better: bool = True,
    resamples: int = 999,
    seed: int = 0,
) -> _Saturation:
    r"""Test a curve that improves and then worsens to its end against one that never worsens.

    1. The two hypotheses are shapes: monotone, and single-peaked with the peak anywhere.
    2. R₀ and R₁ are the weighted squares that the best fits of the two shapes leave over.
       The statistic is (R₀ − R₁)/(R₁ + k): improvement divided by leftover scatter, as in an
       F-test. k = 0.03 a checkpoint keeps a drop within the stderr from passing.
    3. The null is the monotone fit, level at the end as far as the data allow: chance drops are
       likeliest there. Its noise is the stderr or the scatter of neighbours, whichever is larger.
    4. The p-value is the share of simulated null curves with a greater statistic. Each picks its
       own peak. The climb up to half of the gain is left out.

    Zeros in `stderr` are raised to the least positive one. `low` and `high` are a 95 % interval of
    the drop: of the noise of two checkpoints, not of their choice, which the p-value allows for.

    **Raises:** `ValueError` for fewer than three checkpoints, a repeated step, a value or stderr
    that is not a number.

    **Source:** Robertson, Wright & Dykstra 1988, chapter 2 (tests under order restrictions).
    """
    step, value, error = _checked(steps, values, stderr)
    gain = value if higher_is_better else -value
    null, late, noise = _null_model(gain, error)
    draws = np.random.default_rng(seed).standard_normal((resamples, late.sum()))
    simulated = null[late] + noise * error[late] * draws
    ratio, rest = _compare(np.vstack([gain[late], simulated]), error[late])
    statistic = ratio / (rest + TRUST * late.sum())
    own = statistic[0] * (1 - RISING)
    as_great = (statistic[1:] >= own).sum()
    best = int(gain.argmax())
    drop = gain[best] - gain[-1]
    half = 0.0
    if best < len(gain) - 1:
        half = 1.96 * noise * np.hypot(error[best], error[-1])
    return _Saturation(
        best_step=int(step[best]),
        best=float(value[best]),
        final=float(value[-1]),
        drop=float(drop),
        low=float(drop - half),
        high=float(drop + half),
        p_value=float((1 + as_great) / (resamples + 1)),
        noise=float(noise),
    )


def _checked(
    steps: ArrayLike, values: ArrayLike, stderr: ArrayLike | None = None
) -> tuple[np.ndarray, Curve, Curve]:
    """A curve by step, with its standard errors: zeros raised to the least positive, or ones."""
    step = np.asarray(steps)
    value = np.asarray(values, float)
    if len(step) < 3 or value.shape != step.shape:
        given = f"{len(step)} steps, {len(value)} values"
        raise ValueError(f"{given}: give one value a step, three or more")
    error = np.ones(len(step)) if stderr is None else np.asarray(stderr, float)
    order = np.argsort(step, kind="stable")
    step = step[order]
    value = value[order]
    error = error[order]
    steady = np.diff(step, prepend=step[0] - 1) > 0
    known = np.isfinite(error) & (error >= 0) & error.any()
    needed = {
        "occurs once": steady,
        "has a finite value": np.isfinite(value),
        "has an stderr": known,
    }
    for what, sound in needed.items():
        if not sound.all():
            raise ValueError(f"step {step[~sound][0]}: leave it out, or see that it {what}")
    return step, value, np.maximum(error, error[error > 0].min())


def _null_model(gain: Curve, error: Curve) -> tuple[Curve, Bool[np.ndarray, " n"], float]:
    """The null's curve, the checkpoints past half of its gain, and its noise (in stderrs).

    Each needs the others, so they are found in turn, three times over.
    """
    noise = 1.0
    for _ in range(3):
        null = _level_fit(gain, error, noise)
        late = null >= (null[0] + null[-1]) / 2
        late[-max(3, len(gain) // 2) :] = True
        noise = max(_scatter(gain[late], error[late]), 1.0)
    return null, late, noise


def _scatter(y: Curve, error: Curve) -> float:
    """Noise in stderrs, from second differences of neighbours.

    The lesser of a robust and a root-mean-square estimate.
    """
    beside = y[:-2] + y[2:]
    off = y[1:-1] - beside / 2
    squares = error**2
    around = squares[:-2] + squares[2:]
    variance = squares[1:-1] + around / 4
    deviation = np.sqrt(variance)
    z = np.abs(off) / deviation
    robust = float(np.median(z)) / 0.6745
    squares = z**2
    whole = float(np.sqrt(squares.mean()))
    return min(robust or whole, whole)


def _level_fit(y: Curve, error: Curve, noise: float) -> Curve:
    """The monotone fit with the longest level end that costs no more than PLATEAU."""
    weight = error**-2.0
    free = isotonic_regression(y, weights=weight).x
    allowed = weight @ (y - free) ** 2 + PLATEAU * noise**2
    for start in range(len(y)):
        fit = np.full(len(y), np.average(y[start:], weights=weight[start:]))
        if start:
            fit[:start] = isotonic_regression(y[:start], weights=weight[:start]).x
        monotone = np.diff(fit).min() >= 0
        cost = weight @ (y - fit) ** 2
        if monotone and cost <= allowed:
            return fit
    return free


def _compare(curves: Curves, error: Curve) -> tuple[Each, Each]:
    """R₀ − R₁ and R₁ of each curve; a peak may lie anywhere."""
    rising = _rising_costs(curves, error)
    backwards = _rising_costs(np.flip(curves, 1), np.flip(error))
    falling = np.flip(backwards, 0)
    peaked = (rising + falling).min(0)
    gained = rising[-1] - peaked
    gained[gained <= RISING * rising[-1]] = 0.0
    return gained, peaked


def _rising_costs(curves: Curves, error: Curve) -> Float[np.ndarray, "n+1 curves"]:
    """Squares left by the best rising fit to the first 0 … n points, all curves at once.

    Pool-adjacent-violators keeps a stack of pools for each curve, their means rising to the top.
    A new point is a pool of its own. While it lies below the pool under it, the two merge.
    """
    count, length = curves.shape
    every = np.arange(count)
    mean = np.full((length + 1, count), -np.inf)  # at the bottom what nothing lies below
    weight = np.empty((length + 1, count))
    top = np.zeros(count, int)  # place of each stack's uppermost pool
    cost = np.zeros((length + 1, count))
    for place in range(length):
        top += 1
        mean[top, every] = curves[:, place]
        weight[top, every] = error[place] ** -2.0
        cost[place + 1] = cost[place]
        violating = every[mean[top - 1, every] > mean[top, every]]
        while len(violating):
            cost[place + 1, violating] += _merge(mean, weight, top, violating)
            upper = top[violating]
            still = mean[upper - 1, violating] > mean[upper, violating]
            violating = violating[still]
    return cost


def _merge(mean: np.ndarray, weight: np.ndarray, top: np.ndarray, curves: np.ndarray) -> Each:
    """Merge the two uppermost pools of these curves; returns the squares that each merger costs."""
    upper = top[curves]
    lower = upper - 1
    above = weight[upper, curves]
    below = weight[lower, curves]
    both = above + below
    gap = mean[lower, curves] - mean[upper, curves]
    mean[lower, curves] -= gap * above / both
    weight[lower, curves] = both
    top[curves] = lower
    return above * below / both * gap**2
