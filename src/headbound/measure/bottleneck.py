"""Is a model's head its bottleneck? Frozen hidden states under heads of equal and of higher rank, on held-out text."""

from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from headbound import corpus, hidden, models, stats
from headbound.measure import lowrank, ngrams
from headbound.measure.lowrank import Examples, Head

VERDICTS = ("bottleneck", "no bottleneck found", "undecided")


class Readout(NamedTuple):
    """Logits as `weight` times the states (and a column of ones, if the head has a bias), and what that misses."""

    weight: Tensor
    bias: bool
    missed: float


def sample(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    texts: Sequence[str],
    passages: tuple[int, int],
    length: int,
    seed: int = 0,
) -> list[Int[Tensor, "texts length"]]:
    """Ids of `length` + 1 tokens of each passage to learn from and to judge on; no text gives both.

    A token that the tokenizer puts before every text (Llama's, Gemma's) is put before every passage.

    **Raises:** `ValueError` for a model without an LM head, texts too few or short, or passages too long for it.
    """
    models.head_weight(model)
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise ValueError(
            f"length = {length}: this model reads {limit} tokens at most; choose a length up to that"
        )
    start = tokenizer("a")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    rng, found = np.random.default_rng(seed), []
    for part, count in zip(corpus.split(texts, passages[1] / sum(passages)), passages, strict=True):
        drawn = [part[i] for i in rng.permutation(len(part))]
        ids = hidden.sequences(tokenizer, drawn, count, length + 1 - len(start))
        found.append(
            torch.cat([torch.tensor(start, dtype=ids.dtype).expand(count, len(start)), ids], 1)
        )
    return found


@torch.inference_mode()
def readout(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    input_ids: Int[Tensor, "texts length"],
) -> Readout:
    """The matrix that turns final hidden states into logits, scaled as the model scales them.

    `missed` is the share of the logits' deviation over the vocabulary that no such matrix explains: rounding for a
    linear head, more where the model bends its logits, as Gemma 2's soft cap does.

    **Raises:** `ValueError` for a model without an LM head.
    """
    weight, bias = (
        models.head_weight(model, tokenizer),
        getattr(model.get_output_embeddings(), "bias", None),
    )
    logits = model(input_ids.to(model.device)).logits[..., : len(weight)].flatten(0, 1)
    states = next(hidden.stream(model, input_ids, [-1], len(input_ids)))[0].flatten(0, 1)
    if bias is not None:
        weight, states = (
            torch.cat([weight, bias[: len(weight), None]], 1),
            nn.functional.pad(states, (0, 1), value=1.0),
        )
    logits, plain = (
        x.double() - x.double().mean(1, keepdim=True) for x in (logits, states @ weight.T)
    )
    scale = float((logits * plain).sum() / plain.square().sum())
    return Readout(
        scale * weight, bias is not None, float((logits - scale * plain).norm() / logits.norm())
    )


def examples(
    model: nn.Module, input_ids: Int[Tensor, "texts length"], bias: bool = False
) -> Examples:
    """`lowrank.examples`, with a column of ones for a head with a bias."""
    data = lowrank.examples(model, input_ids)
    ones = np.ones((len(data.targets), 1), np.float32)
    return data._replace(hidden_states=np.hstack([data.hidden_states, ones])) if bias else data


def working_rank(head: Head, data: Examples, tolerance: float = 1e-3) -> int:
    """The least rank, by bisection, at which a cut of `head` (of `lowrank.low_rank`) predicts as the whole does.

    That is, ½ E[Δ²] ≤ `tolerance` nats, Δ the change of a token's loss: to second order the divergence, which unlike
    E[Δ] does not cancel. Unlike a numerical rank it does not take the rounding of stored weights for dimensions.
    """
    whole, low, high = lowrank.token_losses(data, [head]), 1, len(head.B)
    while low < high:
        middle = (low + high) // 2
        enough = (
            np.square(lowrank.token_losses(data, [head.cut(middle)]) - whole).mean() / 2
            <= tolerance
        )
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def lift(
    train: Examples,
    test: Examples,
    head: Head,
    pairs: Sequence[tuple[int, int]],
    others: int = 2048,
    sampled: int = 1024,
    batch: int = 128,
    learning_rate: float = 0.008,
    seed: int = 0,
) -> list[stats.Estimate]:
    """Held-out nats a token that a higher rank gains over a lower one, all else equal, for each pair of ranks.

    All heads read the same inputs x: a one, the d coordinates u = B h of `head` (of `lowrank.low_rank` at full rank),
    and d fixed random features GELU(R u), centred. All start as `head` cut to the lower rank, with a dimension more
    for the text's own token frequencies, and are trained alike for one epoch (`lowrank.train`). As logits are A·B·x for
    each, they differ in rank alone, not in what is known or may be bent.

    **Arguments:** `pairs`, ranks up to d and 2d; `others`: the vocabulary is cut to the tokens that occur and this many
    more, drawn at random; the rest as of `lowrank.train`.

    **Raises:** `ValueError` for impossible pairs of ranks.
    """
    d, rng = len(head.B), np.random.default_rng(seed)
    if any(not 1 <= low <= d or not low < high <= 2 * d for low, high in pairs):
        raise ValueError(
            f"pairs = {list(pairs)}: need 1 ≤ lower ≤ {d}, lower < higher ≤ {2 * d}; choose ranks there"
        )
    occurring = np.union1d(train.targets, test.targets)
    rest = np.setdiff1d(np.arange(len(head.A)), occurring)
    kept = np.union1d(occurring, rng.choice(rest, min(others, len(rest)), replace=False))
    mixing, parts = (
        torch.from_numpy((rng.standard_normal((d, d)) * 2 / np.sqrt(d)).astype(np.float32)),
        [],
    )
    for data in (train, test):
        u = torch.from_numpy(data.hidden_states @ head.B.cpu().numpy().T)
        bent = nn.functional.gelu(u @ mixing)
        inputs = torch.cat([torch.ones(len(u), 1), u, bent - bent.mean(0)], 1).numpy()
        parts.append(Examples(inputs, np.searchsorted(kept, data.targets), data.texts))
    ranks = sorted({(low, rank) for low, high in pairs for rank in (low, high)})
    A, reads = head.A.cpu()[torch.from_numpy(kept)], torch.eye(1 + 2 * d)
    starts = [
        Head(nn.functional.pad(A[:, :low], (1, rank - low)), reads[: 1 + rank])
        for low, rank in ranks
    ]
    options = {
        "epochs": 1,
        "batch": batch,
        "learning_rate": learning_rate,
        "sampled": sampled,
        "seed": seed,
    }
    trained = lowrank.train(parts[0].hidden_states, parts[0].targets, starts, **options)
    losses = dict(zip(ranks, lowrank.token_losses(parts[1], trained), strict=True))
    return [stats.mean(losses[low, low] - losses[low, high], test.texts) for low, high in pairs]


def ahead(nats: Float[np.ndarray, " tokens"], train: Examples, test: Examples) -> stats.Estimate:
    """Nats a token that a model's losses on `test` save against the token frequencies of `train` (plus 0.1)."""
    counts = np.bincount(train.targets, minlength=int(test.targets.max()) + 1) + 0.1
    return stats.mean(np.log(counts.sum() / counts[test.targets]) - nats, test.texts)


def verdict(
    gain: stats.Estimate, control: stats.Estimate, lead: stats.Estimate, used: float, margin: float
) -> str:
    """One of `VERDICTS`: the gain is surely above the margin, surely below it and would have been seen, or neither.

    **Arguments:** `gain` of a higher rank over the head's own, from `lift`; `control`, the same for the head cut on
    purpose; `lead`, from `ahead`: a model that does not beat frequencies has other faults; `used`, working rank over d:
    a head that leaves a tenth of the states unread is never cleared; `margin` in nats a token.
    """
    if not lead.low > 0:
        return VERDICTS[2]
    if gain.low > margin:
        return VERDICTS[0]
    return VERDICTS[1] if gain.high < margin < control.low and used >= 0.9 else VERDICTS[2]


def target_rank(
    tokenizer: transformers.PreTrainedTokenizerBase,
    texts: Sequence[str],
    vocab: int = 1024,
    order: int = 3,
    most: int = 300_000,
    groups: int = 5,
    seed: int = 0,
) -> tuple[stats.Estimate, int, float]:
    """How many dimensions of a text's n-gram matrix two halves of it agree on (`ngrams.split_half`).

    **Arguments:** the `vocab` − 1 most frequent tokens are kept and the others merged, for V × V must fit; `most`
    tokens are read, of texts in random order; each of the `groups` of texts is left out in turn for the interval.

    **Returns:** the rank, the tokens read, and the share of them that was merged.

    **Raises:** `ValueError` if in half of the text no context occurs twice.
    """
    pieces, read = [], 0
    for i in np.random.default_rng(seed).permutation(len(texts)):
        pieces.append(
            np.asarray(
                tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"], int
            )
        )
        if (read := read + len(pieces[-1])) >= most:
            break
    counts = np.bincount(np.concatenate(pieces))
    kept = np.argsort(-counts, kind="stable")[: vocab - 1]
    new = np.full(len(counts), vocab - 1)
    new[kept] = np.arange(len(kept))
    pieces = [
        np.append(new[piece], vocab - 1) for piece in pieces
    ]  # no n-gram of kept tokens spans two texts

    def supported(part: list[np.ndarray]) -> float:
        halves = (np.concatenate(part[half::2]) for half in (0, 1))
        return float(
            ngrams.split_half(
                *(ngrams.gram(x, order, vocab, "tokens", unbiased=True) for x in halves)
            ).rank
        )

    left = [supported([p for i, p in enumerate(pieces) if i % groups != g]) for g in range(groups)]
    return (
        stats.jackknife(left, supported(pieces)),
        read,
        1 - float(counts[kept].sum() / counts.sum()),
    )


def references() -> pd.DataFrame:
    """What this report found for known models: a row a model and quantity, with text, versions, date and command."""
    return pd.read_csv(resources.files("headbound") / "references.csv")
