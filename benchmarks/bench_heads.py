"""Heads: all ranks in one pass against one after another; blocked against full cross-entropy."""

import json
import resource
import sys
import time

import contest
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

RANKS = [8, 16, 32, 64, 128, 256, 384, 576]
TEXTS, LENGTH, VOCAB, D = 12, 129, 8192, 576
BLOCKS = [64, 128, 256]


def backbone():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": D,
        "intermediate_size": 4 * D,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
    }
    return GPTNeoXModel(GPTNeoXConfig(vocab_size=VOCAB, **sizes)).eval()


def train(kind):
    """Seconds and final losses of all RANKS: `one pass`, `one by one`, or `one by one, states anew`."""
    from headbound import hidden
    from headbound.measure import lowrank

    model, ids = (
        backbone(),
        torch.randint(VOCAB, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(1)),
    )
    weight = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(2))
    starts = [lowrank.random(weight, rank) for rank in RANKS]
    lowrank.train(
        np.ones((128, D), np.float32), np.arange(128), starts[:1], 1
    )  # torch's one-time set-up

    def states():
        found = torch.cat([batch[0] for batch in hidden.stream(model, ids[:, :-1], [-1])])
        return lowrank.Examples(
            found.flatten(0, 1).numpy(), ids[:, 1:].flatten().numpy(), np.zeros(1)
        )

    begin = time.perf_counter()
    data = states()
    if kind == "one pass":
        trained = lowrank.train(data.hidden_states, data.targets, starts, 1)
    else:
        trained = []
        for number, start in enumerate(starts):
            data = states() if number and kind.endswith("anew") else data
            trained += lowrank.train(data.hidden_states, data.targets, [start], 1)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "losses": lowrank.token_losses(data, trained).mean(1).tolist()}


def loss(kind, tokens, block, vocab=49152, rank=64):
    """Peak memory beyond inputs and gradients, seconds and gradients of one loss over a vocabulary of real size."""
    from headbound.measure.lowrank import blocked_cross_entropy

    draw = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, rank, generator=draw).requires_grad_()
    weight = (torch.randn(vocab, rank, generator=draw) / 8).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=draw)
    blocked_cross_entropy(states[:2], weight[:9], targets[:2] * 0).backward()
    kept = sum(x.numel() * x.element_size() for x in (states, weight))  # their gradients
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    if kind == "full":
        value = cross_entropy(states @ weight.T, targets)
    else:
        value = blocked_cross_entropy(states, weight, targets, block)
    value.backward()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - kept
    rng = np.random.default_rng(0)  # the same entries in every contender
    probes = [
        x.grad.numpy().ravel()[rng.integers(x.numel(), size=2000)].tolist()
        for x in (states, weight)
    ]
    return {
        "seconds": seconds,
        "MB": peak / 1e6,
        "block MB": block * vocab * 4 / 1e6,
        "probes": probes,
    }


def training_rows():
    kinds = ["one pass", "one by one", "one by one, states anew"]
    results = {kind: contest.contend("train", kind) for kind in kinds}
    ours = results["one pass"]
    for kind, got in results.items():
        apart = float(np.abs(np.subtract(got["losses"], ours["losses"])).max())
        yield (
            kind,
            f"{got['seconds']:.1f}",
            f"{got['seconds'] / ours['seconds']:.2f}",
            f"{apart:.1e}",
        )


def loss_rows(tokens):
    full = contest.contend("loss", "full", tokens, tokens)
    blocked = {f"{b}": contest.contend("loss", "blocked", tokens, b) for b in BLOCKS}
    for name, got in {"full": full, **blocked}.items():
        pairs = zip(got["probes"], full["probes"], strict=True)
        apart = max(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b) for a, b in pairs)
        times = f"{got['MB'] / got['block MB']:.2f}"
        yield (
            f"{tokens:,}",
            name,
            f"{got['seconds']:.2f}",
            f"{got['MB']:.0f}",
            times,
            f"{apart:.0e}",
        )


def main():
    print(
        f"Heads of rank {RANKS} on {TEXTS * (LENGTH - 1):,} hidden states of a 12-layer backbone, d = {D}, V = {VOCAB}."
    )
    print(
        "Seconds include the hidden states; difference: largest of the mean losses from one pass.\n"
    )
    columns = ["ranks trained", "seconds", "time / one pass", "difference"]
    print(pd.DataFrame(training_rows(), columns=columns).to_string(index=False), "\n")
    print(
        "Cross-entropy and its gradient, V = 49,152, rank 64. Memory: at the peak, beyond inputs and gradients;"
    )
    print("error: of the gradient, relative, on 4,000 entries drawn at random.\n")
    columns = ["tokens", "block", "seconds", "MB", "MB / MB of a block", "gradient error"]
    rows = [row for tokens in (1024, 4096) for row in loss_rows(tokens)]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        torch.set_num_threads(contest.THREADS)
        print(
            json.dumps(
                {"train": train, "loss": loss}[sys.argv[2]](sys.argv[3], *map(int, sys.argv[4:]))
            )
        )
    else:
        main()
