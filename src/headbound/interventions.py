"""One change at a time in the wind tunnel: other heads, other training, and what each change moves."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from joblib import Parallel, delayed
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, logsigmoid
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import device, progress, suite


class Factored(nn.Module):
    """W = A·B through an inner width k: rank at most min(k, d), whatever k; with an `activation` no such limit.

    The inner width is `ratio` times the hidden size: below one it cuts the rank without touching the width, above
    one it only adds parameters, unless an activation stands between the two factors.
    """

    def __init__(self, d: int, vocab: int, ratio: float, activation: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        inner = max(1, round(ratio * d))
        self.down, self.up, self.activation = _linear(d, inner), _linear(inner, vocab, 0.02), activation

    @property
    def weight(self) -> Float[Tensor, "vocab d"] | None:
        """The head as one matrix, or None where there is none."""
        return None if self.activation else self.up.weight @ self.down.weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits."""
        inner = self.down(hidden_states)
        return self.up(self.activation(inner) if self.activation else inner)


class SigSoftmax(nn.Module):
    """p ∝ exp(z)·sigmoid(z), z = W h: a softmax of the logits z + ln sigmoid(z), without a new parameter.

    **Source:** Kanai et al. 2018, section 3.
    """

    def __init__(self, d: int, vocab: int):
        super().__init__()
        self.weight = _linear(d, vocab, 0.02).weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logarithms of probabilities, up to a constant a row."""
        z = hidden_states @ self.weight.T
        return z + logsigmoid(z)


class MixtureOfSoftmaxes(nn.Module):
    """p = Σ_k π_k softmax(W tanh(U_k h)), π = softmax(P h): the components share W, the mixture is of probabilities.

    **Source:** Yang et al. 2018, section 2.3.
    """

    def __init__(self, d: int, vocab: int, components: int = 2):
        super().__init__()
        self.prior, self.latent = _linear(d, components), _linear(d, components * d)
        self.weight = _linear(d, vocab, 0.02).weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities."""
        prior = log_softmax(self.prior(hidden_states), -1)
        states = self.latent(hidden_states).tanh().unflatten(-1, (prior.shape[-1], -1))
        return (log_softmax(states @ self.weight.T, -1) + prior[..., None]).logsumexp(-2)


# A change is made of arguments of `suite.train`, and `head`: from hidden size and vocabulary to a module.
INTERVENTIONS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "head of rank d/2": {"head": partial(Factored, ratio=0.5)},
    "head four times as wide": {"head": partial(Factored, ratio=4.0)},
    "two-layer head": {"head": partial(Factored, ratio=4.0, activation=gelu)},
    "sigsoftmax": {"head": SigSoftmax},
    "mixture of softmaxes": {"head": MixtureOfSoftmaxes},
    "no weight decay": {"weight_decay": 0.0},
    "ten times the weight decay": {"weight_decay": 1.0},
    "batches of a quarter": {"batch_size": 4},
    "batches four times as large": {"batch_size": 64},
    "constant learning rate": {"schedule": "constant"},
}


QUANTITIES = ("loss", "loss_rise", "anisotropy", "head_entropy", "head_rise", "output_entropy", "output_rise")


def with_head(config: GPTNeoXConfig, head: Callable[[int, int], nn.Module]) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with another head, all its other weights those of the same seed's model with the usual one."""
    model = GPTNeoXForCausalLM(config)
    model.set_output_embeddings(head(config.hidden_size, config.vocab_size))
    return model


def sweep(
    interventions: Mapping[str, Mapping[str, Any]],
    hidden_sizes: Sequence[int],
    steps: int,
    replicates: int = 3,
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> pd.DataFrame:
    """Train every intervention at every width, `replicates` times, all on as many tokens; kept by `suite.train`.

    An intervention and the baseline share their seeds (first weights, order of the text); no two widths do, so that
    the pairs of runs are independent of each other.

    **Arguments:**

    - `interventions`: name to change, as in `INTERVENTIONS`. A head is kept under its name: a changed head needs a
      new one.
    - `steps`, `batch_size`: of the baseline; where a change has other batches, steps make up for it.
    - `options`: of `suite.train`, for all.

    **Returns:** `suite.train`'s rows with a column `intervention`.

    **Raises:** `ValueError` where the tokens can't be equal, and as `suite.train` does.
    """
    jobs = []
    for name, change in interventions.items():
        arguments = {**options, "batch_size": batch_size, **change}
        now, over = divmod(steps * batch_size, arguments["batch_size"])
        if over or not now:
            raise ValueError(
                f"batch_size = {arguments['batch_size']} of {name!r}: {steps} steps of {batch_size} windows are not "
                "a whole number of such batches; choose a divisor"
            )
        if head := arguments.pop("head", None):
            arguments |= {"build": partial(with_head, head=head), "variant": re.sub(r"\W+", "-", name)}
        for i, d in enumerate(hidden_sizes):
            seeds = range(seed + i * replicates, seed + (i + 1) * replicates)
            jobs += [delayed(_named)(name, [d], now, seed=one, **arguments) for one in seeds]
    workers = -1 if device.pick(options.get("where", "auto")).type == "cpu" else 1
    done = Parallel(workers, return_as="generator")(jobs)
    return pd.concat(progress.bar(done, "runs", len(jobs)), ignore_index=True)


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run: what the last checkpoint is like, and what rose late.

    `loss`, `anisotropy` (after the norm) and `head_entropy` (singular entropy of the head, NaN if it is not one
    matrix) are `suite.measure`'s. `output_entropy` is ln(d / `output_rank`): for a linear head the outputs' singular
    entropy over d dimensions, at least 0; below 0 only where the outputs have more dimensions than the hidden state.
    `loss_rise`: the last loss minus the best one before. `head_rise`, `output_rise`: the last entropy minus the
    least one after the early peak.
    """
    rows = []
    for (name, d, seed), run in table.groupby(["intervention", "hidden_size", "seed"], sort=False):
        run, last = run.sort_values("step"), run.loc[run["step"].idxmax()]
        output = np.log(d / run["output_rank"].to_numpy())
        head = run["singular_entropy"].to_numpy()
        rise = last["loss"] - run["loss"].iloc[:-1].min()
        values = (last["loss"], rise, last["anisotropy_after_norm"], head[-1], _turn(head), output[-1], _turn(output))
        keys = {"intervention": name, "hidden_size": d, "seed": seed, "parameters": last["parameters"]}
        rows.append({**keys, **dict(zip(QUANTITIES, map(float, values), strict=True))})
    return pd.DataFrame(rows)


def effects(outcomes: pd.DataFrame, against: str = "baseline") -> pd.DataFrame:
    """What each intervention changes: differences to the run of the same width and seed, averaged over widths.

    Each width keeps a mean of its own, so only the scatter of seeds counts; t intervals with Welch's degrees of
    freedom. `adjusted` are the p-values after Holm's correction for all tests of the table.

    **Returns:** a row an intervention and quantity: value, low, high, n (pairs), p, adjusted.

    **Raises:** `ValueError` if a run has no partner.

    **Source:** Holm 1979; Satterthwaite 1946 for the degrees of freedom.
    """
    runs = outcomes.set_index(["intervention", "hidden_size", "seed"])[list(QUANTITIES)]
    changes = []
    for name in dict.fromkeys(outcomes["intervention"]):
        if name == against:
            continue
        if not runs.loc[name].index.sort_values().equals(runs.loc[against].index.sort_values()):
            raise ValueError(f"{name!r} and {against!r} have other widths or seeds; run both with the same ones")
        pairs = (runs.loc[name] - runs.loc[against]).groupby("hidden_size")
        variance = pairs.var().to_numpy() / pairs.size().to_numpy()[:, None]
        parts = (variance**2 / (pairs.size().to_numpy()[:, None] - 1).clip(min=1)).sum(0)
        change = pairs.mean().mean(skipna=False).rename("value").rename_axis("quantity").reset_index()
        change["error"] = np.maximum(np.sqrt(variance.sum(0)) / len(variance), 1e-12)
        change["freedom"] = variance.sum(0) ** 2 / np.maximum(parts, 1e-300)
        changes.append(change.assign(intervention=name, n=pairs.size().sum()))
    table = pd.concat(changes, ignore_index=True)
    value, error, freedom = (table.pop(name) for name in ("value", "error", "freedom"))
    half = error * student.ppf(0.975, freedom.clip(lower=1))
    table = table.assign(value=value, low=value - half, high=value + half)
    table["p"] = 2 * student.sf(abs(value) / error, freedom.clip(lower=1))
    order = table["p"].dropna().sort_values()
    table["adjusted"] = (order * np.arange(len(order), 0, -1)).cummax().clip(upper=1)
    return table


def _named(name: str, *arguments: Any, **options: Any) -> pd.DataFrame:
    return suite.train(*arguments, **options).assign(intervention=name)


def _turn(entropy: Float[np.ndarray, " checkpoints"]) -> float:
    return entropy[-1] - entropy[entropy.argmax() :].min()


def _linear(width: int, to: int, deviation: float | None = None) -> nn.Linear:
    # As in GPT-NeoX, 0.02 for what makes logits; inner maps keep the size of what they are given.
    layer = nn.Linear(width, to, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5 if deviation is None else deviation)
    return layer
