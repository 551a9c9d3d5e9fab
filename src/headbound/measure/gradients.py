"""How much of the logits' gradient passes through the head to the network below it.

The cross-entropy of one token has the gradient g = p − e_y by its logits: p the probabilities, e_y
the target's unit vector. The hidden state under the head W (V × d) receives Wᵀg. The part of g that
is orthogonal to W's columns is lost on the way.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from headbound import device, progress, stats
from headbound.measure.lowrank import Examples
from headbound.measure.spectrum import ROWS

NOISE = 1e-12  # a squared singular value below this share of their sum is rounding
Weight = Float[Tensor, "vocab d"]
Logits = Callable[[Tensor], Tensor] | None


class _Squares(NamedTuple):
    """‖g‖² of each token, and the square of what of g lies in the span of the head's columns."""

    gradient: Float64[np.ndarray, " tokens"]
    kept: Float64[np.ndarray, " tokens"]
    texts: Int[np.ndarray, " tokens"]

    def share(self, where: Bool[np.ndarray, " tokens"] | None = None) -> stats.Estimate:
        """Σ kept / Σ gradient over the tokens of `where`, or all. Texts are resampled."""
        chosen = slice(None) if where is None else where
        return stats.mean(self.kept[chosen], self.texts[chosen], self.gradient[chosen])


@torch.inference_mode()
def share_kept(data: Examples, weight: Weight, block: int = 128, logits: Logits = None) -> _Squares:
    """How much of each token's logit gradient passes through the head W, exactly, in float64.

    It is ‖Uᵀg‖², with the columns of U = W·B an orthonormal basis of W's. W is best without its
    mean row, which the softmax ignores. Its singular values below a millionth of the largest
    count as none. `logits` makes logits of states, such as a readout's; without it W alone does.
    Beside the arguments nothing is larger than `block` × V.

    **Raises:** `ValueError` for no token, sizes that do not fit, NaN or Inf.

    **Source:** Godey & Artzi 2026, arXiv 2603.10145; what is kept is defined by us.
    """
    _check(data, weight)
    basis = _orthonormal(weight)
    squares = []
    for here in progress.bar(data.blocks(block), "gradients"):
        g = _gradient(data, here, weight, logits)
        parts = zip(g.split(ROWS, 1), _rows(weight), strict=True)
        received = sum(part @ rows for part, rows in parts)
        projected = received @ basis
        both = [x.square().sum(1) for x in (g, projected)]
        squares.append(torch.stack(both).cpu())
    gradient, kept = torch.cat(squares, 1).numpy()
    return _Squares(gradient, kept, data.texts)


def _orthonormal(weight: Weight) -> Float64[Tensor, "d rank"]:
    """The matrix B for which the columns of W·B are an orthonormal basis of W's column space.

    From WᵀW = Q Λ Qᵀ follows B = Q Λ^(−½), but squaring W costs half of the digits. A second round
    on W·B, whose columns are orthonormal but for that, wins them back.

    **Source:** Stathopoulos & Wu 2002 (SVQB), twice.
    """
    parts = (rows.square().sum(0) for rows in _rows(weight))
    squares = sum(parts)
    # Columns of one length first: a short one would look like rounding.
    basis = torch.where(squares > 0, squares, 1).rsqrt().diag()
    for _round in range(2):
        parts = (rows @ basis for rows in _rows(weight))
        gram = sum(part.T @ part for part in parts)
        values, vectors = torch.linalg.eigh(gram)
        there = values > NOISE * values.sum()
        scaled = vectors[:, there] / values[there].sqrt()
        basis = basis @ scaled
    return basis


@torch.inference_mode()
def singular_values(
    data: Examples, weight: Weight, block: int = 768, logits: Logits = None
) -> Float64[np.ndarray, " tokens"]:
    """Singular values of G (tokens × V), the largest first, from G Gᵀ: for a few thousand tokens.

    No r-dimensional subspace keeps more of ‖G‖_F² than Σ_{j≤r} σ_j². Else as `share_kept`.
    """
    _check(data, weight)
    tokens = len(data.targets)
    products = np.empty((tokens, tokens))
    places = data.blocks(block)
    for number, here in enumerate(places):
        g = _gradient(data, here, weight, logits)
        for there in places[: number + 1]:
            others = g if there == here else _gradient(data, there, weight, logits)
            products[here, there] = (g @ others.T).cpu()
    squares = np.linalg.eigvalsh(products, "L")
    return np.sqrt(squares[::-1].clip(0))


def lost(share: stats.Estimate) -> dict[str, stats.Estimate]:
    """Three readings of what is lost where the share κ of the squared norm is kept.

    >>> [round(reading.value, 2) for reading in lost(stats.Estimate(0.04, 0.01, 0.09, 48)).values()]
    [0.96, 0.8, 0.98]
    """
    readings = {
        "1 − κ, of the squared norm": lambda kept: 1 - kept,
        "1 − √κ, how much shorter the norm gets": lambda kept: 1 - kept**0.5,
        "√(1 − κ), the norm of what is lost": lambda kept: (1 - kept) ** 0.5,
    }
    ends = [share.value, share.high, share.low]  # more kept is less lost
    return {name: stats.Estimate(*map(f, ends), share.n) for name, f in readings.items()}


def _gradient(data: Examples, here: slice, weight: Tensor, logits: Logits) -> Tensor:
    where = device.precise(weight.device)
    states = torch.tensor(data.hidden_states[here]).to(where, torch.float64)
    targets = torch.tensor(data.targets[here]).to(where, torch.int64)
    targets = targets[:, None]
    if logits is None:
        scores = torch.cat([states @ rows.T for rows in _rows(weight)], 1)
    else:
        scores = logits(states)
    others = torch.softmax(scores, 1).scatter(1, targets, 0)
    # Minus the sum of the others, not p − 1: that cancels where the model is sure.
    return others.scatter(1, targets, -others.sum(1, keepdim=True))


def _rows(weight: Weight) -> Iterator[Float64[Tensor, "_ d"]]:
    where = device.precise(weight.device)
    return (rows.to(where, torch.float64) for rows in weight.split(ROWS))


def _check(data: Examples, weight: Tensor) -> None:
    data.check(*weight.shape)
    if not (torch.isfinite(weight).all() and np.isfinite(data.hidden_states).all()):
        raise ValueError("NaN or Inf in the head or the states; run the checkpoint in float32")
