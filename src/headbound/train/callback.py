"""Watch a training of your own for the signs of saturation."""

import warnings

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from headbound import hidden, models
from headbound.measure import anisotropy, gradients, spectrum
from headbound.measure.lowrank import Examples

# Each lies midway, by ratio, between what the paper's Figures 3 and 5 show of Pythia-410M, which it
# calls stable, and the least that they show of the four smaller models, which saturate.
LOSS_RISE = 0.02  # nats above the least so far: 0.003 against 0.089 or more
COSINE = 0.5  # in the last layer after the final norm: 0.20 against 0.97 or more
ENTROPY_RATIO = 4.0  # times the least so far: 1.2 against 15 or more


def watch(
    trainer: Trainer, input_ids: Int[Tensor, "texts length"], every: int = 500
) -> "SaturationCallback":
    """Measure a model while a `transformers.Trainer` trains it, and warn when it saturates.

    The numbers go through the trainer's own log, so TensorBoard, W&B and others show them under
    `saturation/…`. `SaturationCallback.rows` keeps them.

    **Arguments:**

    - `trainer`: before its `train` is called.
    - `input_ids`: a fixed batch of held-out text, such as 8 texts of 128 tokens.
    - `every`: steps of the optimizer between two measurements.

    **Raises:** `ValueError` if `every` is below 1 or a text has fewer than two tokens.
    """
    if every < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"every = {every}, texts of {input_ids.shape[1]} tokens: 1 and 2 at least")
    callback = SaturationCallback(trainer, input_ids, every)
    trainer.add_callback(callback)
    return callback


class SaturationCallback(TrainerCallback):
    """Measures at the first step, then every `every` steps; see `watch`."""

    def __init__(self, trainer: Trainer, input_ids: Int[Tensor, "texts length"], every: int):
        self.trainer = trainer
        self.input_ids = input_ids
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.warned = False

    def on_step_end(self, args, state, control, **_) -> None:
        """Measure, log, and warn once if the signs appear together."""
        if state.global_step != 1 and state.global_step % self.every:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        row = measure(model, self.input_ids.to(model.device))
        model.train(training)
        self.rows.append({"step": float(state.global_step), **row})
        self.trainer.log({f"saturation/{name}": value for name, value in row.items()})
        found = _signs(self.rows)
        if len(found) == 3 and not self.warned:
            self.warned = True
            warnings.warn(f"step {state.global_step}: {'; '.join(found)}", stacklevel=2)


@torch.inference_mode()
def measure(model: nn.Module, input_ids: Int[Tensor, "texts length"]) -> dict[str, float]:
    """What chapters 2, 3 and 7 measure of a model, on one batch.

    - `loss`: nats a token.
    - `entropy`, `entropy_centred`: singular entropy of the head in nats, as it is and with its mean
      row removed, which adds the same to all logits.
    - `mean_row_share`: the mean row's part of ‖W‖².
    - `cosine_before_norm`, `cosine_after_norm`: mean cosine in the last layer.
    - `logit_mean`, `logit_norm`: mean of the logits; root mean square of a context's logit vector.
    - `gradient_kept`: the share of the logit gradient's squared norm that passes the head.
    """
    weight = model.get_output_embeddings().weight.detach().float()
    mean_row = weight.mean(0)
    logits = model(input_ids[:, :-1], use_cache=False).logits.float()
    targets = input_ids[:, 1:].flatten()
    states = torch.cat(list(hidden.stream(model, input_ids[:, :-1], layers=[-2, -1])), dim=1)
    before, after = states.float().flatten(1, 2)
    texts, length = input_ids[:, 1:].shape
    of_text = torch.arange(texts).repeat_interleave(length)
    examples = Examples(after.cpu().numpy(), targets.cpu().numpy(), of_text.numpy())
    readout = models.readout(model, None, input_ids)
    kept = gradients.share_kept(examples, weight, logits=readout.logits)
    raw = spectrum.singular_values(weight)
    centred = spectrum.singular_values(weight - mean_row)
    return {
        "loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets).item(),
        "entropy": spectrum.singular_entropy(raw),
        "entropy_centred": spectrum.singular_entropy(centred),
        "mean_row_share": (len(weight) * mean_row.square().sum() / weight.square().sum()).item(),
        "cosine_before_norm": anisotropy.mean_cosine(before).value,
        "cosine_after_norm": anisotropy.mean_cosine(after).value,
        "logit_mean": logits.mean().item(),
        "logit_norm": logits.square().sum(-1).mean().sqrt().item(),
        "gradient_kept": kept.share().value,
    }


def _signs(rows: list[dict[str, float]]) -> list[str]:
    """The paper's signs of saturation that the last of these measurements shows, in words.

    One alone says little: a young model's last layer is anisotropic too. All three together are
    what the paper's Figures 3 and 5 show of models up to 160M parameters, late in training.
    """
    last = rows[-1]
    rise = last["loss"] - min(row["loss"] for row in rows)
    ratio = last["entropy"] / max(min(row["entropy"] for row in rows), 1e-9)
    cosine = last["cosine_after_norm"]
    found = {
        f"the loss is {rise:.3f} nats above its least": rise > LOSS_RISE,
        f"the last layer's mean cosine is {cosine:.2f}": cosine > COSINE,
        f"the head's singular entropy is {ratio:.1f} times its least": ratio > ENTROPY_RATIO,
    }
    return [words for words, there in found.items() if there]
