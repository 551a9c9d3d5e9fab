"""A scaling law: how far do small models fall short of what larger ones promise?"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from headbound import stats
from headbound.stats import Estimate

Numbers = ArrayLike | float
Vector = Float[np.ndarray, " checkpoints"]

NAMES = ("A", "alpha", "B", "beta", "E")
# The constants that the paper keeps from Hoffmann et al.; A and alpha stay free.
HOFFMANN = {"B": 410.7, "beta": 0.28, "E": 1.69}
# Huber's loss turns from square to linear where a law is off by this much of ln L. Hoffmann et al.
# take 1e-3; with a handful of models that is a median, whose jackknife can't be trusted.
DELTA = 1e-2
# The search goes over ln A, alpha, ln B, beta, ln E.
LOGARITHMS = np.array([True, False, True, False, True])
LOWEST = np.array([-20.0, 0.0, -20.0, 0.0, -20.0])
HIGHEST = np.array([60.0, 3.0, 60.0, 3.0, 5.0])
STARTS = 30  # drawn from these ranges
RANGES = np.array([[0, 12], [0.05, 1.5], [0, 12], [0.05, 1.5], [-3, 1]])
REREADINGS = 100  # of losses with a reading error


class Law(NamedTuple):
    """A fitted law: its constants, the fits behind their intervals, and how well it fits.

    - `left_out`: the search's place (ln A, alpha, ln B, beta, ln E) without each model in turn.
    - `reread`: the same for losses that were read anew, with noise of the reading error.
    - `misfit`: root mean square of ln(predicted/observed); 0.02 means off by 2 %.
    """

    place: Float[np.ndarray, "5"]
    left_out: Float[np.ndarray, "models 5"]
    reread: Float[np.ndarray, "readings 5"]
    misfit: float

    @property
    def constants(self) -> dict[str, Estimate]:
        """The law's constants by name, with intervals."""
        found = {}
        for i, name in enumerate(NAMES):
            left_out = self.left_out[:, i].tolist()
            estimate = _interval(float(self.place[i]), left_out, self.reread[:, i].tolist())
            found[name] = estimate.map(math.exp) if LOGARITHMS[i] else estimate
        return found

    def promise(self, parameters: Numbers, tokens: Numbers) -> Vector:
        """The losses (nats) that the law has for these numbers of parameters and tokens."""
        return _loss(self.place, np.atleast_1d(parameters), np.atleast_1d(tokens))

    def shortfall(self, loss: Numbers, parameters: Numbers, tokens: Numbers) -> Estimate:
        """By what fraction losses (nats) exceed the law's, on average (0.08: 8 % above it)."""
        losses = np.atleast_1d(loss)
        n = np.atleast_1d(parameters)
        t = np.atleast_1d(tokens)

        def above(place: np.ndarray) -> float:
            return float(np.mean(losses / _loss(place, n, t))) - 1

        left_out = [above(place) for place in self.left_out]
        return _interval(above(self.place), left_out, [above(place) for place in self.reread])


def fit(
    parameters: ArrayLike,
    tokens: Numbers,
    losses: ArrayLike,
    models: ArrayLike | None = None,
    *,
    fixed: Mapping[str, float] | None = None,
    error: float = 0.0,
    seed: int = 0,
) -> Law:
    """Fit the law by Huber's loss on ln L, from many starts.

        L(N, T) = A/N^alpha + B/T^beta + E

    Intervals are jackknifes over models, since the checkpoints of one model are not independent.

    **Arguments:**

    - `parameters`, `tokens`, `losses`: N, T and L (nats) of each checkpoint, (checkpoints,). One
      number of tokens is that of all.
    - `models`: which model each checkpoint is of. None: those with one N are one model.
    - `fixed`: constants to keep, by name. `HOFFMANN` is the paper's way; None fits all five.
    - `error`: standard error of each loss (nats), such as that of reading a figure. It widens the
      intervals.

    **Returns:** a `Law`; `n` of its estimates counts models.

    **Raises:** `ValueError` for fewer than three models, a number that is not positive and finite,
    an unknown constant; `RuntimeError` if no start converges.

    **Source:** Hoffmann et al. 2022, equations 2 and 3; Godey et al. 2024, section 3.
    """
    data = _checked(parameters, tokens, losses)
    member = data[0] if models is None else np.asarray(models)
    names = np.unique(member)
    if len(names) < 3:
        raise ValueError(f"{len(names)} models: a scaling law needs three or more; give more sizes")
    kept = _kept(fixed or {})
    rng = np.random.default_rng(seed)
    place = _minimum(rng.uniform(*RANGES.T, size=(STARTS, 5)), kept, data)
    left_out = [_minimum(place[None], kept, data[:, member != name]) for name in names]
    readings = []
    for _ in range(REREADINGS if error else 0):
        reread = data.copy()
        reread[2] += error * rng.standard_normal(len(member))
        readings.append(_minimum(place[None], kept, reread))
    residual = np.log(_loss(place, data[0], data[1]) / data[2])
    misfit = math.sqrt(np.mean(residual**2))
    return Law(place, np.array(left_out), np.array(readings).reshape(-1, 5), misfit)


def _checked(parameters: ArrayLike, tokens: Numbers, losses: ArrayLike) -> np.ndarray:
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
    return np.array(np.broadcast_arrays(*named.values()), float)


def _kept(fixed: Mapping[str, float]) -> np.ndarray:
    """The fixed constants as the search has them, NaN where a constant is free."""
    unknown = set(fixed) - set(NAMES)
    if unknown:
        raise ValueError(f"fixed = {sorted(unknown)}: the law's constants are {', '.join(NAMES)}")
    kept = np.full(5, np.nan)
    for i, name in enumerate(NAMES):
        if name in fixed:
            kept[i] = math.log(fixed[name]) if LOGARITHMS[i] else fixed[name]
    return kept


def _minimum(begin: np.ndarray, kept: np.ndarray, data: np.ndarray) -> np.ndarray:
    """The best of the fits that begin at these places."""
    free = np.isnan(kept)
    n, t, losses = data

    def whole(values: np.ndarray) -> np.ndarray:
        place = kept.copy()
        place[free] = values
        return place

    def misfit(values: np.ndarray) -> np.ndarray:
        return np.log(_loss(whole(values), n, t) / losses)

    def slopes(values: np.ndarray) -> np.ndarray:
        size, text, rest = _terms(whole(values), n, t)
        columns = [size, -size * np.log(n), text, -text * np.log(t), rest]
        return (np.array(columns) / (size + text + rest))[free].T

    fits = []
    for start in begin:
        found = least_squares(
            misfit,
            np.clip(start, LOWEST, HIGHEST)[free],
            slopes,
            bounds=(LOWEST[free], HIGHEST[free]),
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
        )
        if found.success and np.isfinite(found.cost):
            fits.append(found)
    if not fits:
        raise RuntimeError(f"the scaling law did not converge from any of {len(begin)} starts")
    best = kept.copy()
    best[free] = min(fits, key=lambda found: found.cost).x
    return best


def _interval(value: float, left_out: Sequence[float], reread: Sequence[float]) -> Estimate:
    """A jackknife's 95 % interval over models, widened by the error of reading."""
    jackknifed = stats.jackknife(left_out, value)
    reading = 1.96 * float(np.std(reread)) if reread else 0.0
    half = math.hypot(jackknifed.high - value, reading)
    return Estimate(value, value - half, value + half, jackknifed.n)


def _loss(place: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> Vector:
    return sum(_terms(place, parameters, tokens))


def _terms(place: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> list[Vector]:
    """The three terms of the law, (checkpoints,) each."""
    log_A, alpha, log_B, beta, log_E = place
    size = np.exp(log_A - alpha * np.log(parameters))
    text = np.exp(log_B - beta * np.log(tokens))
    return [size, text, np.full(len(size), np.exp(log_E))]
