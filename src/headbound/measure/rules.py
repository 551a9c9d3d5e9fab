"""The book's verdict rules: what the paper says, as functions of curves.

Tests run them on the paper's own curves and on counter-examples. Each rule says how far its threshold
could move before its word changes.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from headbound.measure.saturation import SEEN, LateRise, late_rise

TENFOLD = 10.0  # an order of magnitude, which is what the paper's spectra rise by
APART = 0.5  # mean cosine between "nearly isotropic" and "highly anisotropic"
NOTICEABLE = 0.05  # of perplexity
STEEPER = 3.0  # a curve's slope beyond a bend, over its slope before it

Curve = tuple[ArrayLike, ArrayLike]


class Ruling(NamedTuple):
    """What a rule says of a claim (None where it can't tell), and how it came to that."""

    agrees: bool | None
    comment: str


def loss_rises(rises: Mapping[str, LateRise], small: Collection[str]) -> Ruling:
    """Section 3: the small models' loss rises late in training.

    Each small model's late rise must be seen, and no larger one's. Without a small model, None.
    """
    seen = [name for name, rise in rises.items() if rise.seen]
    strengths = {name: rise.strength for name, rise in rises.items()}
    comment = "worst late rise over noise: " + _listed(strengths, ".1f")
    comment += f"; {_room(strengths, SEEN)}"
    return Ruling(_split(rises, seen, small), comment)


def spectrum_saturates(entropies: Mapping[str, Curve], small: Collection[str]) -> Ruling:
    """Section 4.2: the small models' singular entropy rises late by an order of magnitude.

    From its least value past the first tenth of training to its end it must grow tenfold, and no
    larger model's may.
    """
    factors = {}
    for name, (steps, values) in entropies.items():
        rise = late_rise(steps, values)
        factors[name] = rise.final / rise.least
    grown = [name for name, factor in factors.items() if factor >= TENFOLD]
    comment = "end over least: " + _listed(factors, ".3g") + f"; {_room(factors, TENFOLD)}"
    return Ruling(_split(factors, grown, small), comment)


def last_layers_part(cosines: Mapping[str, float], small: Collection[str]) -> Ruling:
    """Section 4.1: a suite's small models have highly anisotropic last layers, larger ones do not.

    High is a mean cosine above 0.5.
    """
    high = [name for name, cosine in cosines.items() if cosine > APART]
    return Ruling(_split(cosines, high, small), _room(cosines, APART))


def rank_costs(ranks: ArrayLike, losses: ArrayLike, up_to: int = 512) -> Ruling:
    """Section 5.1: a head of a rank well below 1,000 noticeably raises perplexity.

    The full head is the one of the greatest rank. Every lower rank up to 512 must cost 5 % of
    perplexity or more. None where no such rank was measured.
    """
    rank = np.asarray(ranks, float)
    loss = np.asarray(losses, float)
    cost = np.exp(loss - loss[rank.argmax()]) - 1
    well_below = (rank <= up_to) & (rank < rank.max())
    if not well_below.any():
        return Ruling(None, f"no rank up to {up_to} was measured below the full one")
    least = cost[well_below].min()
    comment = f"least cost up to rank {up_to}: {least:.1%} of perplexity; noticeable from 5 %"
    return Ruling(bool(least >= NOTICEABLE), comment)


def bends_at(errors: ArrayLike, losses: ArrayLike, bend: float = 0.6) -> Ruling:
    """Figure 8: the loss grows slowly with the head's W-error, and faster once that exceeds 0.6.

    The mean slope beyond the bend must be three times the slope before it.
    """
    order = np.argsort(errors)
    error = np.asarray(errors, float)[order]
    loss = np.asarray(losses, float)[order]
    if not error[0] < bend < error[-1]:
        return Ruling(
            None, f"W-errors from {error[0]:.2f} to {error[-1]:.2f} do not enclose {bend}"
        )
    there = np.interp(bend, error, loss)
    before = (there - loss[0]) / (bend - error[0])
    beyond = (loss[-1] - there) / (error[-1] - bend)
    steeper = beyond / before if before > 0 else np.inf
    comment = f"slope beyond {bend} over slope before: {steeper:.1f}; asked: {STEEPER:.0f}"
    return Ruling(bool(steeper >= STEEPER and beyond > 0), comment)


def halved(dimensions: ArrayLike, errors: ArrayLike) -> float:
    """The number of dimensions at which a falling W-error is 0.5; NaN if it ends above."""
    error = np.asarray(errors, float)
    if error.min() > 0.5:
        return float("nan")
    return float(np.interp(-0.5, -error, np.asarray(dimensions, float)))


def _split(models: Collection[str], shown: Collection[str], small: Collection[str]) -> bool | None:
    """Whether just the small ones of these models show a sign."""
    asked = set(small) & set(models)
    if not asked:
        return None
    return set(shown) == asked


def _room(values: Mapping[str, float], threshold: float) -> str:
    """Between which two values a threshold could lie without a change."""
    below = max((v for v in values.values() if v < threshold), default=-np.inf)
    above = min((v for v in values.values() if v >= threshold), default=np.inf)
    words = f"the threshold {threshold:g} could lie anywhere"
    words += f" from {below:.3g}" if np.isfinite(below) else ""
    return words + (f" to {above:.3g}" if np.isfinite(above) else "")


def _listed(values: Mapping[str, float], style: str) -> str:
    return ", ".join(f"{name} {value:{style}}" for name, value in values.items())
