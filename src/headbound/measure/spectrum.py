"""Singular values of a matrix such as the head, and how evenly they use its dimensions."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.stats import spearmanr
from torch import Tensor

from headbound import device, stats

ROWS = 2048  # rows cast to float64 at once: what bounds the extra memory
Values = Float[np.ndarray, " values"]


def singular_values(weight: Float[Tensor, "rows d"]) -> Values:
    """All singular values, the largest first, to about 1e-8 of the largest.

    They are the roots of the eigenvalues of the smaller Gram matrix, in float64.

    **Raises:** `ValueError` for NaN, Inf or an empty matrix.

    >>> singular_values(torch.diag(torch.tensor([1.0, 2.0, 0.0])))
    array([2., 1., 0.])
    """
    if not weight.numel():
        raise ValueError(f"the weight has shape {tuple(weight.shape)}: nothing to decompose")
    wide = weight.shape[0] < weight.shape[1]
    gram = _gram(weight.T if wide else weight)
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return squares.sqrt().cpu().numpy()


def singular_entropy(singular_values: Values) -> float:
    """The divergence of p = σ / Σσ from the uniform distribution, in nats.

        KL(p ‖ uniform) = ln d − H(p)

    It is 0 for a flat spectrum and ln d for rank one. **Source:** Godey et al. 2024, section 4.2.

    >>> singular_entropy(np.array([1.0, 1.0, 1.0]))
    0.0
    """
    p = _probabilities(singular_values)
    kept = p[p > 0]
    return max(0.0, float(np.log(len(p)) + kept @ np.log(kept)))  # rounding may go below zero


def effective_rank(singular_values: Values) -> float:
    """exp H(p) = d · exp(−singular entropy), between 1 and d. **Source:** Roy & Vetterli 2007."""
    return len(singular_values) * float(np.exp(-singular_entropy(singular_values)))


def stable_rank(singular_values: Values) -> float:
    """‖W‖²_F / σ₁², between 1 and d."""
    p = _probabilities(singular_values)
    return float(((p / p.max()) ** 2).sum())


def participation_ratio(singular_values: Values) -> float:
    """(Σσ²)² / Σσ⁴, between 1 and d: the number of directions that carry the squared norm."""
    squares = _probabilities(singular_values) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum())


def w_error(singular_values: Values, ranks: Sequence[int]) -> Float[np.ndarray, " ranks"]:
    """Relative error of the best matrix of rank r, √(Σ_{i>r} σᵢ²) / ‖W‖_F, for each r.

    **Raises:** `ValueError` for a rank below 0 or above d. **Source:** Eckart & Young 1936.
    """
    squares = np.sort(_probabilities(singular_values)) ** 2
    tails = np.append(0.0, squares.cumsum())[::-1]  # from the smallest, which keeps its digits
    asked = np.array(ranks, int)
    for rank in asked:
        if not 0 <= rank < len(tails):
            raise ValueError(f"rank = {rank}: must be between 0 and {len(squares)}")
    return np.sqrt(tails[asked] / tails[0])


def frequency_link(
    weight: Float[Tensor, "vocab d"], counts: Int[np.ndarray, " vocab"], groups: int = 10
) -> tuple[stats.Estimate, Float[np.ndarray, " vocab"]]:
    """Spearman's correlation of tokens' loadings on the first singular direction with their counts.

    Token v loads w_v · v₁; the direction is turned so that the correlation is not negative. Tokens
    that never occur are left out. The interval leaves out one group of tokens at a time.

    **Returns:** the correlation and the loadings.
    """
    group = np.random.default_rng(0).integers(groups, size=len(weight))
    grams = [_gram(weight[torch.from_numpy(group == g)]) for g in range(groups)]
    gram = sum(grams)
    first = _first_direction(gram)
    rows = weight.detach().double().cpu()
    occurs = counts > 0

    def link(direction: Float64[Tensor, " d"], kept: np.ndarray) -> float:
        seen = kept & occurs
        loadings = (rows @ direction).numpy()
        return float(spearmanr(loadings[seen], counts[seen]).statistic)

    if link(first, occurs) < 0:
        first = -first
    without = []
    for g in range(groups):
        direction = _first_direction(gram - grams[g])
        direction *= torch.sign(direction @ first)
        without.append(link(direction, group != g))
    return stats.jackknife(without, link(first, occurs)), (rows @ first).numpy()


def _probabilities(singular_values: Values) -> Values:
    values = singular_values
    if not len(values) or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("singular values must be finite, not negative, and at least one")
    if values.max() == 0:
        raise ValueError("all singular values are zero: the matrix has no spectrum")
    scaled = values / values.max()
    return scaled / scaled.sum()


def _gram(weight: Float[Tensor, "rows d"]) -> Float64[Tensor, "d d"]:
    where = device.precise(weight.device)
    total = 0
    for block in weight.detach().split(ROWS):
        rows = block.to(where, torch.float64)
        total += rows.T @ rows
    if not torch.as_tensor(total).isfinite().all():
        raise ValueError("NaN or Inf in the weight; check the checkpoint")
    return total


def _first_direction(gram: Float64[Tensor, "d d"]) -> Float64[Tensor, " d"]:
    return torch.linalg.eigh(gram).eigenvectors[:, -1].cpu()
