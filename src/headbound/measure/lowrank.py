"""Heads of bounded rank, W = A·B: cut from a trained head in closed form, or trained by gradient."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import embedding, linear_cross_entropy

from headbound import device, hidden, progress, stats


class Head(NamedTuple):
    """A head of rank r as its factors: A (V × r) times B (r × d)."""

    A: Tensor
    B: Tensor

    def cut(self, rank: int) -> "Head":
        """The head of the first `rank` directions: for a head of `low_rank`, the best one of that rank."""
        return Head(self.A[:, :rank], self.B[:rank])


class Examples(NamedTuple):
    """What a head is trained and measured on: hidden states (tokens × d), the next tokens, the text of each."""

    hidden_states: np.ndarray
    targets: np.ndarray
    texts: np.ndarray


def examples(model: nn.Module, input_ids: Int[Tensor, "texts length"]) -> Examples:
    """Each text's tokens but the last as memory-mapped final hidden states (`hidden.store`), and what follows each."""
    states = hidden.store(model, input_ids[:, :-1])
    texts, length, d = states.shape
    return Examples(
        states.reshape(-1, d),
        input_ids[:, 1:].flatten().numpy(),
        np.repeat(np.arange(texts), length),
    )


@torch.inference_mode()
def token_losses(
    data: Examples, heads: Sequence[Head], block: int = 128
) -> Float[np.ndarray, "heads tokens"]:
    """Nats a token of each head over its whole vocabulary, every block of states read once for all heads."""
    losses = np.empty((len(heads), len(data.targets)))
    places = [slice(start, start + block) for start in range(0, len(data.targets), block)]
    parts = device.feed(data[:2], places, heads[0].A.device)
    for here, (states, targets) in zip(
        progress.bar(places, f"measuring {len(heads)} heads"), parts, strict=True
    ):
        found = [
            blocked_cross_entropy(states, head, targets, block, reduction="none") for head in heads
        ]
        losses[:, here] = torch.stack(found).cpu()
    return losses


def covariance(
    hidden_states: Float[np.ndarray, "tokens d"], ridge: float = 1e-8, block: int = 8192
) -> Float[Tensor, "d d"]:
    """C = E[h hᵀ], the second moment (mean included), in float64, block by block from disk or memory.

    `ridge` times the mean diagonal entry is added: states after a LayerNorm may leave a direction out altogether.
    """
    total = torch.zeros(hidden_states.shape[1], hidden_states.shape[1], dtype=torch.float64)
    places = (slice(start, start + block) for start in range(0, len(hidden_states), block))
    for (states,) in device.feed([hidden_states], places, total.device):
        total.addmm_(states.T.double(), states.double())
    return (total + ridge * total.diagonal().mean() * torch.eye(len(total))) / len(hidden_states)


def low_rank(
    weight: Float[Tensor, "vocab d"], rank: int, covariance: Float[Tensor, "d1 d2"] | None = None
) -> Head:
    """The rank-r head A·B nearest to W: min E‖(W − A·B) h‖² over the hidden states h that occur.

    With C = E[h hᵀ] the error is ‖(W − A·B) C^½‖_F², so by Eckart–Young A·B = (W C^½)_r C^−½, where (·)_r keeps
    the r largest singular values; without a covariance C = I, the truncated SVD of W alone. The right singular
    vectors come from the d × d Gram matrix, in float64.

    **Arguments:**

    - `weight`: the head W.
    - `rank`: between 1 and min(V, d). `low_rank(W, d, C).cut(r)` is `low_rank(W, r, C)`.
    - `covariance`: C, from `covariance(hidden_states)`.

    **Returns:** the factors, in the type of `weight`.

    **Raises:** `ValueError` for an impossible rank, a covariance of another width, or a singular one.

    **Source:** Eckart & Young 1936; the paper's section 5 trains A and B instead.
    """
    vocab, d = weight.shape
    if not 1 <= rank <= min(vocab, d):
        raise ValueError(
            f"rank = {rank}: must be between 1 and {min(vocab, d)}, the smaller side of the head; choose ranks there"
        )
    precise = weight.to(device.precise(weight.device), torch.float64)
    root = inverse = torch.eye(d).to(precise)
    if covariance is not None:
        root, inverse = _roots(covariance.to(precise), d)
    kept = torch.linalg.eigh(root @ (precise.T @ precise) @ root).eigenvectors.flip(1)[:, :rank]
    return Head((precise @ (root @ kept)).to(weight), (kept.T @ inverse).to(weight))


def random(weight: Float[Tensor, "vocab d"], rank: int, seed: int = 0) -> Head:
    """A random head of `weight`'s shape, the paper's start: deviation 0.02 in A, 1/√d in B, so logits near zero."""
    draw, (vocab, d) = torch.Generator().manual_seed(seed), weight.shape
    A, B = torch.randn(vocab, rank, generator=draw), torch.randn(rank, d, generator=draw)
    return Head((0.02 * A).to(weight), (B / math.sqrt(d)).to(weight))


def train(
    hidden_states: Float[np.ndarray, "states d"],
    targets: Int[np.ndarray, " targets"],
    heads: Sequence[Head],
    epochs: int = 2,
    batch: int = 128,
    learning_rate: float = 0.016,
    sampled: int | None = None,
    seed: int = 0,
) -> list[Head]:
    """Train every head in one pass over a frozen model's hidden states: min −E ln softmax(A B h)[target].

    Each batch is read once and shown to every head in turn; the heads share nothing else, so each ends where it
    would have ended alone. Adam, its rate falling linearly to zero.

    **Arguments:**

    - `hidden_states`, `targets`: what enters the head, and the token that came next. A memory-mapped array is read
      batch by batch, never whole.
    - `heads`: where to start, any ranks; left unchanged.
    - `epochs`, `batch` (tokens).
    - `learning_rate`: Adam's: over √r for A, as a logit is a sum of r terms; times twice B's root mean square for B,
      whose scale is that of the states.
    - `sampled`: each step's softmax runs over the tokens that occur in `targets` and this many others, drawn
      afresh and weighted by the inverse of their chance (sampled softmax). None: over the whole vocabulary.
    - `seed`: of batches and samples.

    **Returns:** the trained heads, in the order given.

    **Raises:** `ValueError` if there is not one target a state or not one batch; `FloatingPointError` if any head
    diverges (a loss not finite, or a nat higher at the end than at first): nothing half-trained is returned.
    """
    steps = epochs * (len(targets) // batch)
    if steps < 1 or len(hidden_states) != len(targets):
        raise ValueError(
            f"{len(hidden_states)} hidden states, {len(targets)} targets, epochs = {epochs}: need one target a "
            f"state, an epoch and a batch of {batch}; give more text"
        )
    heads = [Head(A.clone().requires_grad_(), B.clone().requires_grad_()) for A, B in heads]
    vocab, like = len(heads[0].A), heads[0].A.detach()
    occurring, bias, rows = np.unique(targets), None, None
    rest = np.setdiff1d(np.arange(vocab), occurring)
    if sparse := sampled is not None and sampled < len(rest):
        targets = np.searchsorted(occurring, targets)
        bias = torch.zeros(len(occurring) + sampled).to(like)
        bias[len(occurring) :] = math.log(len(rest) / sampled)
    over_a = [{"params": [A], "lr": learning_rate / math.sqrt(len(B))} for A, B in heads]
    over_b = [
        {"params": [B], "lr": 2 * learning_rate * B.detach().square().mean().sqrt().item()}
        for _, B in heads
    ]
    optimizers = [
        (torch.optim.SparseAdam if sparse else torch.optim.Adam)(over_a),
        torch.optim.Adam(over_b),
    ]
    decay = [torch.optim.lr_scheduler.LinearLR(adam, 1, 1 / steps, steps) for adam in optimizers]
    rng, history = np.random.default_rng(seed), np.empty((steps, len(heads)))
    parts = device.feed(
        [hidden_states, targets], _batches(len(targets), batch, epochs, seed), like.device
    )
    for step, (states, following) in enumerate(
        progress.bar(parts, f"training {len(heads)} heads", steps)
    ):
        if sparse:
            drawn = np.concatenate([occurring, rng.choice(rest, sampled, replace=False)])
            rows = torch.from_numpy(drawn).to(like.device)
        for number, (A, B) in enumerate(heads):
            part = A if rows is None else embedding(rows, A, sparse=True)
            loss = blocked_cross_entropy(states, (part, B), following, bias=bias)
            loss.backward()
            history[step, number] = loss.item()
        _check_convergence(history[: step + 1], step + 1 == steps, heads)
        for adam, schedule in zip(optimizers, decay, strict=True):
            adam.step()
            adam.zero_grad()
            schedule.step()
    return [Head(A.detach(), B.detach()) for A, B in heads]


def knee(
    ranks: Sequence[int],
    losses: Float[np.ndarray, "ranks tokens"],
    texts: Int[np.ndarray, " tokens"],
    tolerance: float = 0.05,
) -> stats.Estimate:
    """The rank above which perplexity stays within `tolerance` of the largest rank's, interpolated in its log.

    **Arguments:**

    - `ranks`: ascending; the last is the reference.
    - `losses`: nats, a row per rank, a column per token.
    - `texts`: which text each token is from; resampled for the interval, all ranks together.
    - `tolerance`: 0.05 is five per cent of perplexity.
    """
    sums, counts = np.stack([np.bincount(texts, row) for row in losses]), np.bincount(texts)

    def crossing(excess: Float[np.ndarray, " ranks"]) -> float:
        if (excess <= 0).all():
            return float(ranks[0])
        i = np.flatnonzero(excess > 0)[-1]
        return float(np.exp(np.interp(0, -excess[i : i + 2], np.log(ranks[i : i + 2]))))

    def statistic(weights: Float[np.ndarray, "sets texts"]) -> Float[np.ndarray, " sets"]:
        excess = weights @ (sums - sums[-1]).T / (weights @ counts)[:, None] - math.log1p(tolerance)
        return np.array([crossing(row) for row in excess])

    return stats.bootstrap(statistic, len(counts))


def _batches(
    states: int, batch: int, epochs: int, seed: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """The numbers of each batch's states, ascending, which a disk reads faster; every epoch in an order of its own."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(states)
        yield from (np.sort(order[i : i + batch]) for i in range(0, states - batch + 1, batch))


def _roots(
    covariance: Float[Tensor, "d1 d2"], d: int
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    if covariance.shape != (d, d):
        raise ValueError(
            f"covariance of shape {tuple(covariance.shape)}: the head is {d} wide, so it must be {d} × {d}; "
            "take hidden states and head from the same model"
        )
    values, vectors = torch.linalg.eigh(covariance)
    rank = int((values > d * torch.finfo(values.dtype).eps * values[-1]).sum())
    if rank < d:
        raise ValueError(
            f"covariance of rank {rank}: singular, for the head is {d} wide; use many more than {d} hidden "
            "states, or a ridge as lowrank.covariance adds"
        )
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _check_convergence(
    history: Float[np.ndarray, "steps heads"], over: bool, heads: Sequence[Head]
) -> None:
    last = history[-max(1, len(history) // 10) :].mean(0) if over else history[-1]
    for number in np.flatnonzero(~np.isfinite(last) | (over & (last > history[0] + 1))):
        raise FloatingPointError(
            f"rank {len(heads[number].B)} diverged: loss {history[0, number]:.3g} nats at first, "
            f"{last[number]:.3g} at step {len(history)}; lower learning_rate"
        )


def blocked_cross_entropy(
    hidden_states: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab d"] | tuple[Float[Tensor, "vocab r"], Float[Tensor, "r d"]],
    targets: Int[Tensor, " tokens"],
    block: int = 256,
    bias: Float[Tensor, " vocab"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """−ln softmax(W h + b)[target], W one matrix or a product A·B, `block` tokens at a time.

    PyTorch's chunked kernel holds one block × V buffer and, for `mean`, finishes a block's gradient before the next:
    the peak is a constant multiple of block × V whatever the number of tokens. On CUDA Liger's Triton kernel, where
    installed, takes over the `mean` and chooses its own blocks.

    **Arguments:**

    - `hidden_states`: what enters the head.
    - `weight`: the head W, or its factors (A, B) with W = A·B; B is then applied first and W never built.
    - `targets`: the token that came next, for each hidden state.
    - `block`: tokens a block.
    - `bias`: added to the logits, such as the log-weights of a sampled vocabulary.
    - `reduction`: `mean` (nats a token) or `none` (one loss a token).

    **Returns:** the loss in nats, differentiable once in everything but the targets.

    **Raises:** `ValueError` for widths that do not fit, targets outside the vocabulary, no token or no block.
    """
    if block < 1 or len(targets) == 0:
        raise ValueError(
            f"block = {block}, tokens = {len(targets)}: both must be at least 1; give more text"
        )
    if not isinstance(weight, Tensor):
        weight, inner = weight
        _check_width(hidden_states, inner)
        hidden_states = hidden_states @ inner.T
    _check_width(hidden_states, weight)
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"targets from {int(targets.min())} to {int(targets.max())}: the head has rows 0 to {len(weight) - 1}; "
            "encode the text with this model's tokenizer"
        )
    targets = targets.long()
    if hidden_states.is_cuda and reduction == "mean" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden_states, weight, targets, bias)
    return linear_cross_entropy(
        hidden_states,
        weight,
        targets,
        linear_bias=bias,
        reduction=reduction,
        options=LinearCrossEntropyOptions(batch_chunk_size=block),
    )


def perplexity(
    losses: Float[np.ndarray, " tokens"], texts: Int[np.ndarray, " tokens"]
) -> stats.Estimate:
    """exp(mean loss) over all tokens, its interval by bootstrap over texts (tokens of one text depend on each other).

    **Arguments:** `losses`: nats, one a token; `texts`: a number for the text that each token is from.
    """
    return stats.mean(losses, texts).map(math.exp)


def _check_width(hidden_states: Tensor, weight: Tensor) -> None:
    if hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states of width {hidden_states.shape[1]}, head of width {weight.shape[1]}: "
            "they must come from one model; take both from the same models.load"
        )
