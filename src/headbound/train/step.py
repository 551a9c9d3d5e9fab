"""A recipe, and one step of training by it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPTNeoXConfig, PreTrainedModel

from headbound.train import fast

CHOICES = {
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "coupled", "sgd"),
    "precision": ("float32", "float16", "bfloat16"),
    "cut": ("none", "forward", "backward"),
}


@dataclass(frozen=True)
class Recipe:
    """All that a run of the wind tunnel follows from, beside its text and its build.

    **Raises:** `ValueError` for a value outside what is said of a field.
    """

    hidden_size: int  # d, a multiple of 8; a head of attention has 16 dimensions, or all 8
    steps: int  # updates, each of `batch_size` windows of `context` tokens
    source: str = "docstrings"
    vocab_size: int = 2048  # of the tokenizer
    layers: int = 2  # blocks, with feed-forwards of 4 d
    context: int = 128
    batch_size: int = 16
    peak: float = 1e-2  # of the learning rate; see its method
    schedule: str = "cosine"
    warmup: float = 0.01
    # `adamw` with betas .9 and .95; `coupled`, the same with one second moment for all rows of
    # embedding and head; or `sgd`, with momentum .9.
    optimizer: str = "adamw"
    weight_decay: float = 0.1  # of matrices, a share of the weight for each unit of learning rate
    # What weights, states, logits and their gradient are rounded to. Sums, moments and the kept
    # weights stay float32.
    precision: str = "float32"
    centred: bool = False  # the mean row is taken out of the head after each step
    z_loss: float = 0.0  # the factor of the mean (ln Z)² in the loss
    # In the pass `forward` or `backward` alone, the head is projected on its d/2 leading right
    # singular vectors at that step.
    cut: str = "none"
    tied: bool = False  # one matrix for embedding and head; Pythia's are two
    unused: float = 0.0  # the share of the model's rows beyond the tokenizer's
    epochs: float | None = None  # over windows drawn to fit; None keeps all of them
    checkpoints: int = 14  # measured models after the first
    held_out_texts: int = 256  # that they are measured on
    seed: int = 0  # of first weights and of the order of the text
    variant: str = "neox"  # the name of the build

    def __post_init__(self) -> None:
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"hidden_size = {self.hidden_size}: must be a multiple of 8")
        if min(self.steps, self.checkpoints) < 1:
            given = f"steps = {self.steps}, checkpoints = {self.checkpoints}"
            raise ValueError(f"{given}: both must be 1 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {choices}")
        if self.precision != "float32" and (self.centred or self.z_loss):
            raise ValueError("precision: a rounded recipe has neither z-loss nor centred rows")

    @property
    def tokens_a_step(self) -> int:
        """Predicted tokens."""
        return self.batch_size * self.context

    def config(self, end_of_text: int) -> GPTNeoXConfig:
        """The model's shape, Pythia's in all but size."""
        return GPTNeoXConfig(
            vocab_size=round(self.vocab_size / (1 - self.unused)),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_attention_heads=1 if self.hidden_size % 16 else self.hidden_size // 16,
            num_hidden_layers=self.layers,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear in the warm-up, a share of `steps`, then by the schedule.

        `cosine` falls to a tenth of the peak, as Pythia's does; `constant` stays.
        """
        ramp = self.warmup * self.steps
        if step < ramp:
            return self.peak * (step + 1) / (ramp + 1)
        if self.schedule == "constant":
            return self.peak
        fall = 0.45 * (1 - math.cos(math.pi * (step - ramp) / (self.steps - ramp)))
        return self.peak * (1 - fall)


class Trainer:
    """A model, its optimizer and its loss.

    All weights lie in two flat vectors, with weight decay and without, so that an update is a
    handful of operations however many layers there are.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe):
        self.model = model
        self.recipe = recipe
        self.precision = getattr(torch, recipe.precision)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.flat = [_Flat(part, self.precision) for part in (matrices, vectors)]
        self.optimizer = self._optimizer()

    def loss(self, rows: Int[Tensor, "size length"]) -> Float[Tensor, ""]:
        """The mean loss of the windows, nats a token, with the recipe's additions."""
        inputs = rows[:, :-1]
        targets = rows[:, 1:].flatten()
        _, states = fast.states(self.model, inputs, self.precision)
        hidden = states.flatten(0, 1)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return nn.functional.cross_entropy(head(hidden), targets)
        weight = head.weight
        if self.recipe.cut != "none":
            hidden, weight = self._cut(hidden, weight)
        return fast.cross_entropy(hidden, weight, targets, self.recipe.z_loss, self.precision)

    def apply(self, loss: Float[Tensor, ""], rate: float) -> None:
        """Move the weights against a loss's gradient, clipped to norm 1, at a learning rate."""
        loss.backward()
        nn.utils.clip_grad_norm_([flat.weights for flat in self.flat], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for flat in self.flat:
            flat.weights.grad.zero_()
            flat.show()
        if self.recipe.centred:
            head = self.model.get_output_embeddings().weight.data
            head -= head.mean(0)

    def state(self) -> dict:
        """All that a later process needs to go on."""
        weights = [flat.weights.detach() for flat in self.flat]
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        for flat, weights in zip(self.flat, state["weights"], strict=True):
            flat.weights.data.copy_(weights)
            flat.show()
        self.optimizer.load_state_dict(state["optimizer"])

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed, others = (flat.weights for flat in self.flat)
        groups = [
            {"params": [decayed], "weight_decay": self.recipe.weight_decay},
            {"params": [others], "weight_decay": 0.0},
        ]
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.recipe.peak, momentum=0.9)
        if self.recipe.optimizer == "coupled":
            tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
            matrices = self.flat[0].places
            places = {t.weight: matrices[t.weight] for t in tables if t.weight in matrices}
            return _CoupledAdamW(groups, places)
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def _cut(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        still = weight.detach()
        vectors = torch.linalg.eigh(still.T @ still).eigenvectors
        kept = vectors[:, weight.shape[1] // 2 :]
        projection = kept @ kept.T
        if self.recipe.cut == "forward":
            return hidden @ projection, weight
        # Views, for a hook on the weight itself would stay.
        cut = [part.view_as(part) for part in (hidden, weight)]
        for part in cut:
            part.register_hook(lambda gradient: gradient @ projection)
        return tuple(cut)


class _Flat:
    """Many parameters as one vector; they become views of it, and so do their gradients.

    With a rounding they are views of a second vector, which `show` makes the rounded first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], precision: torch.dtype):
        joined = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.weights = nn.Parameter(joined)
        self.weights.grad = torch.zeros_like(joined)
        self.precision = precision
        self.shown = joined if precision == torch.float32 else joined.clone()
        self.places = {}
        start = 0
        for parameter in parameters:
            here = slice(start, start + parameter.numel())
            parameter.data = self.shown[here].view_as(parameter)
            parameter.grad = self.weights.grad[here].view_as(parameter)
            self.places[parameter] = here
            start = here.stop
        self.show()

    def show(self) -> None:
        """Copy the kept weights, rounded, to where the model reads them."""
        if self.precision != torch.float32:
            self.shown.copy_(self.weights.detach().to(self.precision))


class _CoupledAdamW(torch.optim.Optimizer):
    """AdamW with one second moment for all rows of a table of tokens.

    `tables` lie in the first group, a flat vector, at these places.

    **Source:** Stollenwerk & Stollenwerk 2025.
    """

    def __init__(self, groups: list[dict], tables: Mapping[nn.Parameter, slice]):
        super().__init__(groups, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8})
        self.tables = tables

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (weights,) = group["params"]
            state = self.state[weights]
            if not state:
                zeros = torch.zeros_like(weights)
                state.update(exp_avg=zeros, exp_avg_sq=zeros.clone(), step=0)
            state["step"] += 1
            mean = state["exp_avg"]
            square = state["exp_avg_sq"]
            first, second = group["betas"]
            mean.lerp_(weights.grad, 1 - first)
            square.lerp_(weights.grad.square(), 1 - second)
            shared = square / (1 - second ** state["step"])
            if group is self.param_groups[0]:
                for table, place in self.tables.items():
                    rows = shared[place].view_as(table)
                    rows.copy_(rows.mean(0).expand_as(rows))
            weights.mul_(1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] / (1 - first ** state["step"])
            weights.addcdiv_(mean, shared.sqrt_().add_(group["eps"]), value=-rate)
