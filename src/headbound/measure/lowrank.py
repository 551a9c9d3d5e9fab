"""Heads of bounded rank: cut from a trained head in closed form, or trained by gradient."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding
from torch.optim.lr_scheduler import LinearLR
from transformers import PreTrainedTokenizerBase

from headbound import device, hidden, models, progress, stats
from headbound.measure import spectrum

Losses = Float[np.ndarray, "heads tokens"]
Texts = Int[np.ndarray, " tokens"]


class Head(NamedTuple):
    """A head of rank r as its factors A (V × r) and B (r × d), with the model's soft cap if any.

    logits = A B h,  or cap · tanh(A B h / cap)
    """

    A: Tensor
    B: Tensor
    cap: float | None = None

    @classmethod
    def random(cls, weight: Float[Tensor, "vocab d"], rank: int, seed: int = 0) -> "Head":
        """A head of `weight`'s shape: deviation 0.02 in A, 1/√d in B, so logits near zero."""
        vocab, d = weight.shape
        draw = torch.Generator().manual_seed(seed)
        A = torch.randn(vocab, rank, generator=draw)
        A *= 0.02
        B = torch.randn(rank, d, generator=draw)
        B /= math.sqrt(d)
        return cls(A.to(weight), B.to(weight))

    def cut(self, rank: int) -> "Head":
        """The first `rank` directions: for a head of `low_rank`, the best head of that rank."""
        return self._replace(A=self.A[:, :rank], B=self.B[:rank])

    def extends(self, other: "Head") -> bool:
        """Whether `other` is a cut of this head, known by their common memory."""
        same_A = self.A.data_ptr() == other.A.data_ptr()
        same_B = self.B.data_ptr() == other.B.data_ptr()
        return same_A and same_B and len(other.B) <= len(self.B)

    def logits(self, states: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens vocab"]:
        """The logits of hidden states, through the rank: A·B is never built."""
        return self.capped(states @ self.B.T @ self.A.T)

    def capped(self, plain: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """What the model's soft cap makes of A B h."""
        return plain if self.cap is None else self.cap * torch.tanh(plain / self.cap)


class Examples(NamedTuple):
    """Hidden states (tokens × d), the token that follows each, and the number of its text."""

    hidden_states: np.ndarray
    targets: np.ndarray
    texts: np.ndarray

    def blocks(self, size: int) -> list[slice]:
        """The places of all tokens, `size` at a time."""
        return [slice(start, start + size) for start in range(0, len(self.targets), size)]

    def spread(self, tokens: int) -> "Examples":
        """About so many tokens, evenly over all texts: a text's neighbours say much the same."""
        count = len(self.targets)
        places = np.linspace(0, count - 1, min(tokens, count)).astype(int)
        return Examples(*(part[places] for part in self))

    def check(self, vocab: int, width: int) -> None:
        """**Raises:** `ValueError` if there is none, or if they do not fit a head of that shape."""
        states = self.hidden_states.shape
        low, high = self.targets.min(initial=0), self.targets.max(initial=0)
        fits = len(self.targets) == states[0] > 0 and states[1] == width
        if not fits or low < 0 or high >= vocab:
            raise ValueError(
                f"{len(self.targets)} targets from {low} to {high}, states {states}, head "
                f"{(vocab, width)}: they do not fit; take all of them from one model"
            )


def examples(
    model: nn.Module, input_ids: Int[Tensor, "texts length"], readout: models.Readout | None = None
) -> Examples:
    """Final hidden states of all tokens but each text's last, memory-mapped, and what follows.

    With a readout they are what its `matrix` reads: a head with a bias reads a one beside them.
    """
    states = hidden.store(model, input_ids[:, :-1])
    texts, length, d = states.shape
    states = states.reshape(-1, d)
    return Examples(
        hidden_states=states if readout is None else readout.inputs(states),
        targets=input_ids[:, 1:].flatten().numpy(),
        texts=np.repeat(np.arange(texts), length),
    )


@torch.inference_mode()
def token_losses(data: Examples, heads: Sequence[Head], block: int = 128) -> Losses:
    """Nats a token of each head over its whole vocabulary, `block` tokens at a time.

    Of ascending cuts of one head each only costs the work of the directions that it adds.
    """
    for head in heads:
        data.check(len(head.A), head.B.shape[1])
    places = data.blocks(block)
    parts = device.feed(data[:2], places, heads[0].A.device)
    losses = []
    for states, targets in progress.bar(parts, "measuring heads", len(places)):
        each = _logits(states, heads)
        here = [cross_entropy(logits, targets.long(), reduction="none") for logits in each]
        losses.append(torch.stack(here))
    return torch.cat(losses, 1).double().cpu().numpy()


def _logits(states: Tensor, heads: Sequence[Head]) -> Iterator[Float[Tensor, "tokens vocab"]]:
    before = None
    for head in heads:
        if before is None or not head.extends(before):
            plain = states @ head.B.T @ head.A.T
        else:
            added = slice(len(before.B), len(head.B))
            plain.addmm_(states @ head.B[added].T, head.A[:, added].T)
        yield head.capped(plain)
        before = head


def covariance(
    hidden_states: Float[np.ndarray, "tokens d"], ridge: float = 1e-8, block: int = 8192
) -> Float[Tensor, "d d"]:
    """The second moment C = E[h hᵀ], mean included, in float64.

    To the diagonal `ridge` times its mean is added, as a LayerNorm leaves a direction out.
    """
    count, d = hidden_states.shape
    total = torch.zeros(d, d, dtype=torch.float64)
    for start in range(0, count, block):
        states = np.array(hidden_states[start : start + block], np.float64)
        precise = torch.from_numpy(states)
        total.addmm_(precise.T, precise)
    diagonal = total.diagonal()
    diagonal += ridge * diagonal.mean()
    return total / count


def low_rank(
    weight: Float[Tensor, "vocab d"], rank: int, covariance: Float[Tensor, "d1 d2"] | None = None
) -> Head:
    """The rank-r head A·B nearest to W on the hidden states h that occur.

    min E‖(W − A·B) h‖² = min ‖(W − A·B) C^½‖_F²,  C = E[h hᵀ]

    By Eckart–Young A·B = (W C^½)_r C^−½, where (·)_r keeps the r largest singular values. Without
    a covariance C = I, and this is the truncated SVD of W.

    >>> head = low_rank(torch.diag(torch.tensor([2.0, 1.0])), rank=1)
    >>> (head.A @ head.B).abs().tolist()
    [[2.0, 0.0], [0.0, 0.0]]

    **Raises:** `ValueError` for a rank not in 1 to min(V, d), or a covariance that is singular or
    of another width.

    **Source:** Eckart & Young 1936.
    """
    vocab, d = weight.shape
    if not 1 <= rank <= min(vocab, d):
        raise ValueError(f"rank = {rank}: must be between 1 and {min(vocab, d)}, the smaller side")
    precise = weight.to(device.precise(weight.device), torch.float64)
    root = torch.eye(d).to(precise)
    inverse = root
    if covariance is not None:
        root, inverse = _roots(covariance.to(precise), d)
    # The right singular vectors of W C^½ are the eigenvectors of its Gram matrix, which is d × d.
    gram = root @ (precise.T @ precise) @ root
    ascending = torch.linalg.eigh(gram).eigenvectors
    kept = ascending.flip(1)[:, :rank]
    A = precise @ (root @ kept)
    B = kept.T @ inverse
    return Head(A.to(weight), B.to(weight))


def _roots(
    covariance: Float[Tensor, "d1 d2"], d: int
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    if covariance.shape != (d, d):
        raise ValueError(f"covariance of shape {tuple(covariance.shape)}: the head is {d} wide")
    values, vectors = torch.linalg.eigh(covariance)
    rounding = d * torch.finfo(values.dtype).eps
    if values[0] <= rounding * values[-1]:
        raise ValueError(f"covariance of {d} dimensions: singular; use more hidden states")
    roots = values.sqrt()
    root = (vectors * roots) @ vectors.T
    inverse = (vectors / roots) @ vectors.T
    return root, inverse


def train(
    data: Examples,
    heads: Sequence[Head],
    epochs: int = 2,
    batch: int = 128,
    learning_rate: float = 0.016,
    sampled: int | None = None,
    seed: int = 0,
) -> list[Head]:
    """Train heads of any ranks in one pass over a frozen model's hidden states, by cross-entropy.

    Each batch of tokens is read once and shown to every head in turn; each ends where it would have
    ended alone. Adam's rate falls linearly to zero. It is over √r for A, as a logit is a sum of r
    terms, and times twice B's root mean square for B, whose scale is that of the states.

    A step's softmax runs over the tokens that occur in the text and `sampled` others, drawn afresh
    and weighted by the inverse of their chance. None: over all tokens.

    **Raises:** `ValueError` without a whole batch; `FloatingPointError` if a head diverges: a loss
    that is not finite, or a nat higher at the end than at first.
    """
    for head in heads:
        data.check(len(head.A), head.B.shape[1])
    steps = epochs * (len(data.targets) // batch)
    if steps < 1:
        raise ValueError(
            f"{len(data.targets)} targets, epochs = {epochs}: need an epoch and a batch of {batch}"
        )
    where = heads[0].A.device
    rows = _Rows(data.targets, len(heads[0].A), sampled, seed)
    pupils = [_Pupil(head, rows, learning_rate) for head in heads]
    following = np.searchsorted(rows.seen, data.targets)
    places = _batches(len(following), batch, epochs, seed)
    parts = device.feed([data.hidden_states, following], places, where)
    history = _descend(pupils, progress.bar(parts, "training heads", steps), steps)
    _check_convergence(history, heads)
    return [pupil.finished() for pupil in pupils]


def trained_losses(
    data: Examples, heads: Iterable[Head], tests: Mapping[str, Examples], **training: Any
) -> dict[str, Losses]:
    """`token_losses` on each of the tests, of heads that `train` has trained with these options.

    One head after another is trained and measured, so that memory holds one.
    """
    losses: dict[str, list] = {name: [] for name in tests}
    for head in heads:
        trained = train(data, [head], **training)
        for name, test in tests.items():
            losses[name] += [*token_losses(test, trained)]
    return {name: np.stack(rows) for name, rows in losses.items()}


class _Rows:
    """The rows of A that a step reads: of the tokens that occur, and of a sample of the rest."""

    def __init__(self, targets: np.ndarray, vocab: int, sampled: int | None, seed: int):
        self.seen = np.unique(targets)
        self.sampled = sampled or 0
        if sampled is None or sampled >= vocab - len(self.seen):
            self.seen = np.arange(vocab)
            self.sampled = 0
        self.rest = np.setdiff1d(np.arange(vocab), self.seen)
        self.random = np.random.default_rng(seed)

    def draw(self, where: torch.device) -> tuple[Tensor, float]:
        """Places in `rest`, and the logarithm of a drawn token's weight in the softmax."""
        drawn = self.random.choice(len(self.rest), self.sampled, replace=False)
        weight = len(self.rest) / max(self.sampled, 1)
        return torch.from_numpy(drawn).to(where), math.log(max(weight, 1))


class _Pupil:
    """A head in training: Adam moves the rows that every step reads, a sparse Adam the others."""

    def __init__(self, start: Head, rows: _Rows, learning_rate: float):
        self.start = start
        self.rows = rows
        self.seen = start.A[rows.seen].requires_grad_()
        self.rest = start.A[rows.rest].requires_grad_()
        self.B = start.B.clone().requires_grad_()
        rate = learning_rate / math.sqrt(len(start.B))
        size = start.B.square().mean().sqrt().item()
        self.sparse = {"params": [self.rest], "lr": rate}
        self.dense = [
            {"params": [self.seen], "lr": rate},
            {"params": [self.B], "lr": 2 * learning_rate * size},
        ]

    def logits(self, states: Tensor, drawn: Tensor, raised: float) -> Tensor:
        """Of the tokens that occur, then of those drawn, raised by the log of their weight."""
        seen = Head(self.seen, self.B, self.start.cap).logits(states)
        if not len(drawn):
            return seen
        A = embedding(drawn, self.rest, sparse=True)
        others = Head(A, self.B, self.start.cap).logits(states)
        return torch.cat([seen, others + raised], 1)

    def finished(self) -> Head:
        """The head over the whole vocabulary."""
        A = torch.empty_like(self.start.A)
        A[self.rows.seen] = self.seen.detach()
        A[self.rows.rest] = self.rest.detach()
        B = self.B.detach()
        return self.start._replace(A=A, B=B)


def _descend(pupils: Sequence[_Pupil], parts: Iterable, steps: int) -> Float[Tensor, "steps heads"]:
    """Train on these parts; the losses. Adam's moments, twice the heads' size, are let go here."""
    dense = [group for pupil in pupils for group in pupil.dense]
    sparse = [pupil.sparse for pupil in pupils]
    optimizers = [torch.optim.Adam(dense, fused=True), torch.optim.SparseAdam(sparse)]
    decays = [LinearLR(optimizer, 1, 1 / steps, steps) for optimizer in optimizers]
    where = pupils[0].B.device
    history = torch.zeros(steps, len(pupils), device=where)  # read at the end: no step waits for it
    for step, (states, targets) in enumerate(parts):
        drawn = pupils[0].rows.draw(where)
        for number, pupil in enumerate(pupils):
            loss = cross_entropy(pupil.logits(states, *drawn), targets)
            loss.backward()
            history[step, number] = loss.detach()
        for optimizer, decay in zip(optimizers, decays, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    return history.cpu()


def perplexity(losses: Float[np.ndarray, " tokens"], texts: Texts) -> stats.Estimate:
    """exp(mean loss). Its interval resamples texts, as tokens of one text depend on each other.

    >>> perplexity(np.log([2.0, 2.0, 8.0, 8.0]), np.array([0, 0, 1, 1])).value
    4.0
    """
    return stats.mean(losses, texts).map(math.exp)


class ByRank(NamedTuple):
    """The losses of heads of ascending ranks on the same tokens, in nats; the last one is full."""

    ranks: Sequence[int]
    losses: Losses
    texts: Texts

    def above_full(self) -> pd.DataFrame:
        """A curve to draw: what a token loses at each rank against the full one, with its ends."""
        rows = []
        d = self.ranks[-1]
        full = self.losses[-1]
        for rank, row in zip(self.ranks, self.losses, strict=True):
            above = stats.mean(row - full, self.texts)
            rows.append((rank, rank / d, *above[:3]))
        names = ["rank r", "share r/d", "loss above the full head (nats)", "low", "high"]
        return pd.DataFrame(rows, columns=names)

    def knee(self, tolerance: float = 0.05) -> stats.Estimate:
        """The rank, on a log scale, from which perplexity is within `tolerance` of the full one."""
        allowed = math.log1p(tolerance)

        def crossing(excess: Float[np.ndarray, " ranks"]) -> float:
            if not np.isfinite(excess).all():
                return math.nan
            above = np.flatnonzero(excess > allowed)
            if not len(above):
                return float(self.ranks[0])
            pair = slice(above[-1], above[-1] + 2)
            logarithms = np.log(self.ranks[pair])
            crossed = np.interp(-allowed, -excess[pair], logarithms)
            return math.exp(crossed)

        return self._of_excess(crossing)

    def rank_or_share(self, others: pd.DataFrame) -> stats.Estimate:
        """Does a cut cost models the same at equal rank r, or at equal share r/d of their width d?

        The distance to other models' curves at equal r/d, less that at equal r: root mean squares
        over the ranks below d, of the loss above the full head, in nats. Above 0 the rank itself
        decides (section 5.1: "regardless of the model size"). Too short a training favours that.
        NaN where no rank lies on another's curve, both ways.

        `others` has columns `curve`, `x` (ranks up to that model's d) and `y` (nats).
        """
        own = np.log(self.ranks[:-1])
        found = []
        for _, other in others.sort_values("x").groupby("curve"):
            known = np.log(other["x"].to_numpy())
            losses = other["y"].to_numpy()
            above = losses - losses[-1]
            wider = known[-1] - math.log(self.ranks[-1])
            asked = [own, own + wider]
            at = np.interp(asked, known, above, left=math.nan, right=math.nan)
            found.append(at)
        theirs = np.array(found)  # curves, rank or share, ranks
        both_known = np.isfinite(theirs).all(1, keepdims=True)

        def nearer(excess: Float[np.ndarray, " ranks"]) -> float:
            if not both_known.any():
                return math.nan
            squares = np.square(excess[:-1] - theirs)
            means = squares.mean((0, 2), where=both_known)
            at_rank, at_share = np.sqrt(means)
            return at_share - at_rank

        return self._of_excess(nearer)

    def _of_excess(self, number: Callable[[Float[np.ndarray, " ranks"]], float]) -> stats.Estimate:
        # A number of the curve of mean losses above the full head's.
        _, texts = np.unique(self.texts, return_inverse=True)
        counts = np.bincount(texts)
        by_text = [np.bincount(texts, row) for row in self.losses - self.losses[-1]]
        sums = np.stack(by_text, 1)

        def statistic(weights: Float[np.ndarray, "sets texts"]) -> Float[np.ndarray, " sets"]:
            tokens = weights @ counts
            curves = weights @ sums
            curves /= tokens[:, None]
            numbers = [number(curve) for curve in curves]
            return np.array(numbers)

        return stats.bootstrap(statistic, len(counts))


def against_w_error(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    learnt: Int[Tensor, "texts length"],
    judged: Int[Tensor, "texts length"],
    ranks: Sequence[int],
    **training: Any,
) -> pd.DataFrame:
    """What a model loses with its best heads of these ranks, beside the W-error of its own head.

    The heads are the closed form's on the passages `learnt`. With options of `train` they are
    trained on from there. Their losses are those of the passages `judged`.

    **Returns:** the curve of `ByRank.above_full`, and its column `W-error of the head`.
    """
    readout = models.readout(model, tokenizer, judged)
    weight = readout.matrix()
    full = min(weight.shape)
    kept = [rank for rank in ranks if rank < full] + [full]
    data = examples(model, learnt, readout)
    best = low_rank(weight, full, covariance(data.hidden_states))._replace(cap=readout.cap)
    heads = [best.cut(rank) for rank in kept]
    if training:
        heads = train(data, heads, **training)
    test = examples(model, judged, readout)
    frame = ByRank(kept, token_losses(test, heads), test.texts).above_full()
    error = spectrum.w_error(spectrum.singular_values(weight), kept)
    return frame.assign(**{"W-error of the head": error})


def _batches(states: int, batch: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    # Ascending within a batch, which a disk reads faster. Every epoch has an order of its own.
    for epoch in range(epochs):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(states)
        whole = order[: states // batch * batch].reshape(-1, batch)
        yield from np.sort(whole, axis=1)


def _check_convergence(history: Float[Tensor, "steps heads"], heads: Sequence[Head]) -> None:
    last = history[-max(1, len(history) // 10) :].mean(0)
    for first, end, head in zip(history[0], last, heads, strict=True):
        if not end <= first + 1:
            raise FloatingPointError(
                f"rank {len(head.B)} diverged: loss {first:.3g} nats at first, {end:.3g} at the "
                "end; lower learning_rate"
            )
