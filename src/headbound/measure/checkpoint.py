"""What is measured of every checkpoint, whoever trained it, in one forward pass over a text."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headbound import hidden, models, stats
from headbound.measure import anisotropy, spectrum

LOGITS = 1 << 25  # held at once: what bounds the memory
SHOWN = 16  # texts, and places in each, whose logits the output rank is of


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    rows: Int[Tensor, "texts length"],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Loss, anisotropy around the final norm, output rank, and the head's singular entropy.

    Loss (nats a token) and anisotropy come with 95 % intervals over texts. The output rank is the
    effective rank of the log-probabilities at 16 places of each of 16 texts, modulo a constant a
    context. It is defined for any head; a linear one has at most as many dimensions as the state.
    The entropy is NaN for a head that is not one matrix. With the tokenizer, rows that pad the head
    are left out of it.
    """
    losses: list[Tensor] = []
    shown: list[Tensor] = []
    places = torch.linspace(0, rows.shape[1] - 2, SHOWN).long().unique()

    def states() -> Iterator[Float[Tensor, "layers _ length d"]]:
        for some in _batches(model, rows):
            found, logits = hidden.with_logits(model, some[:, :-1], [-2, -1])
            losses.append(_losses(logits, some))
            texts = sum(map(len, shown))
            if texts < SHOWN:
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
    logits = torch.cat(shown)[:SHOWN].flatten(0, 1)
    logits = logits - logits.mean(1, keepdim=True)
    values["output_rank"] = spectrum.effective_rank(spectrum.singular_values(logits))
    values["singular_entropy"] = _head_entropy(model, tokenizer)
    values["texts"] = len(rows)
    return values


def _batches(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, ...]:
    vocab = model.get_input_embeddings().num_embeddings
    return rows.split(max(1, LOGITS // (rows.shape[1] * vocab)))


def _losses(logits: Tensor, rows: Tensor) -> Float[Tensor, " texts"]:
    targets = rows[:, 1:].to(logits.device).flatten()
    each = cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return each.unflatten(0, (len(rows), -1)).mean(1)


def _head_entropy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> float:
    if not isinstance(getattr(model.get_output_embeddings(), "weight", None), Tensor):
        return math.nan
    weight = models.head_weight(model, tokenizer)
    return spectrum.singular_entropy(spectrum.singular_values(weight))
