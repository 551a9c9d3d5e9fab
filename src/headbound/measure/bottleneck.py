"""Is a model's head its bottleneck? Frozen states under heads of equal and of higher rank."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, pad
from transformers import PreTrainedTokenizerBase

from headbound import pythia, stats
from headbound.measure import lowrank, ngrams
from headbound.measure.lowrank import Examples, Head
from headbound.stats import Estimate

VERDICTS = ("bottleneck", "no bottleneck found", "undecided", "no rank bottleneck is possible")
IN_USE = 0.9  # the least share of the width in a head's working rank with which it can be cleared
OTHERS = 1024  # tokens of the softmax beside those that occur
Nats = Float[np.ndarray, " tokens"]


def working_rank(head: Head, data: Examples, groups: int = 5, tolerance: float = 1e-3) -> Estimate:
    """The least rank at which a cut of `head` (of `lowrank.low_rank`) predicts as the whole does.

    That is ½ E[Δ²] ≤ `tolerance` nats, Δ the change of a token's loss: to second order the
    divergence. The interval leaves out one group of texts at a time. A numerical rank would take
    the rounding of stored weights for dimensions.
    """
    (whole,) = lowrank.token_losses(data, [head])

    @cache
    def divergence(rank: int) -> Nats:
        (cut,) = lowrank.token_losses(data, [head.cut(rank)])
        return np.square(cut - whole) / 2

    def least(chosen: np.ndarray) -> float:
        def predicts(rank: int) -> bool:
            return bool(divergence(rank)[chosen].mean() <= tolerance)

        return 1.0 + bisect_left(range(1, len(head.B)), True, key=predicts)

    group = np.unique(data.texts, return_inverse=True)[1] % groups
    without = [least(group != left_out) for left_out in range(groups)]
    return stats.jackknife(without, least(group >= 0))


def lift(
    train: Examples,
    test: Examples,
    head: Head,
    pairs: Sequence[tuple[int, int]],
    learning_rate: float = 0.008,
    batch: int = 128,
    seed: int = 0,
) -> list[Estimate]:
    """Nats a token that a higher rank gains over a lower one on `test`, for pairs of ranks.

    All heads read the same inputs: a one, the coordinates u = B h of `head` (of `lowrank.low_rank`)
    and as many fixed random features GELU(R u). All start as `head` cut to the lower rank and are
    trained alike on `train`, one epoch, so that they differ in rank alone. The softmax is over the
    tokens that occur and `OTHERS`. Lower ranks go up to the rank r of `head`, higher ones to 2r.
    """
    r = len(head.B)
    random = np.random.default_rng(seed)
    occurring = np.union1d(train.targets, test.targets)
    rest = np.setdiff1d(np.arange(len(head.A)), occurring)
    count = min(OTHERS, len(rest))
    chosen = random.choice(rest, count, replace=False)
    kept = np.union1d(occurring, chosen)
    drawn = random.standard_normal((r, r))
    mixing = torch.from_numpy(drawn).float()
    mixing *= 2 / math.sqrt(r)
    learn = _features(train, head, mixing, kept)
    judge = _features(test, head, mixing, kept)
    starts = []
    for low, high in pairs:
        starts += [_start(head, kept, low, rank) for rank in (low, high)]
    trained = lowrank.train(learn, starts, 1, batch, learning_rate, seed=seed)
    losses = lowrank.token_losses(judge, trained)
    won = losses[::2] - losses[1::2]
    return [stats.mean(nats, test.texts) for nats in won]


def _features(data: Examples, head: Head, mixing: Tensor, kept: np.ndarray) -> Examples:
    states = torch.from_numpy(np.array(data.hidden_states))
    u = states @ head.B.cpu().T
    bent = gelu(u @ mixing)
    bent -= bent.mean(0)
    ones = torch.ones(len(u), 1)
    inputs = torch.cat([ones, u, bent], 1).numpy()
    targets = np.searchsorted(kept, data.targets)
    return Examples(inputs, targets, data.texts)


def _start(head: Head, kept: np.ndarray, low: int, rank: int) -> Head:
    # One dimension more, the first: the ones, for the text's own token frequencies.
    A = pad(head.A.cpu()[torch.from_numpy(kept), :low], (1, rank - low))
    return Head(A, torch.eye(1 + 2 * len(head.B))[: 1 + rank], head.cap)


def verdict(
    gain: Estimate,
    control: Estimate,
    lead: Estimate,
    used: float,
    margin: float,
    possible: bool = True,
) -> tuple[str, str]:
    """One of `VERDICTS` by the diagnosis's rule, and why, with how far the margin could move.

    In nats a token: the `gain` of a higher rank over the head's own, from `lift`; the same for the
    head cut on purpose, the `control`; the `lead` of the model over token frequencies. `used` is
    the working rank over the width. It is `possible` unless the head has the V − 1 dimensions that
    V tokens need at most.
    """
    if not possible:
        return VERDICTS[3], "The vocabulary needs no more dimensions than the head has."
    if not lead.low > 0:
        return VERDICTS[2], "The model does not surely beat token frequencies."
    if gain.low > margin:
        same = f"any margin below {gain.low:.2g} gives the same verdict"
        return VERDICTS[0], f"All of it lies above the margin of {margin:g} nats; {same}."
    doubts = {
        f"the interval reaches above the margin of {margin:g}": not gain.high < margin,
        "a fault made on purpose was not surely seen": not control.low > margin,
        f"the head leaves {1 - used:.0%} of its dimensions unread": used < IN_USE,
    }
    reasons = [reason for reason, holds in doubts.items() if holds]
    if reasons:
        return VERDICTS[2], f"It stays open: {', and '.join(reasons)}."
    same = f"any margin from {max(gain.high, 0):.2g} to {control.low:.2g} gives the same verdict"
    return VERDICTS[1], f"All of it lies below the margin of {margin:g} nats; {same}."


def target_rank(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vocab: int = 1024,
    order: int = 3,
    most: int = 300_000,
    groups: int = 5,
    seed: int = 0,
) -> tuple[Estimate, int, float]:
    """How many dimensions of a text's n-gram matrix two halves agree on (`ngrams.split_half`).

    About `most` tokens are read; all but the `vocab` − 1 most frequent are merged into one.

    **Returns:** the rank, the tokens read, and the share of them that was merged.
    """
    pieces = []
    read = 0
    for place in np.random.default_rng(seed).permutation(len(texts)):
        coded = tokenizer(texts[place], add_special_tokens=False, verbose=False)
        pieces.append(np.array(coded["input_ids"], int))
        read += len(pieces[-1])
        if read >= most:
            break
    tokens = np.concatenate(pieces)
    counts = np.bincount(tokens)
    kept = np.argsort(-counts, kind="stable")[: vocab - 1]
    merged = np.full(len(counts), vocab - 1)
    merged[kept] = np.arange(len(kept))
    # The merged token ends each text, so that no n-gram of kept ones spans two.
    pieces = [np.append(merged[piece], vocab - 1) for piece in pieces]

    def supported(left_out: int | None) -> float:
        part = [piece for place, piece in enumerate(pieces) if place % groups != left_out]
        found = ngrams.split_half(part, order, vocab)
        return float(found.rank)

    without = [supported(group) for group in range(groups)]
    rank = stats.jackknife(without, supported(None))
    return rank, read, 1 - float(counts[kept].sum() / read)


def _references(fingerprint: str, perplexity: float) -> pd.DataFrame:
    """Known models' numbers, but those of the same text and perplexity: the model in hand."""
    known = pd.read_csv(pythia.DATA / "references.csv")
    mine = np.isclose(known["value"], perplexity, 1e-3)
    mine &= known["quantity"] == "perplexity"
    mine &= known["fingerprint"] == fingerprint
    same = known.loc[mine, "reference"]
    return known[~known["reference"].isin(same)]


def places(mine: Mapping[str, Estimate | float], fingerprint: str) -> pd.DataFrame:
    """How many of this book's known models, and of the paper's, have less, and the nearest.

    The `fingerprint` of the text and the perplexity tell which known model is the one in hand.
    """
    known = _references(fingerprint, mine["perplexity"].value)
    rows = []
    for quantity, number in mine.items():
        value = getattr(number, "value", number)
        here = known[known["quantity"] == quantity].sort_values("value")
        cited = here["verdict"] == "cited"
        rows.append((quantity, *_place(here[~cited], value), *_place(here[cited], value)))
    columns = ["quantity", "known models", "neighbours", "the paper's", "the paper's neighbours"]
    return pd.DataFrame(rows, columns=columns)


def _place(ordered: pd.DataFrame, value: float) -> tuple[str, str]:
    named = [f"{row.reference} ({row.value:.3g})" for row in ordered.itertuples()]
    below = int((ordered["value"] <= value).sum())
    words = []
    if below:
        words.append(f"above {named[below - 1]}")
    if below < len(named):
        words.append(f"below {named[below]}")
    return f"{below} of {len(named)}", ", ".join(words) or "none is known"
