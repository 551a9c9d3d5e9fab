"""A scaling law: how far do small models fall short of what larger ones promise?"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import huber, logsumexp, softmax

from headbound.stats import Estimate

NAMES = ("A", "alpha", "B", "beta", "E")
HOFFMANN = {
    "B": 410.7,
    "beta": 0.28,
    "E": 1.69,
}  # the constants that the paper keeps; A and alpha stay free
DELTA = 1e-3  # where Huber's loss turns from square to linear, in log loss (Hoffmann et al., section D.2)
BOUNDS = [(-20, 60), (0, 3), (-20, 60), (0, 3), (-20, 5)]  # of ln A, alpha, ln B, beta, ln E
RANGES = np.array([[0, 12], [0.05, 1.5], [0, 12], [0.05, 1.5], [-3, 1]])  # of starts


class Law(NamedTuple):
    """Fitted constants with intervals, their bootstrap `draws` (draws, 5; NAMES' order) and the `misfit`.

    `misfit` is the root mean square of ln(predicted/observed): 0.02 means that the law is off by 2 %.
    """

    constants: dict[str, Estimate]
    draws: Float[np.ndarray, "draws 5"]
    misfit: float

    def shortfall(self, loss: float, parameters: float, tokens: float) -> Estimate:
        """Fraction by which `loss` (nats) exceeds A/N^alpha + B/T^beta + E (0.08: 8 % above it)."""
        value, *draws = (
            loss / self._loss(c, parameters, tokens) - 1 for c in (self._best(), *self.draws)
        )
        low, high = np.nanquantile(draws, [0.025, 0.975])
        return Estimate(value, float(low), float(high), self.constants["A"].n)

    def _best(self) -> list[float]:
        return [self.constants[name].value for name in NAMES]

    @staticmethod
    def _loss(constants: ArrayLike, parameters: float, tokens: float) -> float:
        A, alpha, B, beta, E = constants
        return A / parameters**alpha + B / tokens**beta + E


def fit(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    models: ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
    starts: int = 30,
    resamples: int = 200,
    seed: int = 0,
) -> Law:
    r"""Fit L(N, T) = A/N^alpha + B/T^beta + E by Huber's loss on ln L, from many starts.

    **Arguments:**

    - `parameters`, `tokens`, `losses`: N, T and L (nats) of each checkpoint, (checkpoints,).
    - `models`: which model each checkpoint is of; the bootstrap draws models, whose checkpoints are not
      independent. None: those with one N are one model.
    - `fixed`: constants to keep, by name; `HOFFMANN` is the paper's way, None fits all five.

    **Returns:** a `Law`; `n` of its estimates counts models.

    **Raises:** `ValueError` for fewer than three models, a number that is not positive and finite, an unknown
    constant; `RuntimeError` if no start converges.

    **Source:** Hoffmann et al. 2022, equations 2 and 3; Godey et al. 2024, section 3.
    """
    data = [np.asarray(values, float) for values in (parameters, tokens, losses)]
    for name, values in zip(("parameters", "tokens", "losses"), data, strict=True):
        if not (np.isfinite(values) & (values > 0)).all():
            bad = values[~(np.isfinite(values) & (values > 0))][0]
            raise ValueError(
                f"{name} has {bad}: every value must be positive and finite; leave that checkpoint out"
            )
    _, member = np.unique(data[0] if models is None else np.asarray(models), return_inverse=True)
    count = int(member.max()) + 1 if len(member) else 0
    if count < 3:
        raise ValueError(f"{count} models: a scaling law needs three or more; give more sizes")
    if unknown := set(fixed or {}) - set(NAMES):
        raise ValueError(f"fixed = {sorted(unknown)}: the law's constants are {', '.join(NAMES)}")
    keep = np.array([(fixed or {}).get(name, np.nan) for name in NAMES], float)
    with np.errstate(divide="ignore"):
        keep[[0, 2, 4]] = np.log(keep[[0, 2, 4]])
    rng = np.random.default_rng(seed)
    begin = rng.uniform(*RANGES.T, size=(starts, 5))
    best = _minimum(begin, keep, *np.log(data), np.ones(len(member)))
    if best is None:
        raise RuntimeError(
            f"the scaling law did not converge from any of {starts} starts; raise `starts`"
        )
    draws = np.full((resamples, 5), np.nan)
    for row in draws:
        while len(np.unique(chosen := rng.integers(count, size=count))) < 2:
            pass  # one model alone has no slope in N
        weights = np.bincount(chosen, minlength=count)[member]
        if (found := _minimum(best[None], keep, *np.log(data), weights)) is not None:
            row[:] = found
    lost = float(np.isnan(draws[:, 0]).mean()) if resamples else 0.0
    if lost > 0.1:
        raise RuntimeError(
            f"{lost:.0%} of the bootstrap's fits did not converge; fix a constant or add models"
        )
    residual = _predict(best, *np.log(data[:2]))[0] - np.log(data[2])
    for values in (best, *draws):
        values[[0, 2, 4]] = np.exp(values[[0, 2, 4]])
    low, high = (
        np.nanquantile(draws, [0.025, 0.975], axis=0) if resamples else np.full((2, 5), np.nan)
    )
    found = zip(NAMES, best, low, high, strict=True)
    constants = {name: Estimate(float(v), float(a), float(b), count) for name, v, a, b in found}
    return Law(constants, draws, math.sqrt((residual**2).mean()))


def _predict(x: np.ndarray, n: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln L of constants (ln A, alpha, ln B, beta, ln E), and the shares of the three terms in L."""
    terms = np.stack([x[0] - x[1] * n, x[2] - x[3] * t, np.full_like(n, x[4])])
    return logsumexp(terms, axis=0), softmax(terms, axis=0)


def _minimum(begin, keep, n, t, loss, weights) -> np.ndarray | None:
    free = np.isnan(keep)

    def objective(values):
        x = np.where(free, 0.0, keep)
        x[free] = values
        predicted, (p, q, r) = _predict(x, n, t)
        pull = weights * np.clip(predicted - loss, -DELTA, DELTA) / DELTA**2
        slope = np.array([pull @ p, -pull @ (p * n), pull @ q, -pull @ (q * t), pull @ r])
        return float(weights @ huber(DELTA, predicted - loss)) / DELTA**2, slope[free]

    options = {"maxiter": 3000, "maxfun": 6000}
    bounds = [pair for pair, loose in zip(BOUNDS, free, strict=True) if loose]
    search = partial(
        minimize, objective, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    runs = [search(start[free]) for start in begin]
    runs = [run for run in runs if run.success and np.isfinite(run.fun)]
    if not runs:
        return None
    x = keep.copy()
    x[free] = min(runs, key=lambda run: run.fun).x
    return x
