"""Heads: all ranks in one pass against one after another, sampled steps against whole ones."""

import json
import sys
import time

import contest
import numpy as np
import pandas as pd
import torch

RANKS = [8, 16, 32, 64, 128, 256, 384, 576]
TEXTS, LENGTH, VOCAB, D = 12, 129, 8192, 576


def backbone():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=12,
        num_attention_heads=9,
    )
    return GPTNeoXModel(config).eval()


def train(kind):
    """Seconds and final losses of all RANKS, trained together or apart, whole or sampled."""
    from headbound import hidden
    from headbound.measure import lowrank

    model = backbone()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (TEXTS, LENGTH), generator=draw)
    weight = torch.randn(VOCAB, D, generator=draw)
    starts = [lowrank.Head.random(weight, rank) for rank in RANKS]
    ones = lowrank.Examples(np.ones((128, D), np.float32), np.arange(128), np.arange(128))
    lowrank.train(ones, starts[:1], 1)  # torch's one-time set-up

    def states():
        batches = [batch[0] for batch in hidden.stream(model, ids[:, :-1], [-1])]
        found = torch.cat(batches).flatten(0, 1).numpy()
        return lowrank.Examples(found, ids[:, 1:].flatten().numpy(), np.zeros(1, int))

    begin = time.perf_counter()
    data = states()
    if kind.startswith("one pass"):
        sampled = 256 if kind.endswith("sampled") else None
        trained = lowrank.train(data, starts, 1, sampled=sampled)
    else:
        trained = []
        for number, start in enumerate(starts):
            data = states() if number and kind.endswith("anew") else data
            trained += lowrank.train(data, [start], 1)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "losses": lowrank.token_losses(data, trained).mean(1).tolist()}


def training_rows():
    kinds = ["one pass", "one pass, sampled", "one by one", "one by one, states anew"]
    results = {kind: contest.contend("train", kind) for kind in kinds}
    ours = results["one pass"]
    for kind, got in results.items():
        apart = float(np.abs(np.subtract(got["losses"], ours["losses"])).max())
        times = got["seconds"] / ours["seconds"]
        yield kind, f"{got['seconds']:.1f}", f"{times:.2f}", f"{apart:.1e}"


def main():
    tokens = TEXTS * (LENGTH - 1)
    print(f"Heads of rank {RANKS} on {tokens:,} hidden states of 12 layers, d = {D}, V = {VOCAB}.")
    print("Seconds include the hidden states; difference: largest of the mean losses.\n")
    columns = ["ranks trained", "seconds", "time / one pass", "difference"]
    print(pd.DataFrame(training_rows(), columns=columns).to_string(index=False))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        torch.set_num_threads(contest.THREADS)
        print(json.dumps(train(sys.argv[3])))
    else:
        main()
