"""The head as a bottleneck of gradients: how much of the logits' gradient can pass through d dimensions.

The cross-entropy of one token has the gradient g = p − e_y by its logits (p the probabilities, e_y the target's
unit vector). The hidden state under the head W (V × d) receives Wᵀg: the part of g orthogonal to W's columns is lost.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from headbound import device, progress, stats
from headbound.measure.lowrank import Examples
from headbound.measure.spectrum import ROWS

NOISE = 1e-12  # a squared singular value below this share of the largest is rounding (columns scaled to one norm)


class Squares(NamedTuple):
    """Squared norms, one a token: of g, of its projection on W's columns, and of its part along W Wᵀg alone."""

    gradient: Float64[np.ndarray, " tokens"]
    kept: Float64[np.ndarray, " tokens"]
    along: Float64[np.ndarray, " tokens"]
    texts: Int[np.ndarray, " tokens"]

    def share(
        self,
        part: str = "kept",
        where: Bool[np.ndarray, " tokens"] | None = None,
        power: float = 1.0,
    ) -> stats.Estimate:
        """(Σ part / Σ gradient) ** power over the tokens of `where` (or all), its interval by bootstrap over texts.

        With power 1 a share of the squared norm, which adds up over orthogonal parts and over tokens: for `kept`
        it is ‖G P‖_F² / ‖G‖_F² of the batch. With power ½ the share of the norm. NaN where every gradient is zero.

        **Raises:** `ValueError` if `where` chooses no token.
        """
        chosen = np.ones(len(self.texts), bool) if where is None else where
        if not chosen.any():
            raise ValueError(
                "where chooses no token: a share needs at least one; widen it or give more text"
            )
        passed, whole = getattr(self, part)[chosen], self.gradient[chosen]
        return stats.mean(passed, self.texts[chosen], whole).map(lambda share: share**power)


@torch.inference_mode()
def share_kept(data: Examples, weight: Float[Tensor, "vocab d"], block: int = 128) -> Squares:
    """How much of each token's logit gradient g passes through the head W; `Squares.share` sums it up.

    What passes is P g with P = W (WᵀW)⁺ Wᵀ: Wᵀg is a function of it, and it of Wᵀg. ‖P g‖² = ‖Bᵀ Wᵀg‖² where
    W B is orthonormal. A step of the hidden state down its gradient moves the logits along −W Wᵀg; the part of g
    in that one direction has the square ‖Wᵀg‖⁴ / ‖W Wᵀg‖². In float64, `block` tokens at a time: nothing beside
    the arguments is larger than block × V. With the mean row of W removed g is the same and P spends none of its
    dimensions on what the softmax ignores.

    **Arguments:**

    - `data`: hidden states, targets and texts, as of `lowrank.examples`.
    - `weight`: the head W. A direction that is there by rounding alone (`NOISE`) is none of P's.
    - `block`: tokens at once.

    **Raises:** `ValueError` for no token or block, a width or targets that do not fit the head, NaN or Inf.

    **Source:** Godey & Artzi 2026, arXiv 2603.10145; the definition of what is kept is ours.
    """
    _check(data, weight, block)
    gram = _gram(weight)
    norms = torch.where(gram.diagonal() > 0, gram.diagonal().sqrt(), 1)
    values, vectors = torch.linalg.eigh(gram / norms / norms[:, None])
    there = values > NOISE * values[-1]
    basis = vectors[:, there] / values[there].sqrt() / norms[:, None]
    values, vectors = torch.linalg.eigh(
        _gram(weight, basis)
    )  # again, for the digits that squaring cost
    basis = basis @ (vectors / values.sqrt())
    squares = np.empty((3, len(data.targets)))
    places = [slice(start, start + block) for start in range(0, len(data.targets), block)]
    parts = device.feed(data[:2], places, gram.device)
    for here, (states, targets) in zip(progress.bar(places, "gradients"), parts, strict=True):
        targets = targets.long()[:, None]
        g = torch.softmax(torch.cat([states.double() @ rows.T for rows in _rows(weight)], 1), 1)
        # Minus the sum of the others, not p − 1: that cancels where the model is sure.
        g = g.scatter(1, targets, 0)
        g.scatter_(1, targets, -g.sum(1, keepdim=True))
        received = sum(
            part @ rows for part, rows in zip(g.split(ROWS, 1), _rows(weight), strict=True)
        )
        moved = (received @ gram * received).sum(1)
        along = torch.where(moved > 0, received.square().sum(1) ** 2 / moved, 0)
        squares[:, here] = torch.stack(
            [g.square().sum(1), (received @ basis).square().sum(1), along]
        ).cpu()
    return Squares(*squares, data.texts)


@torch.inference_mode()
def singular_values(
    data: Examples, weight: Float[Tensor, "vocab d"]
) -> Float64[np.ndarray, " tokens"]:
    """Singular values of G (tokens × V), descending: what the best subspace of any dimension could keep of it.

    By Eckart–Young no r-dimensional subspace keeps more of ‖G‖_F² than Σ_{j≤r} σ_j². From the tokens × tokens
    matrix G Gᵀ, a block of the vocabulary at a time: for a few thousand tokens.

    **Arguments**, **Raises:** as `share_kept`.
    """
    _check(data, weight, 1)
    where = device.precise(weight.device)
    states, targets = (torch.tensor(np.asarray(x)).to(where) for x in data[:2])
    parts = [torch.logsumexp(states.double() @ rows.T, 1) for rows in _rows(weight)]
    scale, start = torch.stack(parts).logsumexp(0)[:, None], 0
    gram = torch.zeros(len(states), len(states), dtype=torch.float64, device=where)
    for rows in _rows(weight):
        g = (states.double() @ rows.T - scale).exp_()
        token = torch.arange(start, start := start + len(rows), device=where)
        g -= (targets[:, None] == token).double()
        gram.addmm_(g, g.T)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt().cpu().numpy()


def circle(
    vocab: int, loss: float
) -> tuple[Float64[Tensor, "vocab 2"], Float64[Tensor, "vocab 2"]]:
    """Hidden states and a head of rank 2 for "the next token is this one", with at most `loss` nats of loss.

    Both lie on a circle at angles 2πv/V: the logit z_xv = s cos(2π(x − v)/V) is largest at v = x, by at least
    s (1 − cos(2π/V)), so that log(1 + Σ_{v≠x} e^{z_xv − z_xx}) ≤ (V − 1) e^{−s (1 − cos(2π/V))} = `loss`.
    """
    angles = 2 * math.pi * torch.arange(vocab, dtype=torch.float64) / vocab
    head = torch.stack([angles.cos(), angles.sin()], 1)
    return head * math.log((vocab - 1) / loss) / (2 * math.sin(math.pi / vocab) ** 2), head


def _rows(weight: Tensor) -> Iterator[Tensor]:
    """The head in float64, a block of rows at a time."""
    return (rows.to(device.precise(weight.device), torch.float64) for rows in weight.split(ROWS))


def _gram(weight: Tensor, basis: Tensor | None = None) -> Tensor:
    parts = (rows if basis is None else rows @ basis for rows in _rows(weight))
    return sum(part.T @ part for part in parts)


def _check(data: Examples, weight: Tensor, block: int) -> None:
    states, targets = data.hidden_states, data.targets
    fits = len(states) == len(targets) > 0 and states.shape[1] == weight.shape[1] and block > 0
    if not fits or targets.min() < 0 or targets.max() >= len(weight):
        raise ValueError(
            f"block = {block}, states {states.shape}, targets {min(targets, default='none')} to "
            f"{max(targets, default='none')}: they must fit a head of shape {tuple(weight.shape)}, at least one token; "
            "take head, states and targets from one model"
        )
    if not (torch.isfinite(weight).all() and np.isfinite(states).all()):
        raise ValueError(
            "NaN or Inf in the head or the hidden states; check the checkpoint, run it in float32"
        )
