"""What is measured of every checkpoint, whoever trained it: loss, anisotropy, singular entropy, rank of outputs."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headbound import device, hidden, models, stats
from headbound.measure import anisotropy, spectrum

LOGITS = 1 << 25  # held at once while a loss is measured: what bounds the memory


@torch.inference_mode()
def text_losses(
    model: PreTrainedModel, rows: Int[Tensor, "texts length"]
) -> Float[np.ndarray, " texts"]:
    """The mean loss of each text, nats a token: what a comparison of two models, text by text, needs."""
    losses, at_once = [], max(1, LOGITS // (rows.shape[1] * model.config.vocab_size))
    for some in rows.to(model.device).split(at_once):
        logits = model(some[:, :-1], use_cache=False).logits.float()
        each = cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
        losses.append(each.unflatten(0, (len(some), -1)).mean(1))
    return torch.cat(losses).double().cpu().numpy()


@torch.inference_mode()
def output_rank(model: PreTrainedModel, rows: Int[Tensor, "texts length"]) -> float:
    """The effective rank of the log-probabilities, modulo a constant a context, at 16 places of each of 16 texts.

    It is defined for any head; a linear one has at most as many dimensions as the hidden state.
    """
    places = torch.linspace(0, rows.shape[1] - 2, 16).long().unique()
    logits = (
        model(rows[:16, :-1].to(model.device), use_cache=False)
        .logits[:, places.to(model.device)]
        .flatten(0, 1)
    )
    logits = logits.to(device.precise(logits.device), torch.float64)
    return spectrum.effective_rank(spectrum.singular_values(logits - logits.mean(1, keepdim=True)))


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    rows: Int[Tensor, "texts length"],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Held-out loss and last-layer anisotropy with intervals over texts, the head's singular entropy, `output_rank`.

    The entropy is NaN for a head that is not one matrix; with the tokenizer, rows that pad the head are left out of it.
    """
    losses = text_losses(model, rows)
    before, after = anisotropy.by_layer(hidden.stream(model, rows[:, :-1], layers=[-2, -1]))[0]
    estimates = {
        "loss": stats.mean(losses),
        "anisotropy_before_norm": before,
        "anisotropy_after_norm": after,
    }
    values = {
        f"{k}{end}": e[i]
        for k, e in estimates.items()
        for i, end in enumerate(("", "_low", "_high"))
    }
    one_matrix = isinstance(getattr(model.get_output_embeddings(), "weight", None), Tensor)
    head = spectrum.singular_values(models.head_weight(model, tokenizer)) if one_matrix else None
    entropy = math.nan if head is None else spectrum.singular_entropy(head)
    return {
        **values,
        "singular_entropy": entropy,
        "output_rank": output_rank(model, rows),
        "texts": len(losses),
    }
