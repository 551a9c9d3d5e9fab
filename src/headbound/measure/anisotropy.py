"""Anisotropy: the mean cosine between hidden states, exact and in one pass."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headbound import device
from headbound.stats import Estimate, bootstrap

ROWS, PIECE = (
    4096,
    256,
)  # rows normalised at once, which bounds the extra memory, and multiplied at once
SAFE = (1e-12, 1e12)  # norms whose squares neither vanish nor overflow in float32


def mean_cosine(
    hidden_states: Float[Tensor, "tokens d"] | Iterable[Float[Tensor, "_ d"]],
    sink_ratio: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    r"""Mean of cos(h_i, h_j) over all pairs i ≠ j, exactly, in O(N d).

    With unit vectors u_i the sum over all pairs is ‖Σ u_i‖², so A = (‖Σ u_i‖² − N) / (N (N − 1)). Blocks of rows
    are summed in float32 (float64 if they come so) and their sums in float64: within about 1e-6 of the exact value.

    **Arguments:**

    - `hidden_states`: (tokens, d), or an iterable of such blocks, one block a text. Texts are the units of the
      bootstrap: in a resample, pairs of two texts count by the product of their multiplicities and pairs inside a
      text by its multiplicity, so that no token meets its own copy. One block alone has no interval, nor have texts
      so few and short that a resample can be left without a pair: NaN. Empty blocks don't count.
    - `sink_ratio`: leave out tokens whose norm exceeds this many times the median norm of their block.

    **Returns:** the mean cosine, in [-1, 1]; `n` is the number of texts.

    **Raises:** `ValueError` for NaN or Inf, a zero-norm hidden state, or fewer than two tokens.

    **Source:** Godey et al. 2024, section on anisotropy; Ethayarajh 2019.
    """
    blocks = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
    sums, counts = [], []
    for block in blocks:
        kept = block if sink_ratio is None else block[~sinks(block, sink_ratio)]
        if len(kept):
            sums.append(sum_of_units(kept).cpu().numpy())
            counts.append(len(kept))
    return _over_texts(
        np.stack(sums) if sums else np.zeros((0, 1)), np.asarray(counts, float), resamples, seed
    )


def by_layer(
    states: Iterable[Float[Tensor, "layers _ length d"]],
    sink_ratios: Sequence[float | None] = (None,),
    resamples: int = 1000,
    seed: int = 0,
) -> list[list[Estimate]]:
    """`mean_cosine` of every layer from one pass over `hidden.stream`, texts as units, for each sink ratio.

    **Returns:** a list for each of `sink_ratios`, of one estimate a layer.

    **Raises:** `ValueError` as `mean_cosine` does, or if the stream is empty.
    """
    sums, counts = [], []
    for batch in states:
        for text in batch.unbind(1):
            kept = [[x if r is None else x[~sinks(x, r)] for x in text] for r in sink_ratios]
            sums.append([[sum_of_units(x).cpu().numpy() for x in layers] for layers in kept])
            counts.append([[len(x) for x in layers] for layers in kept])
    if not sums:
        raise ValueError("no hidden states: the stream is empty; give it at least one text")
    unit_sums, tokens = np.array(sums), np.array(counts, float)
    ratios, layers = tokens.shape[1:]
    return [
        [_over_texts(unit_sums[:, r, i], tokens[:, r, i], resamples, seed) for i in range(layers)]
        for r in range(ratios)
    ]


def sinks(hidden_states: Float[Tensor, "tokens d"], ratio: float = 10.0) -> Bool[Tensor, " tokens"]:
    """Which tokens have a norm above `ratio` times the median norm: attention sinks, mostly a text's first token.

    **Raises:** `ValueError` if `ratio` is not above one.
    """
    if not ratio > 1:
        raise ValueError(f"sink_ratio = {ratio}: must be above 1, a multiple of the median norm")
    # In float64, where the squares of float32's smallest and largest numbers still fit.
    norms = hidden_states.to(device.precise(hidden_states.device), torch.float64).norm(dim=1)
    return (norms > ratio * norms.median()).to(hidden_states.device)


def sum_of_units(hidden_states: Float[Tensor, "tokens d"]) -> Float[Tensor, " d"]:
    """Σ h_i / ‖h_i‖ in float64, block by block.

    **Raises:** `ValueError` for NaN or Inf, or a zero-norm hidden state.
    """
    where = device.precise(hidden_states.device)
    total = torch.zeros(hidden_states.shape[1], dtype=torch.float64, device=where)
    for first in range(0, len(hidden_states), ROWS):
        block = hidden_states[first : first + ROWS]
        block = block if block.dtype == torch.float64 else block.float()
        norms = torch.linalg.vector_norm(block, dim=1)
        if not ((norms > SAFE[0]) & (norms < SAFE[1])).all():  # also where a norm is NaN
            block, norms = _rescaled(block, first)
        weights, whole = 1 / norms, len(block) // PIECE * PIECE
        # Many short products keep all cores busy, which one long product of a vector does not.
        pieces = torch.bmm(
            weights[:whole].view(-1, 1, PIECE), block[:whole].reshape(-1, PIECE, block.shape[1])
        )
        total += pieces.to(where, torch.float64).sum((0, 1)) + (weights[whole:] @ block[whole:]).to(
            total
        )
    return total


def cosines(
    hidden_states: Float[Tensor, "tokens d"], count: int, seed: int = 0
) -> Float[Tensor, " count"]:
    """Cosines of `count` random pairs i ≠ j, for a histogram: what the mean hides.

    **Raises:** `ValueError` as `mean_cosine` does.
    """
    tokens = len(hidden_states)
    if tokens < 2:
        raise ValueError(f"{tokens} hidden states: a pair needs two")
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(tokens, (count,), generator=generator)
    j = (i + torch.randint(1, tokens, (count,), generator=generator)) % tokens
    sum_of_units(hidden_states)  # raises for what has no direction
    hidden_states = hidden_states.to(device.precise(hidden_states.device), torch.float64)
    units = [torch.nn.functional.normalize(_peak_one(hidden_states[k]), dim=1) for k in (i, j)]
    return (units[0] * units[1]).sum(1)


def _rescaled(block: Tensor, first: int) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(block).all(1)
    if not finite.all():
        raise ValueError(
            f"hidden state {first + int((~finite).nonzero()[0])} has NaN or Inf; run the model in float32"
        )
    peaks = block.abs().amax(1)
    if (peaks == 0).any():
        raise ValueError(
            f"hidden state {first + int((peaks == 0).nonzero()[0])} is zero: it has no direction; leave it out"
        )
    block = _peak_one(block.to(device.precise(block.device), torch.float64))
    return block, torch.linalg.vector_norm(block, dim=1)


def _peak_one(rows: Tensor) -> Tensor:
    return rows / rows.abs().amax(1, keepdim=True)


def _over_texts(
    unit_sums: Float[np.ndarray, "texts d"],
    tokens: Float[np.ndarray, " texts"],
    resamples: int,
    seed: int,
) -> Estimate:
    if tokens.sum() < 2:
        raise ValueError(f"{int(tokens.sum())} hidden states: a mean over pairs needs at least two")
    squares = (unit_sums**2).sum(1)

    def statistic(weights: Float[np.ndarray, "sets texts"]) -> Float[np.ndarray, " sets"]:
        between = ((weights @ unit_sums) ** 2).sum(1) - weights**2 @ squares
        pairs = (weights @ tokens) ** 2 - weights**2 @ tokens**2
        within = weights @ (squares - tokens)
        pairs += weights @ (tokens**2 - tokens)
        # Rounding may leave equal directions a hair above one.
        mean = np.divide(
            between + within, pairs, out=np.full(len(pairs), math.nan), where=pairs != 0
        )
        return np.clip(mean, -1, 1)

    return bootstrap(statistic, len(tokens), resamples, seed)
