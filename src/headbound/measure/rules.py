"""The book's verdict rules: what the paper says, as functions of curves.

Tests run them on the paper's own curves and on counter-examples. Each rule says how far its
threshold could move before its word changes.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from headbound.measure.saturation import SEEN
from headbound.stats import Estimate

APART = 0.5  # mean cosine between "nearly isotropic" and "highly anisotropic"
REACHED = {"worst late rise over noise": SEEN, "end over least": 10.0, "mean cosine": APART}
# Small models have fewer parameters than this; their values are above the second, others' up to the
# third number. Any cut from 0.57 to 4.67 nats parts the entropies.
ENDS = {"mean cosine": (200e6, 0.56, 0.20), "singular entropy": (410e6, 1.6, 1.6)}
NOTICEABLE = 0.05  # of perplexity
SEEDS = 3  # runs of a width; with fewer, a missing sign refutes nothing
TURN = 67_000  # steps: the latest turn of Figure 5's entropies, Pythia-70M's
KNEE = 1000  # the rank below which heads lose noticeably
STEEPER = 3.0  # a curve's slope beyond a bend, over its slope before it
SLOW = 0.25  # nats, the most that a loss may have grown up to there


class Ruling(NamedTuple):
    """What a rule says of a claim (None where it can't tell), and how it came to that."""

    agrees: bool | None
    comment: str

    def after(self, runs: pd.DataFrame) -> "Ruling":
        """The ruling after runs, given as rows of hidden_size, seed and step.

        A sign that is missing refutes the paper only after runs enough and long enough: some width
        needs three runs that each took as many steps as Pythia's turn.
        """
        steps = runs.groupby(["hidden_size", "seed"])["step"].max()
        long_runs = (steps >= TURN).groupby("hidden_size").sum()
        most = long_runs.max()
        if self.agrees is not False or most >= SEEDS:
            return self
        told = f"open: {most} of {SEEDS} runs of one width took {TURN:,} steps"
        return Ruling(None, f"{told}; {self.comment}")

    def if_settled(self, moved: float) -> "Ruling":
        """The ruling on a curve; None if half the text `moved` its perplexity by 5 % or more."""
        if abs(moved) < NOTICEABLE:
            return self
        told = f"half the training text moves perplexity by {moved:+.0%}: more is needed"
        return Ruling(None, told)


def just_the_small(
    what: str, values: Mapping[str, float], small: Collection[str], threshold: float | None = None
) -> Ruling:
    """Just the small models' values reach a threshold, and no larger model's.

    The threshold follows from `what` they are, unless it is given:

    - `worst late rise over noise` of the loss: seen (section 3);
    - `end over least` of the singular entropy, past the first tenth of training: an order of
      magnitude (section 4.2). A head of few dimensions needs a lower one: ln d is the most;
    - `mean cosine` of the last layer: 0.5 (section 4.1).

    The comment says between which values the threshold could lie.
    """
    asked = set(small) & set(values)
    if not asked:
        return Ruling(None, "none of the claim's models was measured")
    least = REACHED[what] if threshold is None else threshold
    reached = {name: value for name, value in values.items() if value >= least}
    below = [value for value in values.values() if value < least]
    listed = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    room = f"the threshold {least:g} could lie anywhere"
    if below:
        room += f" from {max(below):.3g}"
    if reached:
        room += f" to {min(reached.values()):.3g}"
    return Ruling(set(reached) == asked, f"{what}: {listed}; {room}")


def fits_size(what: str, parameters: float, measured: Estimate) -> bool | None:
    """Whether just a small model has a high value at the end of training: Figures 2 and 5.

    `what` is a key of `ENDS`. None where the interval does not lie in the upper or in the lower
    range. By Figure 5 not every small model's entropy need be high, so a low one is open too.
    """
    below, high, low = ENDS[what]
    small = parameters < below
    if measured.above(high):
        return small
    if measured.above(low) is not False or (small and what == "singular entropy"):
        return None
    return not small


def rank_costs(ranks: ArrayLike, losses: ArrayLike, up_to: int = 512) -> Ruling:
    """Section 5.1: every rank well below 1,000 costs 5 % of perplexity or more.

    The cost is against the greatest rank. None where no lower rank `up_to` there was measured.
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


def knee_near(knee: Estimate, width: int) -> Ruling:
    """Section 5.1: the knee lies within a factor of 2 of rank 1,000. None for a narrower model."""
    if width <= KNEE:
        return Ruling(None, f"d = {width}: a knee at 1,000 is out of reach")
    factor = max(knee.value / KNEE, KNEE / knee.value)
    return Ruling(factor <= 2, f"a factor of {factor:.2f} from 1,000; up to 2 is called the same")


def bends_at(errors: ArrayLike, losses: ArrayLike, bend: float = 0.6) -> Ruling:
    """Figure 8: the loss grows slowly with the head's W-error, and faster once that exceeds 0.6.

    The mean slope beyond the bend must be three times the slope before it, and the growth up to
    the bend a quarter of a nat at most.
    """
    order = np.argsort(errors)
    error = np.asarray(errors, float)[order]
    loss = np.asarray(losses, float)[order]
    first = error[0]
    last = error[-1]
    if not first < bend < last:
        return Ruling(None, f"W-errors from {first:.2f} to {last:.2f} do not enclose {bend}")
    there = np.interp(bend, error, loss)
    grown = there - loss[0]
    before = grown / (bend - first)
    rest = loss[-1] - there
    beyond = rest / (last - bend)
    steeper = beyond / before if before > 0 else np.inf
    slopes = f"slope beyond {bend} over slope before: {steeper:.1f}; asked: {STEEPER:.0f}"
    growth = f"loss grown up to there: {grown:.2f} nats; slow up to {SLOW} (the paper: 0.09)"
    agrees = beyond > 0 and steeper >= STEEPER and grown <= SLOW
    return Ruling(bool(agrees), f"{slopes}; {growth}")


def who_drops(
    found: Collection[str], claimed: Collection[str], drops: Mapping[str, Estimate], size: float
) -> Ruling:
    """The models that drop are those of the claim.

    Left open where a model that is missing could have dropped by `size`, the paper's own example,
    without being found.
    """
    missing = [name for name in claimed if name not in found]
    unseen = [name for name in missing if drops[name].high > size]
    others = set(found) - set(claimed)
    if others or (missing and not unseen):
        return Ruling(False, f"claimed: {', '.join(claimed)}")
    if unseen:
        return Ruling(None, f"a drop of {size:g} could be missed in {', '.join(unseen)}")
    return Ruling(True, "just the models of the claim")


def holds(measured: Estimate, claim: float) -> Ruling:
    """A number of the paper's lies within the interval; left open where zero does too."""
    if np.isnan(measured[:3]).any():
        return Ruling(None, "the number has no interval")
    inside = measured.low <= claim <= measured.high
    if inside and measured.low <= 0 <= measured.high:
        return Ruling(None, "the interval holds zero as well")
    where = "below" if claim < measured.low else "above"
    return Ruling(bool(inside), f"{'inside' if inside else where} the 95 % interval")


def positive(measured: Estimate) -> Ruling:
    """The interval lies above zero; left open where it holds zero or is unknown."""
    if np.isnan(measured.value):
        return Ruling(None, "nothing in common to compare, so there is no such number")
    agrees = measured.above(0.0)
    if agrees is None:
        return Ruling(None, "the interval holds zero, or there is none")
    return Ruling(agrees, "the interval lies on one side of zero")


def within(values: ArrayLike, low: float, high: float, unit: float = 0.0) -> Ruling:
    """Numbers read off a figure lie in a range, whose ends may be rounded to a unit."""
    least = float(np.min(values))
    most = float(np.max(values))
    low -= unit / 2
    high += unit / 2
    comment = f"{least:,.5g} to {most:,.5g}; allowed: {low:,.5g} to {high:,.5g}"
    return Ruling(low <= least and most <= high, comment)
