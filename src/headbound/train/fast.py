"""The expensive parts of a small model's training step, exact and fast on one core.

A narrow model spends its time on logits and attention scores, which have far more entries than
weights. Both functions here keep these entries in the processor's cache and never normalise them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPTNeoXModel, PreTrainedModel

SAFE = 60.0  # exp of numbers up to this neither overflows nor vanishes in a float32 sum
TOKENS = 256  # a block of logits, which stays in the cache for a vocabulary of a few thousand
LOSS_SCALE = 2.0**12  # what the loss is multiplied by for float16, Pythia's first scale


def _rounded(numbers: Tensor, precision: torch.dtype) -> Tensor:
    """The nearest numbers of a 16-bit format, in their own one; the gradient passes as it is."""
    if precision == torch.float32:
        return numbers
    error = numbers.to(precision).to(numbers.dtype) - numbers
    return numbers + error.detach()


def states(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch length"],
    precision: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "batch length d"], Float[Tensor, "batch length d"]]:
    """The last hidden states of a GPT-NeoX, before and after the final norm.

    They are those of the model's own forward pass up to rounding, in about three quarters of the
    time, and are rounded to `precision` after each layer and after the final norm. The model has
    parallel residuals and no dropout, as every `Recipe` makes it.
    """
    body = model.base_model
    cosines, sines = _angles(body, tokens)
    hidden = _rounded(body.embed_in(tokens), precision)
    for layer in body.layers:
        attention = layer.attention
        heads = hidden.shape[-1] // attention.head_size
        mixed = attention.query_key_value(layer.input_layernorm(hidden))
        attended = _Attention.apply(mixed, cosines, sines, heads)
        normed = layer.post_attention_layernorm(hidden)
        hidden = hidden + attention.dense(attended) + layer.mlp(normed)
        hidden = _rounded(hidden, precision)
    normed = body.final_layer_norm(hidden)
    return hidden, _rounded(normed, precision)


class _Attention(torch.autograd.Function):
    """Causal softmax attention with rotary positions, both passes written out.

    With E = exp(q·k/√n) below the diagonal and z its row sums, the output is E v / z. The
    gradient of a score is E ∘ (g/z · v − g·o/z), so that the softmax is never stored.
    """

    @staticmethod
    def forward(ctx, mixed, cosines, sines, heads):
        # From the mixed projection, batch × length × 3 heads n, to batch × length × heads n.
        batch, length, width = mixed.shape
        size = width // (3 * heads)
        parts = mixed.view(batch, length, heads, 3, size)
        parts = parts.permute(3, 0, 2, 1, 4)
        parts = parts.clone(memory_format=torch.contiguous_format)
        parts = parts.view(3, batch * heads, length, size)
        _rotate(parts[:2], cosines, sines)
        query, key, value = parts
        query *= size**-0.5
        weights = torch.bmm(query, key.mT)
        if not _bound(query, key) < SAFE:
            later = torch.ones_like(weights[0], dtype=torch.bool).triu(1)
            _lower(weights.masked_fill_(later, -torch.inf))
        weights.exp_().tril_()
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights, value) / total
        ctx.kept = parts, weights, total, out, cosines, sines
        return out.view(batch, heads, length, size).transpose(1, 2).reshape(batch, length, -1)

    @staticmethod
    def backward(ctx, gradient):
        (query, key, value), weights, total, out, cosines, sines = ctx.kept
        batch, length, width = gradient.shape
        size = query.shape[-1]
        heads = width // size
        gradient = gradient.view(batch, length, heads, size).transpose(1, 2)
        gradient = gradient.reshape(batch * heads, length, size)
        gradient = gradient / total
        common = (gradient * out).sum(-1, keepdim=True)
        by_score = torch.bmm(gradient, value.mT)
        by_score.sub_(common).mul_(weights)
        by_query = torch.bmm(by_score, key) * size**-0.5
        by_key = torch.bmm(by_score.mT, query)
        by_value = torch.bmm(weights.mT, gradient)
        by_parts = torch.stack((by_query, by_key, by_value))
        _rotate(by_parts[:2], cosines, -sines)
        by_parts = by_parts.view(3, batch, heads, length, size).permute(1, 3, 2, 0, 4)
        return by_parts.reshape(batch, length, 3 * width), None, None, None


def cross_entropy(
    hidden: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "vocab d"],
    targets: Int[Tensor, " tokens"],
    z_loss: float = 0.0,
    precision: torch.dtype = torch.float32,
) -> Float[Tensor, ""]:
    """The mean of −ln softmax(W h)[target] in nats, with both gradients, block by block.

    With E = exp(W h) and Z = ΣE a block yields ln Z, and E W / Z is the mean row that the
    softmax expects: the gradient by h is that row minus the target's. `z_loss` times the mean of
    (ln Z)² is added. In 16 bits it is not, nor are there blocks: the logits are rounded, and their
    gradient at a loss scale.

    **Source:** of the z-loss Chowdhery et al. 2022.
    """
    if precision == torch.float32:
        return _CrossEntropy.apply(hidden, weight, targets, z_loss)
    scale = LOSS_SCALE if precision == torch.float16 else 1.0
    logits = _rounded(hidden @ weight.T, precision)
    logits.register_hook(lambda gradient: _rounded(gradient * scale, precision) / scale)
    return nn.functional.cross_entropy(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy`; the gradients are ready when the loss is."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss):
        tokens, d = hidden.shape
        wide = torch.cat([weight, weight.new_ones(len(weight), 1)], 1)
        expected = hidden.new_empty(tokens, d + 1)
        normaliser = hidden.new_empty(tokens, 1)
        by_weight = torch.zeros_like(weight.T)
        block = hidden.new_empty(min(TOKENS, tokens), len(weight))
        safe = _bound(hidden, weight) < SAFE
        for start in range(0, tokens, TOKENS):
            here = slice(start, start + TOKENS)
            states = hidden[here]
            weights = torch.mm(states, weight.T, out=block[: len(states)])
            shift = 0.0 if safe else _lower(weights)
            # E [W, 1]: the expected row times Z, and Z.
            sums = torch.mm(weights.exp_(), wide, out=expected[here])
            total = sums[:, d:]
            normaliser[here] = total.log() + shift
            # The z-loss multiplies the gradient of ln Z by 1 + 2 z ln Z.
            share = (1 + 2 * z_loss * normaliser[here]) / total
            shared = states * share
            by_weight.addmm_(shared.T, weights)
            sums *= share
        rows = weight[targets]
        by_weight = by_weight.T.index_add(0, targets, hidden, alpha=-1)
        by_hidden = expected[:, :d] - rows
        ctx.gradients = by_hidden / tokens, by_weight / tokens
        of_targets = (hidden * rows).sum()
        loss = normaliser.mean() - of_targets / tokens
        if z_loss:
            loss += z_loss * normaliser.square().mean()
        return loss

    @staticmethod
    def backward(ctx, gradient):
        by_hidden, by_weight = ctx.gradients
        return gradient * by_hidden, gradient * by_weight, None, None


def _bound(one: Tensor, other: Tensor) -> float:
    """No product of a row of one with a row of the other is larger (Cauchy and Schwarz)."""
    squares = [rows.square().sum(-1).max().item() for rows in (one, other)]
    return (squares[0] * squares[1]) ** 0.5


def _lower(logits: Tensor) -> Tensor:
    """Take each row's largest entry from it in place, and return it."""
    highest = logits.amax(-1, keepdim=True)
    logits -= highest
    return highest


def _rotate(parts: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn the two halves of the rotary dimensions against each other, in place."""
    half = cosines.shape[-1]
    first, second, _ = parts.tensor_split((half, 2 * half), -1)
    turned = first * cosines - second * sines
    other = first * sines + second * cosines
    second.copy_(other)
    first.copy_(turned)


def _angles(model: GPTNeoXModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(tokens.shape[1], device=tokens.device)
    weight = model.embed_in.weight
    both = torch.stack(model.rotary_emb(weight, places[None]))
    # Each angle stands there twice, once for each half.
    once, _ = both.chunk(2, -1)
    cosines, sines = once[:, 0]
    return cosines, sines
