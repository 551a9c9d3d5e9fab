"""Singular values of an LM head, and what they say about how many dimensions it uses."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headbound import device

ROWS = 2048  # rows of the head cast to float64 at once: what bounds the extra memory


def singular_values(
    weight: Float[Tensor, "vocab d"], method: Literal["gram", "svd"] = "gram"
) -> Float[np.ndarray, " min(vocab,d)"]:
    """Singular values in descending order, in float64.

    `gram` takes the square roots of the eigenvalues of WᵀW, accumulated in float64 by blocks of rows: fast and
    small in memory, with an absolute error near 1e-8 of the largest value, far below what entropy or W-error can
    see. `svd` is a full float64 SVD: for the smallest values, or a condition number.

    **Raises:** `ValueError` for NaN or Inf, an empty matrix, or an unknown method.
    """
    if method not in ("gram", "svd"):
        raise ValueError(f"method = {method!r}: must be 'gram' or 'svd'")
    if not weight.numel():
        raise ValueError(f"the weight has shape {tuple(weight.shape)}: nothing to decompose")
    weight = weight.detach()
    scale = max(abs(float(end)) for end in weight.aminmax())
    if not np.isfinite(scale):
        raise ValueError("NaN or Inf in the weight; check the checkpoint")
    if scale == 0:
        return np.zeros(min(weight.shape))
    weight = weight if weight.shape[0] >= weight.shape[1] else weight.T
    where = device.precise(weight.device)
    if method == "svd":
        return torch.linalg.svdvals(weight.to(where, torch.float64) / scale).cpu().numpy() * scale
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=where)
    for block in weight.split(ROWS):
        block = block.to(where, torch.float64, copy=True).div_(scale)
        gram.addmm_(block.T, block)
    squares = torch.linalg.eigvalsh(gram).cpu().numpy()
    return np.sqrt(np.clip(squares[::-1], 0, None)) * scale


def probabilities(singular_values: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
    """p_i = σ_i / Σσ.

    **Raises:** `ValueError` for values that are negative, not finite, or all zero.
    """
    if (
        not len(singular_values)
        or not np.isfinite(singular_values).all()
        or (singular_values < 0).any()
    ):
        raise ValueError("singular values must be finite, not negative, and at least one")
    peak = singular_values.max()
    if peak == 0:
        raise ValueError("all singular values are zero: the matrix has no spectrum")
    scaled = singular_values / peak
    return scaled / scaled.sum()


def singular_entropy(singular_values: Float[np.ndarray, " d"]) -> float:
    """KL(p ‖ uniform) = ln d − H(p) in nats, p_i = σ_i / Σσ, 0 ln 0 = 0: 0 for a flat spectrum, ln d for rank one.

    **Source:** Godey et al. 2024, section on the spectral saturation of heads.
    """
    p = probabilities(singular_values)
    kept = p[p > 0]
    # Rounding may leave a flat spectrum a hair below zero.
    return max(0.0, float(np.log(len(p)) + kept @ np.log(kept)))


def effective_rank(singular_values: Float[np.ndarray, " d"]) -> float:
    """exp H(p), between 1 and d (Roy & Vetterli 2007); equals d · exp(−singular entropy)."""
    return len(singular_values) * float(np.exp(-singular_entropy(singular_values)))


def stable_rank(singular_values: Float[np.ndarray, " d"]) -> float:
    """‖W‖²_F / ‖W‖²₂, between 1 and d."""
    scaled = (
        singular_values / singular_values.max()
        if probabilities(singular_values).size
        else singular_values
    )
    return float((scaled**2).sum())


def participation_ratio(singular_values: Float[np.ndarray, " d"]) -> float:
    """(Σσ²)² / Σσ⁴, between 1 and d: the number of directions that carry the variance."""
    probabilities(singular_values)  # raises for what has no spectrum
    squares = (singular_values / singular_values.max()) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum())


def w_error(
    singular_values: Float[np.ndarray, " d"], ranks: Sequence[int]
) -> Float[np.ndarray, " ranks"]:
    """Relative error of the best rank-r head, sqrt(Σ_{i>r} σ_i²) / ‖W‖_F, for each r.

    **Raises:** `ValueError` for a rank below 0 or above d.

    **Source:** Eckart & Young 1936; Godey et al. 2024, section on the head's target rank.
    """
    probabilities(singular_values)
    d = len(singular_values)
    for rank in ranks:
        if not 0 <= rank <= d:
            raise ValueError(
                f"rank = {rank}: must be between 0 and {d}, the number of singular values"
            )
    # Summed from the smallest, so that a small tail keeps its digits.
    squares = (np.sort(singular_values) / singular_values.max()) ** 2
    tails = np.concatenate([[0.0], np.cumsum(squares)])[::-1]
    return np.sqrt(tails[list(ranks)] / tails[0])


def marchenko_pastur(
    x: Float[np.ndarray, " points"], vocab: int, d: int, scale: float
) -> Float[np.ndarray, " points"]:
    """Limit density of the singular values of a `vocab` × `d` Gaussian matrix with entries of deviation `scale`.

    **Source:** Marchenko & Pastur 1967, for singular values by x = σ: the law of σ² / vocab with ratio d / vocab.
    """
    ratio = d / vocab
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    square = (x / scale) ** 2 / vocab
    inside = np.clip((high - square) * (square - low), 0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.sqrt(inside) / (np.pi * ratio * x)
    return np.where(inside > 0, density, 0.0)
