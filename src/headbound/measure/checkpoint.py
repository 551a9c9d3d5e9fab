"""What is measured of every checkpoint, whoever trained it, in one forward pass over a text."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headbound import hidden, models, stats
from headbound.measure import anisotropy, gradients, spectrum
from headbound.measure.lowrank import Examples

LOGITS = 1 << 23  # held at once: what bounds the memory
SHOWN = 16  # texts, and places in each, whose logits the output rank is of


def check_length(model: PreTrainedModel, length: int, predicted: int = 0) -> None:
    """**Raises:** `ValueError` for a text too long for the model, less what is `predicted` only."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length - predicted > limit:
        raise ValueError(f"length = {length}: the model reads {limit} tokens at most; choose fewer")


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    rows: Int[Tensor, "texts length"],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Loss, anisotropy around the final norm, output rank, and what `head` says.

    Loss (nats a token) and anisotropy come with 95 % intervals over texts. The output rank is of 16
    places of each of 16 texts; of a linear head it is at most as large as the state. The entropy is
    NaN for a head that is not one matrix. With the tokenizer, rows that pad the head are left out.
    """
    losses: list[Tensor] = []
    shown: list[Tensor] = []
    places = torch.linspace(0, rows.shape[1] - 2, SHOWN).long().unique()
    text = rows.shape[1] * model.get_input_embeddings().num_embeddings  # its logits
    count = max(1, LOGITS // text)

    def states() -> Iterator[Float[Tensor, "layers _ length d"]]:
        for some in rows.split(count):
            found, logits = hidden.with_logits(model, some[:, :-1], [-2, -1])
            losses.append(_losses(logits, some))
            if sum(map(len, shown)) < SHOWN:
                some_places = logits[:, places.to(logits.device)]
                shown.append(some_places.double().cpu())
            yield found

    before, after = anisotropy.by_layer(states())[0]
    loss = stats.mean(torch.cat(losses).double().cpu().numpy())
    values = {}
    estimates = {"loss": loss, "anisotropy_before_norm": before, "anisotropy_after_norm": after}
    for name, estimate in estimates.items():
        values[name] = estimate.value
        values[f"{name}_low"] = estimate.low
        values[f"{name}_high"] = estimate.high
    values["output_rank"] = output_rank(torch.cat(shown)[:SHOWN].flatten(0, 1))
    values["texts"] = len(rows)
    values["singular_entropy"] = math.nan
    if isinstance(getattr(model.get_output_embeddings(), "weight", None), Tensor):
        values |= head(models.head_weight(model, tokenizer))
    return values


def _losses(logits: Tensor, rows: Tensor) -> Float[Tensor, " texts"]:
    targets = rows[:, 1:].to(logits.device).flatten()
    each = cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return each.unflatten(0, (len(rows), -1)).mean(1)


def output_rank(logits: Float[Tensor, "contexts vocab"]) -> float:
    """The effective rank of log-probabilities, each context's up to a constant that is its own."""
    return spectrum.effective_rank(spectrum.singular_values(logits - logits.mean(1, keepdim=True)))


def head(weight: Float[Tensor, "vocab d"]) -> dict[str, float]:
    """What is said of a head alone.

    - `singular_entropy`, `singular_entropy_centred`: in nats, as the head is and without its mean
      row, which adds the same to all logits.
    - `effective_rank`: dimensions.
    - `mean_row_share`: the mean row's part of ‖W‖².
    """
    weight = weight.detach().float()
    mean_row = weight.mean(0)
    entropy = spectrum.singular_entropy(spectrum.singular_values(weight))
    centred = spectrum.singular_values(weight - mean_row)
    share = len(weight) * mean_row.square().sum() / weight.square().sum()
    return {
        "singular_entropy": entropy,
        "singular_entropy_centred": spectrum.singular_entropy(centred),
        "effective_rank": min(weight.shape) * math.exp(-entropy),
        "mean_row_share": share.item(),
    }


@torch.inference_mode()
def outputs(model: PreTrainedModel, rows: Int[Tensor, "texts length"]) -> dict[str, float]:
    """What needs all logits of a batch at once, so of a few texts only.

    - `logit_mean`, `logit_norm`: mean of the logits; root mean square of a context's logit vector.
    - `gradient_kept`: the share of the logit gradient's squared norm that passes the head.
    """
    (states,), logits = hidden.with_logits(model, rows[:, :-1], [-1])
    logits = logits.float()
    inputs = states.float().flatten(0, 1).cpu().numpy()
    targets = rows[:, 1:].flatten().cpu().numpy()
    examples = Examples(inputs, targets, texts=np.zeros_like(targets))
    readout = models.readout(model, None, rows)
    kept = gradients.share_kept(examples, readout.weight.float(), logits=readout.logits)
    squares = logits.square().sum(-1)
    return {
        "logit_mean": logits.mean().item(),
        "logit_norm": squares.mean().sqrt().item(),
        "gradient_kept": kept.share().value,
    }
