"""A scaling law: how far do small models fall short of what larger ones promise?"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from headbound.stats import Estimate

Numbers = ArrayLike | float
NAMES = ("A", "alpha", "B", "beta", "E")
# The constants that the paper keeps from Hoffmann et al.; A and alpha stay free.
HOFFMANN = {"B": 410.7, "beta": 0.28, "E": 1.69}
# Where Huber's loss turns from square to linear, in log loss (Hoffmann et al., section D.2).
DELTA = 1e-3
# The search goes over ln A, alpha, ln B, beta, ln E.
LOGARITHMS = np.array([True, False, True, False, True])
LOWEST = np.array([-20.0, 0.0, -20.0, 0.0, -20.0])
HIGHEST = np.array([60.0, 3.0, 60.0, 3.0, 5.0])
STARTS = 30  # drawn from these ranges
RANGES = np.array([[0, 12], [0.05, 1.5], [0, 12], [0.05, 1.5], [-3, 1]])


class Law(NamedTuple):
    """A fitted law: its constants with intervals, the draws behind them, and how well it fits.

    `draws` holds the constants of each resample (draws, 5), in the order of `NAMES`.
    `misfit` is the root mean square of ln(predicted/observed): 0.02 means off by 2 %.
    """

    constants: dict[str, Estimate]
    draws: Float[np.ndarray, "draws 5"]
    misfit: float

    def promise(self, parameters: Numbers, tokens: Numbers) -> Float[np.ndarray, " models"]:
        """The losses (nats) that the law has for these numbers of parameters and tokens."""
        best = [self.constants[name].value for name in NAMES]
        return _loss(np.array(best), np.atleast_1d(parameters), np.atleast_1d(tokens))

    def shortfall(self, loss: Numbers, parameters: Numbers, tokens: Numbers) -> Estimate:
        """By what fraction losses (nats) exceed the law's, on average (0.08: 8 % above it)."""
        losses, n, t = (np.atleast_1d(values) for values in (loss, parameters, tokens))
        value = np.mean(losses / self.promise(n, t) - 1)
        resampled = [np.mean(losses / _loss(draw, n, t) - 1) for draw in self.draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        return Estimate(float(value), float(low), float(high), self.constants["A"].n)


def fit(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    models: ArrayLike | None = None,
    *,
    fixed: Mapping[str, float] | None = None,
    error: float = 0.0,
    resamples: int = 200,
    seed: int = 0,
) -> Law:
    r"""Fit the law by Huber's loss on ln L, from many starts.

        L(N, T) = A/N^alpha + B/T^beta + E

    The bootstrap draws models, since the checkpoints of one model are not independent.

    **Arguments:**

    - `parameters`, `tokens`, `losses`: N, T and L (nats) of each checkpoint, (checkpoints,).
    - `models`: which model each checkpoint is of. None: those with one N are one model.
    - `fixed`: constants to keep, by name. `HOFFMANN` is the paper's way; None fits all five.
    - `error`: standard error of each loss (nats), such as that of reading a figure. Every resample
      adds noise of this size.

    **Returns:** a `Law`; `n` of its estimates counts models.

    **Raises:** `ValueError` for fewer than three models, a number that is not positive and finite,
    an unknown constant; `RuntimeError` if no start converges.

    **Source:** Hoffmann et al. 2022, equations 2 and 3; Godey et al. 2024, section 3.
    """
    data = _checked(parameters, tokens, losses)
    _, member = np.unique(data[0] if models is None else np.asarray(models), return_inverse=True)
    count = len(np.unique(member))
    if count < 3:
        raise ValueError(f"{count} models: a scaling law needs three or more; give more sizes")
    kept = _kept(fixed or {})
    rng = np.random.default_rng(seed)
    best = _minimum(rng.uniform(*RANGES.T, size=(STARTS, 5)), kept, data)
    if best is None:
        raise RuntimeError(f"the scaling law did not converge from any of {STARTS} starts")
    draws = np.full((resamples, 5), np.nan)
    for draw in draws:
        chosen = _resample(member, count, rng)
        drawn = data[:, chosen]
        drawn[2] += error * rng.standard_normal(len(chosen))
        found = _minimum(best[None], kept, drawn)
        if found is not None:
            draw[:] = _constants(found)
    _check_lost(draws)
    residual = np.log(_loss(_constants(best), data[0], data[1]) / data[2])
    estimates = _estimates(_constants(best), draws, count)
    return Law(estimates, draws, math.sqrt((residual**2).mean()))


def _checked(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> np.ndarray:
    """The data as one array (3, checkpoints)."""
    named = {"parameters": parameters, "tokens": tokens, "losses": losses}
    for name, values in named.items():
        numbers = np.asarray(values, float)
        sound = np.isfinite(numbers) & (numbers > 0)
        if not sound.all():
            raise ValueError(
                f"{name} has {numbers[~sound][0]}: every value must be positive and finite; "
                "leave that checkpoint out"
            )
    return np.array([np.asarray(values, float) for values in named.values()])


def _kept(fixed: Mapping[str, float]) -> np.ndarray:
    """The fixed constants as the search has them, NaN where a constant is free."""
    if unknown := set(fixed) - set(NAMES):
        raise ValueError(f"fixed = {sorted(unknown)}: the law's constants are {', '.join(NAMES)}")
    kept = np.array([fixed.get(name, np.nan) for name in NAMES], float)
    kept[LOGARITHMS] = np.log(kept[LOGARITHMS])
    return kept


def _minimum(begin: np.ndarray, kept: np.ndarray, data: np.ndarray) -> np.ndarray | None:
    """The best of the fits that begin at these points; None where none converges."""
    free = np.isnan(kept)
    n, t, losses = data

    def misfit(values: np.ndarray) -> np.ndarray:
        place = kept.copy()
        place[free] = values
        return np.log(_loss(_constants(place), n, t) / losses)

    fits = []
    for start in begin:
        found = least_squares(
            misfit,
            np.clip(start, LOWEST, HIGHEST)[free],
            bounds=(LOWEST[free], HIGHEST[free]),
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
        )
        if found.success and np.isfinite(found.cost):
            fits.append(found)
    if not fits:
        return None
    best = kept.copy()
    best[free] = min(fits, key=lambda found: found.cost).x
    return best


def _resample(member: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of the checkpoints of models drawn with replacement, two different ones at least."""
    chosen = np.zeros(count, int)
    while len(np.unique(chosen)) < 2:  # one model alone has no slope in N
        chosen = rng.integers(count, size=count)
    return np.concatenate([np.flatnonzero(member == model) for model in chosen])


def _check_lost(draws: np.ndarray) -> None:
    lost = float(np.isnan(draws[:, 0]).mean()) if len(draws) else 0.0
    if lost > 0.1:
        raise RuntimeError(
            f"{lost:.0%} of the bootstrap's fits did not converge; fix a constant or add models"
        )


def _estimates(best: np.ndarray, draws: np.ndarray, count: int) -> dict[str, Estimate]:
    if len(draws):
        low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    else:
        low = high = np.full(5, np.nan)
    found = zip(NAMES, best, low, high, strict=True)
    return {name: Estimate(float(v), float(a), float(b), count) for name, v, a, b in found}


def _constants(place: np.ndarray) -> np.ndarray:
    """A, alpha, B, beta, E of a point of the search."""
    return np.where(LOGARITHMS, np.exp(np.where(LOGARITHMS, place, 0.0)), place)


def _loss(constants: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    A, alpha, B, beta, E = constants
    return A / parameters**alpha + B / tokens**beta + E
