"""Watch a training of your own for the signs of saturation."""

import warnings

from jaxtyping import Int
from torch import Tensor
from transformers import Trainer, TrainerCallback

from headbound.measure import checkpoint

# Each lies midway, by ratio, between what the paper's Figures 3 and 5 show of Pythia-410M, which it
# calls stable, and the least that they show of the four smaller models, which saturate.
LOSS_RISE = 0.02  # nats above the least so far: 0.003 against 0.089 or more
COSINE = 0.5  # in the last layer after the final norm: 0.20 against 0.97 or more
ENTROPY_RATIO = 4.0  # times the least so far: 1.2 against 15 or more


def watch(trainer: Trainer, input_ids: Int[Tensor, "texts length"], every: int = 500) -> "_Watch":
    """Measure a model while a `transformers.Trainer` trains it, and warn when it saturates.

    What `checkpoint.measure` and `checkpoint.outputs` say goes through the trainer's own log, so
    TensorBoard, W&B and others show it under `saturation/…`. The `rows` of what is returned keep
    it. Call it before the trainer's `train`, with a fixed batch of held-out text, such as 8 texts
    of 128 tokens. The optimizer's first step is measured, and then every so many. What can't be
    measured, as after a divergence, is warned of, and the training goes on.

    **Raises:** `ValueError` if `every` is below 1, or for texts too short or too long.
    """
    predicted = input_ids[:, 1:].numel()
    if every < 1 or predicted < 2:
        raise ValueError(f"every = {every}, {predicted} tokens to predict: 1 and 2 at least")
    checkpoint.check_length(trainer.model, input_ids.shape[1], predicted=1)
    callback = _Watch(trainer, input_ids.long(), every)
    trainer.add_callback(callback)
    return callback


class _Watch(TrainerCallback):
    """What `watch` adds to a trainer."""

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
        input_ids = self.input_ids.to(model.device)
        try:
            row = checkpoint.measure(model, input_ids) | checkpoint.outputs(model, input_ids)
        except ValueError as error:
            warnings.warn(f"step {state.global_step}: not measured: {error}", stacklevel=2)
            return
        finally:
            model.train(training)
        self.rows.append({"step": float(state.global_step), **row})
        self.trainer.log({f"saturation/{name}": value for name, value in row.items()})
        found = _signs(self.rows)
        if len(found) == 3 and not self.warned:
            self.warned = True
            warnings.warn(f"step {state.global_step}: {'; '.join(found)}", stacklevel=2)


def _signs(rows: list[dict[str, float]]) -> list[str]:
    """The paper's signs of saturation that the last of these measurements shows, in words.

    One alone says little: a young model's last layer is anisotropic too. All three together are
    what the paper's Figures 3 and 5 show of models up to 160M parameters, late in training.
    """
    last = rows[-1]
    rise = last["loss"] - min(row["loss"] for row in rows)
    ratio = last["singular_entropy"] / max(min(row["singular_entropy"] for row in rows), 1e-9)
    cosine = last["anisotropy_after_norm"]
    found = {
        f"the loss is {rise:.3f} nats above its least": rise > LOSS_RISE,
        f"the last layer's mean cosine is {cosine:.2f}": cosine > COSINE,
        f"the head's singular entropy is {ratio:.1f} times its least": ratio > ENTROPY_RATIO,
    }
    return [words for words, there in found.items() if there]
