"""Anisotropy: the mean cosine between hidden states, exact and in one pass."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headbound import device, stats
from headbound.stats import Estimate

States = Float[Tensor, "tokens d"]
ROWS = 1024  # states normalised at once: what bounds the extra memory


def mean_cosine(
    hidden_states: States | Iterable[Float[Tensor, "_ d"]], resamples: int = 1000, seed: int = 0
) -> Estimate:
    """The mean of cos(hᵢ, hⱼ) over all pairs i ≠ j, exactly, from the sum of the unit vectors uᵢ.

        A = (‖Σ uᵢ‖² − N) / (N (N − 1))

    The states come in one block, or one a text. Texts are the units of the bootstrap: a token never
    meets its own copy. One block, or a resample without a pair, has no interval (NaN).

    **Raises:** `ValueError` for NaN, Inf, a zero state, or fewer than two states.

    **Source:** Godey et al. 2024, section 4.1.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])).value
    0.3333333333333333
    """
    blocks = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
    parts = [_part(block) for block in blocks if len(block)]
    return _over_texts(parts, resamples, seed)


def by_layer(
    states: Iterable[Float[Tensor, "layers _ length d"]],
    sink_ratios: Sequence[float | None] = (None,),
    resamples: int = 1000,
    seed: int = 0,
) -> list[list[Estimate]]:
    """`mean_cosine` of every layer from one pass over `hidden.stream`, for each sink ratio.

    The `sinks` of each text are left out, and states that are zero, which have no direction.

    **Raises:** `ValueError` as `mean_cosine` does, or if the stream is empty.
    """
    parts = defaultdict(list)
    for batch in states:
        for layer, texts in enumerate(batch):
            for text in texts:
                some = text[text.ne(0).any(1)]
                for ratio in sink_ratios:
                    kept = some if ratio is None else some[~sinks(some, ratio)]
                    parts[ratio, layer].append(_part(kept))
    if not parts:
        raise ValueError("no hidden states: the stream is empty; give it at least one text")
    layers = sorted({layer for _, layer in parts})
    return [
        [_over_texts(parts[ratio, layer], resamples, seed) for layer in layers]
        for ratio in sink_ratios
    ]


def sinks(hidden_states: States, ratio: float = 10.0) -> Bool[Tensor, " tokens"]:
    """Which states are longer than `ratio` times the median: attention sinks, mostly first tokens.

    **Raises:** `ValueError` if `ratio` is not above one.
    """
    if not ratio > 1:
        raise ValueError(f"sink_ratio = {ratio}: must be above 1, a multiple of the median norm")
    where = device.precise(hidden_states.device)
    norms = hidden_states.to(where, torch.float64).norm(dim=1)
    return (norms > ratio * norms.median()).to(hidden_states.device)


def sum_of_units(hidden_states: States) -> Float[Tensor, " d"]:
    """Σ hᵢ / ‖hᵢ‖, in float64: the squares of a state's numbers may be out of float32's range.

    **Raises:** `ValueError` for NaN, Inf or a zero state.
    """
    where = device.precise(hidden_states.device)
    total = torch.zeros(hidden_states.shape[1], dtype=torch.float64, device=where)
    for place, block in enumerate(hidden_states.split(ROWS)):
        rows = block.detach().to(where, torch.float64)
        norms = _norms(rows, place * ROWS)
        total += (1 / norms) @ rows
    return total


def cosines(hidden_states: States, count: int, seed: int = 0) -> Float[Tensor, " count"]:
    """Cosines of `count` random pairs i ≠ j. **Raises:** `ValueError` as `mean_cosine` does."""
    tokens = len(hidden_states)
    if tokens < 2:
        raise ValueError(f"{tokens} hidden states: a pair needs two")
    where = device.precise(hidden_states.device)
    rows = hidden_states.to(where, torch.float64)
    norms = _norms(rows, 0)
    units = rows / norms[:, None]
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(tokens, (count,), generator=generator)
    other = (one + torch.randint(1, tokens, (count,), generator=generator)) % tokens
    return (units[one] * units[other]).sum(1)


def _norms(rows: Tensor, first: int) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1)
    problems = {"is zero: it has no direction": norms == 0, "has NaN or Inf": ~norms.isfinite()}
    for problem, wrong in problems.items():
        if wrong.any():
            raise ValueError(f"hidden state {first + int(wrong.int().argmax())} {problem}")
    return norms


def _part(block: Tensor) -> tuple[np.ndarray, int]:
    return sum_of_units(block).cpu().numpy(), len(block)


def _over_texts(parts: list[tuple[np.ndarray, int]], resamples: int, seed: int) -> Estimate:
    tokens = np.array([count for _, count in parts], float)
    if tokens.sum() < 2:
        raise ValueError(f"{int(tokens.sum())} hidden states: a mean over pairs needs at least two")
    units = np.array([total for total, _ in parts])
    squares = (units**2).sum(1)

    def statistic(weights: np.ndarray) -> np.ndarray:
        # Pairs of two texts count by the product of their weights, those inside one by its own.
        own = weights - weights**2
        single = weights @ tokens
        sum_of_all = weights @ units
        between = (sum_of_all**2).sum(1)
        sums = between + own @ squares - single
        pairs = single**2 + own @ tokens**2 - single
        nothing = np.full(len(pairs), math.nan)
        mean = np.divide(sums, pairs, out=nothing, where=pairs != 0)
        return np.clip(mean, -1, 1)  # rounding may leave equal directions a hair above one

    return stats.bootstrap(statistic, len(tokens), resamples, seed)
