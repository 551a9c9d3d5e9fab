"""Cross-entropy of a large head without ever holding its logits: tokens go through it block by block."""

import importlib.util
import math

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

from headbound import stats


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
        raise ValueError(f"block = {block}, tokens = {len(targets)}: both must be at least 1; give more text")
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


def perplexity(losses: Float[np.ndarray, " tokens"], texts: Int[np.ndarray, " tokens"]) -> stats.Estimate:
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
