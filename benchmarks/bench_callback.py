"""What `train.callback` costs of a training, in per cent, at its default number of steps.

    python benchmarks/bench_callback.py

A step of a usual training (forward, backward, AdamW) and a measurement of the callback are timed in
turns, on one thread, with batches of 8 texts of 128 tokens for both. A training with a larger batch
pays less.
"""

import inspect
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headbound.measure import checkpoint
from headbound.train import callback

EVERY = inspect.signature(callback.watch).parameters["every"].default
ROUNDS = 3
MOST = 2.0  # per cent
SHAPES = {"small": (8_192, 64, 4), "medium": (8_192, 256, 6), "wide vocabulary": (50_304, 128, 6)}


def model(vocab, d, layers):
    torch.manual_seed(0)
    shape = {"n_embd": d, "n_layer": layers, "n_head": d // 32, "n_positions": 128}
    shape |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **shape))


def median_times(network, rows):
    """Seconds of this process's processor for a step and for a measurement."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step():
        network(rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure():
        network.eval()  # as the callback does
        checkpoint.measure(network, rows)
        checkpoint.outputs(network, rows)
        network.train()

    works = {"step": step, "measurement": measure}
    times = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            begun = time.process_time()
            work()
            times[name].append(time.process_time() - begun)
    return {name: sorted(found[1:])[ROUNDS // 2] for name, found in times.items()}


def main():
    torch.set_num_threads(1)
    print(f"{'model':18s}     V     d   step s   measurement s   % at every {EVERY} steps")
    for name, (vocab, d, layers) in SHAPES.items():
        rows = torch.randint(vocab, (8, 128))
        found = median_times(model(vocab, d, layers), rows)
        cost = 100 * found["measurement"] / (EVERY * found["step"])
        told = f"{found['step']:9.2f}{found['measurement']:16.2f}{cost:12.2f}"
        print(f"{name:18s}{vocab:6d}{d:6d}{told}", flush=True)
        assert cost < MOST, f"{name}: {cost:.1f} % of the training"


if __name__ == "__main__":
    main()
