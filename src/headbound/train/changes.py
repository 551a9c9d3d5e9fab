"""One change at a time in the wind tunnel: the arms of the long runs, and what each moves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest
from statsmodels.formula.api import ols
from statsmodels.regression.linear_model import RegressionResultsWrapper
from statsmodels.stats.multitest import multipletests
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import pythia, stats
from headbound.measure.rules import APART, NOTICEABLE, SEEDS, Ruling
from headbound.measure.saturation import SEEN, late_rise
from headbound.train.callback import ENTROPY_RATIO, LOSS_RISE
from headbound.train.step import Recipe

TOKENS_A_PARAMETER = 4000  # Pythia-70M's
VOCAB = 1024
COURSES = ("loss", "cosine_before_norm", "cosine_after_norm", "entropy", "entropy_centred")
# Within this of the baseline, with the whole interval, a quantity is the same.
SAME = {
    "loss_late": LOSS_RISE,
    "cosine_after_norm": 0.05,
    "entropy_late": 0.1,
    "entropy_centred_late": 0.1,
    "loss": NOTICEABLE,
}
# The quantity that shows each sign of `book/archive/predictions.yaml`.
QUANTITIES = {
    "loss": "loss_late",
    "cosine": "cosine_after_norm",
    "entropy": "entropy_late",
    "centred": "entropy_centred_late",
}


class LiftedHead(nn.Module):
    """A head of two layers, 4 d wide between them. Bent by a GELU, its logits' rank may exceed d.

    Without the bend it has as many weights, and rank d.
    """

    def __init__(self, d: int, vocab: int, bent: bool):
        super().__init__()
        self.down = nn.Linear(d, 4 * d, bias=False)
        self.up = nn.Linear(4 * d, vocab, bias=False)
        self.bent = bent
        # The inner layer keeps the size of what it is given; logits start as small as GPT-NeoX's.
        nn.init.normal_(self.down.weight, std=d**-0.5)
        nn.init.normal_(self.up.weight, std=0.02)

    def last(self, states: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor]:
        """What is multiplied to logits: states, and one matrix for all of the head that is flat."""
        if self.bent:
            return gelu(self.down(states)), self.up.weight
        return states, self.up.weight @ self.down.weight

    def forward(self, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits."""
        inner, weight = self.last(states)
        return inner @ weight.T


# An arm changes fields of `Recipe`, or has a `LiftedHead`, bent or not. All arms of a width see the
# same number of tokens, but for the one whose number of steps is said to be equal.
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "batch / 4": {"batch_size": 4},
    "batch x 8, equal tokens": {"batch_size": 128},
    "batch x 8, equal steps": {"batch_size": 128, "equal": "steps"},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "weight decay 1": {"weight_decay": 1.0},
    "rate held": {"schedule": "constant"},
    "rate held, weight decay 0": {"schedule": "constant", "weight_decay": 0.0},
    "rate x 4": {"peak": 4e-2},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "centred rows": {"centred": True},
    "z-loss": {"z_loss": 1e-4},
    "coupled Adam": {"optimizer": "coupled"},
    "momentum": {"optimizer": "sgd", "peak": 0.3, "weight_decay": 0.0},
    "tied": {"tied": True},
    "rank cut, forward": {"cut": "forward"},
    "rank cut, backward": {"cut": "backward"},
    "lifted head, two layers": {"bent": True},
    "lifted head, linear": {"bent": False},
    "10 epochs": {"epochs": 10.0},
    "100 epochs": {"epochs": 100.0},
    "unused tokens": {"unused": 0.2},
}
# Cures are tried on the arm whose loss rises late, and are compared with it.
RISING = "rank cut, backward"
CURES = {
    f"cut backward + {cure}": ARMS[RISING] | ARMS[cure]
    for cure in (
        "centred rows",
        "coupled Adam",
        "z-loss",
        "weight decay 1",
        "batch x 8, equal tokens",
    )
}
ARMS |= CURES


def recipe(
    arm: str,
    d: int,
    seed: int,
    tokens_a_parameter: float | int = TOKENS_A_PARAMETER,
    **options: Any,
) -> Recipe:
    """An arm's recipe at a width; `options` change fields of the baseline.

    **Raises:** `KeyError` for an unknown arm.
    """
    base = Recipe(d, 1, **{"vocab_size": VOCAB, "checkpoints": 60, "seed": seed, **options})
    size = pythia.count(base.layers, d, base.vocab_size)
    steps = round(tokens_a_parameter * size / base.tokens_a_step)
    change = dict(ARMS[arm])
    equal = change.pop("equal", "tokens")
    if change.pop("bent", None) is not None:
        change["variant"] = arm
    changed = replace(base, **change)
    if equal == "tokens":
        steps = round(steps * base.batch_size / changed.batch_size)
    return replace(changed, steps=steps)


def build(arm: str, config: GPTNeoXConfig) -> GPTNeoXForCausalLM:
    """An arm's model; beside a lifted head its weights start as those of the usual model."""
    model = GPTNeoXForCausalLM(config)
    if "bent" in ARMS[arm]:
        head = LiftedHead(config.hidden_size, config.vocab_size, ARMS[arm]["bent"])
        model.set_output_embeddings(head)
    return model


def signs(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run: the end of each course of `archive.run`, and how it came there.

    `…_late` is the most that `saturation.late_rise` finds, and `…_ratio` the last value over the
    least late one. `seen` says whether the loss has risen late, and `visible` how far it must rise
    to be seen.
    """
    rows = []
    for key, run in table.groupby(["arm", "hidden_size", "seed"], sort=False):
        row = dict(zip(["arm", "hidden_size", "seed"], key, strict=True))
        for name in COURSES:
            course = late_rise(run["step"], run[name])
            row[name] = course.final
            row[f"{name}_late"] = course.most
            row[f"{name}_ratio"] = course.final / course.least
        loss = late_rise(run["step"], run["loss"])
        last = run.loc[run["step"].idxmax()]
        row |= {"seen": loss.seen, "visible": SEEN * loss.noise, "mean_share": last["mean_share"]}
        rows.append(row)
    return pd.DataFrame(rows)


def appeared(signs: pd.DataFrame) -> pd.DataFrame:
    """Which of the paper's signs each run ends with.

    - `loss`: it has risen late, beyond its noise.
    - `cosine`: that of the last states after the norm is above `rules.APART`.
    - `entropy`, `centred`: that of the head, raw and without its mean row, has risen late by the
      factor `callback.ENTROPY_RATIO`. (Tenfold is more than ln d allows at these widths.)
    """
    found = {
        "loss": signs["seen"],
        "cosine": signs["cosine_after_norm"] > APART,
        "entropy": signs["entropy_ratio"] > ENTROPY_RATIO,
        "centred": signs["entropy_centred_ratio"] > ENTROPY_RATIO,
    }
    return signs[["arm", "hidden_size", "seed"]].assign(**found)


def share(found: Sequence[bool]) -> stats.Estimate:
    """The share of runs with a sign, with Clopper and Pearson's interval."""
    test = binomtest(int(sum(found)), len(found))
    interval = test.proportion_ci()
    return stats.Estimate(test.statistic, interval.low, interval.high, len(found))


def effects(
    signs: pd.DataFrame, quantities: Sequence[str], reference: str = "baseline"
) -> pd.DataFrame:
    """What each arm changes against the `reference` arm of the same width and seed.

    A quantity is fitted as an arm's effect plus that of its width and seed plus noise. An arm of
    `SEEDS` pairs or more is fitted by itself, which is the paired t test. Two pairs say too little
    about their noise: the size of the noise is taken to be one for all arms that have no more.

    **Returns:** a row an arm and quantity: value, low and high of a 95 % interval, n (the pairs),
    the degrees of `freedom` of the noise, p, `adjusted`, p after Holm's correction for all tests of
    the table, and the `outcome`. One pair has no interval: NaN.

    **Source:** Fisher's randomised blocks; Holm 1979.
    """
    width = signs["hidden_size"].astype(str)
    runs = signs.assign(block=width + "/" + signs["seed"].astype(str))
    blocks = runs.groupby("arm", sort=False)["block"].apply(set)
    pairs = blocks.map(blocks[reference].intersection).map(len).drop(reference)
    fits = pairs.index.to_series().where(pairs >= SEEDS, "all with few pairs")
    coded = f"C(arm, Treatment({reference!r}))"
    rows = []
    for _, arms in pairs.groupby(fits):
        some = runs[runs["arm"].isin([reference, *arms.index])]
        for quantity in quantities:
            fit = ols(f"{quantity} ~ {coded} + block", some).fit()
            for arm, count in arms.items():
                row = {"arm": arm, "quantity": quantity, "n": int(count)}
                rows.append(row | _effect(fit, f"{coded}[T.{arm}]", row["n"]))
    table = pd.DataFrame(rows).sort_values("arm", kind="stable", ignore_index=True)
    known = table["p"].notna()
    table["adjusted"] = np.nan
    if known.any():
        table.loc[known, "adjusted"] = multipletests(table["p"][known], method="holm")[1]
    return table.assign(outcome=[_outcome(row) for _, row in table.iterrows()])


def _effect(fit: RegressionResultsWrapper, term: str, pairs: int) -> dict[str, float]:
    """One term of a fit, without an interval if it rests on one pair."""
    low = high = p = np.nan
    if pairs > 1:
        low, high = fit.conf_int().loc[term]
        p = fit.pvalues[term]
    value = fit.params[term]
    return {"value": value, "freedom": fit.df_resid, "low": low, "high": high, "p": p}


def _outcome(effect: pd.Series) -> str:
    """What an arm does to a quantity of `SAME`: `more`, `less`, `same`, or `open`.

    It does more or less where Holm's correction leaves the effect below 5 %, and the same where
    the whole interval is within `SAME`.
    """
    if effect["adjusted"] < 0.05:
        return "more" if effect["value"] > 0 else "less"
    margin = SAME[effect["quantity"]]
    return "same" if max(-effect["low"], effect["high"]) < margin else "open"


def told(
    effects: pd.DataFrame, arm: str, quantity: str, expected: Sequence[str] = ("more", "less")
) -> tuple[stats.Estimate | None, Ruling]:
    """What an arm does to a quantity, and whether that is one of the `expected` outcomes.

    The estimate is None for an arm of one pair or none. The ruling is open with the outcome.
    """
    row = effects.query("arm == @arm and quantity == @quantity")
    if row["low"].count() == 0:
        return None, Ruling(None, "needs two pairs")
    found = row.iloc[0]
    estimate = stats.Estimate(*found[["value", "low", "high", "n"]])
    word = found["outcome"]
    agrees = None if word == "open" else word in expected
    comment = f"less its reference, nats; n counts pairs; by Holm: {word}"
    return estimate, Ruling(agrees, comment)


def parted(effects: pd.DataFrame) -> tuple[list[str], int, Ruling]:
    """Arms that move the head's entropy and not the final loss with it: geometry does not decide.

    The entropy is the raw one where it moves, else the centred one. Beside the arms come how many
    move it and have a settled loss, and a ruling: open if none is found among fewer than `SEEDS`.
    """
    outcomes = effects.pivot(index="arm", columns="quantity", values="outcome")
    moves = outcomes.where(outcomes.isin(["more", "less"]))
    entropy = moves["entropy_late"].fillna(moves["entropy_centred_late"])
    loss = outcomes["loss"]
    settled = entropy.notna() & (loss != "open")
    apart = list(loss.index[settled & (loss != entropy)])
    count = int(settled.sum())
    agrees = True if apart else None
    if not apart and count >= SEEDS:
        agrees = False
    return apart, count, Ruling(agrees, ", ".join(apart))


def judge(
    predictions: Mapping[str, Any], effects: pd.DataFrame, appeared: pd.DataFrame
) -> pd.DataFrame:
    """Each account's predictions beside what the arms did.

    **Arguments:** `predictions`: as in `book/archive/predictions.yaml`, arm, account, sign, word.

    **Returns:** a row a prediction: arm, account, sign, predicted, found, `held`, which is None
    where the prediction or the finding is open, and `tells`: whether of the accounts' predictions
    of that arm and sign some held and some failed. Arms that were not run are left out. Fewer than
    three runs of an arm leave open whether a sign appears.
    """
    outcomes = effects.set_index(["arm", "quantity"])["outcome"]
    rows = []
    for arm, of_arm in predictions.items():
        runs = appeared[appeared["arm"] == arm]
        for account, of_account in of_arm.items() if len(runs) else ():
            for sign, word in of_account.items():
                found = outcomes.get((arm, QUANTITIES[sign]), "open")
                if word in ("appears", "absent"):
                    found = _presence(runs[sign])
                held = None if "open" in (word, found) else word == found
                row = {"arm": arm, "account": account, "sign": sign, "predicted": word}
                rows.append({**row, "found": found, "held": held})
    table = pd.DataFrame(rows)
    kinds = table.groupby(["arm", "sign"])["held"].transform("nunique")
    return table.assign(tells=kinds.eq(2) & table["held"].notna())


def _presence(found: "pd.Series[bool]") -> str:
    if len(found) < SEEDS:
        return "open"
    if found.all():
        return "appears"
    return "open" if found.any() else "absent"
