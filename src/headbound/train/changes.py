"""One change at a time in the wind tunnel: other heads, other training, and what each change moves."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from joblib import delayed
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, logsigmoid
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import device, progress
from headbound.train import tunnel

QUANTITIES = (
    "loss",
    "loss_late",
    "anisotropy",
    "head_entropy",
    "head_late",
    "output_entropy",
    "output_late",
)


class Factored(nn.Module):
    """W = A·B, inner width k = `ratio` · d: of rank min(d, k) at most; with an `activation` in between, of rank k."""

    def __init__(
        self, d: int, vocab: int, ratio: float, activation: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        inner = max(1, round(ratio * d))
        self.down, self.up, self.activation = (
            _linear(d, inner),
            _linear(inner, vocab, 0.02),
            activation,
        )

    @property
    def weight(self) -> Float[Tensor, "vocab d"] | None:
        """The head as one matrix, None where it is not one."""
        return None if self.activation else self.up.weight @ self.down.weight

    def factors(
        self, hidden_states: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch inner"], Float[Tensor, "vocab inner"]]:
        """What is multiplied last: the inner states and A."""
        inner = self.down(hidden_states)
        return self.activation(inner) if self.activation else inner, self.up.weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits."""
        inner, weight = self.factors(hidden_states)
        return inner @ weight.T


class SigSoftmax(nn.Module):
    """p ∝ exp(z)·sigmoid(z), z = W h: the softmax of z + ln sigmoid(z), without a new parameter (Kanai et al. 2018)."""

    def __init__(self, d: int, vocab: int):
        super().__init__()
        self.weight = _linear(d, vocab, 0.02).weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities up to a constant a row."""
        z = hidden_states @ self.weight.T
        return z + logsigmoid(z)


class MixtureOfSoftmaxes(nn.Module):
    """p = Σ_k π_k softmax(W tanh(U_k h)), π = softmax(P h): a mixture of probabilities (Yang et al. 2018)."""

    def __init__(self, d: int, vocab: int, components: int = 2):
        super().__init__()
        self.prior, self.latent = _linear(d, components), _linear(d, components * d)
        self.weight = _linear(d, vocab, 0.02).weight

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities."""
        prior = log_softmax(self.prior(hidden_states), -1)
        states = self.latent(hidden_states).tanh().unflatten(-1, (prior.shape[-1], -1))
        return (log_softmax(states @ self.weight.T, -1) + prior[..., None]).logsumexp(-2)


# A change has arguments of `tunnel.train`, and `head`: from hidden size and vocabulary to a module.
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


def with_head(config: GPTNeoXConfig, head: Callable[[int, int], nn.Module]) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with another head; its other weights start as those of the same seed's model with the usual one."""
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
    """Train every intervention at every width, `replicates` times, on as many tokens; `tunnel.train` keeps the runs.

    All interventions share a width's seeds (first weights, order of the text); no two widths share one.

    **Arguments:**

    - `interventions`: name to change, as `INTERVENTIONS`. A head is kept under its name: a changed one needs another.
    - `steps`, `batch_size`: where a change has other batches, its steps make up for it.
    - `options`: of `tunnel.train`, for all.

    **Returns:** `tunnel.train`'s rows, with a column `intervention`.

    **Raises:** `ValueError` where the tokens can't be equal, and as `tunnel.train` does.
    """
    names, jobs = [], []
    for name, change in interventions.items():
        arguments = {**options, "batch_size": batch_size, **change}
        now, over = divmod(steps * batch_size, arguments["batch_size"])
        if over or not now:
            raise ValueError(
                f"batch_size = {arguments['batch_size']} of {name!r}: {steps} steps of {batch_size} windows are not "
                "a whole number of such batches; choose a divisor"
            )
        if head := arguments.pop("head", None):
            arguments |= {
                "build": partial(with_head, head=head),
                "variant": re.sub(r"\W+", "-", name),
            }
        for place in range(len(hidden_sizes) * replicates):
            d = hidden_sizes[place // replicates]
            jobs.append(delayed(tunnel.train)([d], now, seed=seed + place, **arguments))
            names.append(name)
    workers = None if device.pick(options.get("where", "auto")).type == "cpu" else 1
    tables = progress.parallel(jobs, workers, "runs")
    return pd.concat(
        [t.assign(intervention=n) for n, t in zip(names, tables, strict=True)], ignore_index=True
    )


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run of a `sweep`: its last checkpoint, and its late course.

    `loss`, `anisotropy` (after the norm) and `head_entropy` (singular entropy of the head, NaN if it is not one
    matrix) are `checkpoint.measure`'s. `output_entropy` = ln(d / `output_rank`): of a linear head's outputs the
    singular entropy over d dimensions, at least 0; below 0 only where they have more dimensions than the hidden state.
    The three `…_late`: the last value minus the least one between the early peak and the last. Above 0: saturation.
    """
    rows = []
    for key, run in table.groupby(["intervention", "hidden_size", "seed"], sort=False):
        run = run.sort_values("step")
        loss, head = run["loss"].to_numpy(), run["singular_entropy"].to_numpy()
        output, last = np.log(key[1] / run["output_rank"].to_numpy()), run.iloc[-1]
        values = (
            loss[-1],
            _late(loss),
            last["anisotropy_after_norm"],
            head[-1],
            _late(head),
            output[-1],
            _late(output),
        )
        rows.append((*key, last["parameters"], *map(float, values)))
    return pd.DataFrame(
        rows, columns=["intervention", "hidden_size", "seed", "parameters", *QUANTITIES]
    )


def effects(outcomes: pd.DataFrame, against: str = "baseline") -> pd.DataFrame:
    """What each intervention changes: differences to the run of the same width and seed, averaged over widths.

    Each width has a mean of its own and all widths one scatter, so that seeds alone make the t intervals.

    **Returns:** a row an intervention and quantity: value, low, high, n (pairs of runs), p, and `adjusted`, p after
    Holm's correction for all tests of the table.

    **Raises:** `ValueError` if a run has no partner.

    **Source:** Holm 1979.
    """
    runs = outcomes.set_index(["intervention", "hidden_size", "seed"])[list(QUANTITIES)]
    changes = []
    for name in dict.fromkeys(outcomes["intervention"]):
        pairs = runs.loc[name] - runs.loc[against]
        if len(pairs) > min(len(runs.loc[name]), len(runs.loc[against])):
            raise ValueError(
                f"{name!r} and {against!r} have other widths or seeds; run both with the same ones"
            )
        widths = pairs.groupby("hidden_size")
        freedom = len(pairs) - len(widths)
        scatter = ((pairs - widths.transform("mean")) ** 2).sum(skipna=False) / max(freedom, 1)
        error = (scatter * (1 / widths.size()).sum()).pow(0.5) / len(widths)
        change = pd.DataFrame(
            {"value": widths.mean().mean(skipna=False), "error": error}
        ).rename_axis("quantity")
        changes.append(
            change.reset_index().assign(intervention=name, n=len(pairs), freedom=freedom or np.nan)
        )
    table = pd.concat(
        [c for c in changes if c["intervention"].iloc[0] != against], ignore_index=True
    )
    error, freedom = table.pop("error"), table.pop("freedom")
    half = error * student.ppf(0.975, freedom)
    table["low"], table["high"] = table["value"] - half, table["value"] + half
    table["p"] = 2 * student.sf(table["value"].abs() / error, freedom)
    table["adjusted"], known = np.nan, table["p"].notna()
    if known.any():
        table.loc[known, "adjusted"] = multipletests(table["p"][known], method="holm")[1]
    return table


def _late(course: Float[np.ndarray, " checkpoints"]) -> float:
    between = course[course.argmax() : -1]
    return course[-1] - between.min() if len(between) else 0.0


def _linear(width: int, to: int, deviation: float | None = None) -> nn.Linear:
    # 0.02, as in GPT-NeoX, for what makes logits; an inner map keeps the size of what it is given.
    layer = nn.Linear(width, to, bias=False)
    nn.init.normal_(layer.weight, std=deviation or width**-0.5)
    return layer
