"""A scaling law: how far do small models fall short of what larger ones promise?"""

import math
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from headbound import stats
from headbound.stats import Estimate

Numbers = ArrayLike | float
Place = Float[np.ndarray, "2"]  # ln A and alpha

# The constants that the paper keeps from Hoffmann et al.; A and alpha stay free.
HOFFMANN = {"B": 410.7, "beta": 0.28, "E": 1.69}
# Huber's loss turns from square to linear where a law is off by this much of ln L. Hoffmann et al.
# take 1e-3; with a handful of models that is a median, whose jackknife can't be trusted.
DELTA = 1e-2
BEGIN = np.array([5.0, 0.25])  # ln A and alpha where the search begins
REREADINGS = 100  # of losses with a reading error


class _Law(NamedTuple):
    """A fitted law: ln A and alpha, the fits behind their intervals, and how well it fits."""

    place: Place
    left_out: list[Place]  # the same without each model in turn
    reread: list[Place]  # and with noise of the reading error on the losses
    misfit: float  # root mean square of ln(predicted/observed); 0.02 means off by 2 %

    @property
    def constants(self) -> dict[str, Estimate]:
        """A and alpha, with intervals."""
        log_A, alpha = (self._estimate(itemgetter(i)) for i in (0, 1))
        return {"A": log_A.map(math.exp), "alpha": alpha}

    def promise(self, parameters: Numbers, tokens: Numbers) -> Float[np.ndarray, " models"]:
        """The losses (nats) that the law has for these numbers of parameters and tokens."""
        return _loss(self.place, parameters, tokens)

    def shortfall(self, loss: Numbers, parameters: Numbers, tokens: Numbers) -> Estimate:
        """By what fraction losses (nats) exceed the law's, on average (0.08: 8 % above it)."""

        def above(place: Place) -> float:
            ratios = np.divide(loss, _loss(place, parameters, tokens))
            return float(np.mean(ratios)) - 1

        return self._estimate(above)

    def _estimate(self, number: Callable[[Place], float]) -> Estimate:
        """A jackknife's 95 % interval over models, widened by the error of reading."""
        value = float(number(self.place))
        left_out = [float(number(place)) for place in self.left_out]
        jackknifed = stats.jackknife(left_out, value)
        half = jackknifed.high - value
        if self.reread:
            reread = [number(place) for place in self.reread]
            half = math.hypot(half, 1.96 * np.std(reread))
        return Estimate(value, value - half, value + half, jackknifed.n)


def fit(
    parameters: ArrayLike, tokens: Numbers, losses: ArrayLike, error: float = 0.0, seed: int = 0
) -> _Law:
    """Fit A and alpha of the paper's law by Huber's loss on ln L.

        L(N, T) = A/N^alpha + B/T^beta + E,  with B, beta and E of `HOFFMANN`

    Intervals are jackknifes over models. `tokens` is T of each model, or one number for all.
    `error` is the standard error of each loss (nats), such as that of reading a figure; it widens
    the intervals.

    **Raises:** `ValueError` for fewer than three models, or a number that is not positive and
    finite.

    **Source:** Hoffmann et al. 2022, equations 2 and 3; Godey et al. 2024, section 3.
    """
    data = np.array(np.broadcast_arrays(parameters, tokens, losses), float)
    for name, values in zip(("parameters", "tokens", "losses"), data, strict=True):
        sound = np.isfinite(values) & (values > 0)
        if not sound.all():
            raise ValueError(f"{name} has {values[~sound][0]}: leave that model out")
    models = data.shape[1]
    if models < 3:
        raise ValueError(f"{models} models: a scaling law needs three or more; give more sizes")
    sizes, texts, observed = data
    place = _minimum(BEGIN, *data)
    left_out = [_minimum(place, *np.delete(data, model, axis=1)) for model in range(models)]
    readings = REREADINGS if error else 0
    random = np.random.default_rng(seed)
    noise = error * random.standard_normal((readings, models))
    reread = [_minimum(place, sizes, texts, observed + off) for off in noise]
    predicted = _loss(place, sizes, texts)
    residual = np.log(predicted / observed)
    misfit = math.sqrt(np.mean(residual**2))
    return _Law(place, left_out, reread, misfit)


def _minimum(begin: Place, sizes: np.ndarray, texts: np.ndarray, losses: np.ndarray) -> Place:
    def misfit(place: Place) -> np.ndarray:
        return np.log(_loss(place, sizes, texts) / losses)

    options = {"loss": "huber", "f_scale": DELTA, "x_scale": "jac"}
    narrow = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    return least_squares(misfit, begin, **options, **narrow).x


def _loss(place: Place, parameters: Numbers, tokens: Numbers) -> Float[np.ndarray, " models"]:
    log_A, alpha = place
    B, beta, E = HOFFMANN.values()
    sizes = np.array(parameters, float, ndmin=1)
    texts = np.array(tokens, float, ndmin=1)
    of_size = np.exp(log_A - alpha * np.log(sizes))
    of_text = B / texts**beta
    return of_size + of_text + E
