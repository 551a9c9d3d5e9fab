"""Tokens a second of a training step in the wind tunnel, beside transformers' own step, on one
thread.

    python benchmarks/bench_training.py

Both train the same model on the same windows; the own step's loss is checked against the other's.
"""

import time

import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXForCausalLM

from headbound.train.step import Recipe, Trainer

STEPS = 40


def model(recipe):
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(recipe.config(0))


def own(recipe):
    trainer = Trainer(model(recipe), recipe)

    def step(rows):
        loss = trainer.loss(rows)
        trainer.apply(loss, 1e-3)
        return loss.item()

    return step


def usual(recipe):
    plain = model(recipe)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    decayed = {"params": matrices, "weight_decay": recipe.weight_decay}
    groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(rows):
        logits = plain(rows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def median_times(steps, rows):
    """Seconds of this process's processor a step, in turns, so that both meet the same machine."""
    times = {name: [] for name in steps}
    losses = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            begun = time.process_time()
            losses[name].append(step(rows))
            times[name].append(time.process_time() - begun)
    assert abs(losses["own"][-1] - losses["usual"][-1]) < 1e-3, losses
    return {name: sorted(found)[STEPS // 2] for name, found in times.items()}


def main():
    torch.set_num_threads(1)
    print("   V   d   usual ms   own ms   own tokens/s   ratio")
    for vocab in (1024, 2048):
        for d in (8, 16, 32):
            recipe = Recipe(d, 1000, vocab_size=vocab)
            rows = torch.randint(vocab, (recipe.batch_size, recipe.context + 1))
            found = median_times({"own": own(recipe), "usual": usual(recipe)}, rows)
            usual_ms, own_ms = 1e3 * found["usual"], 1e3 * found["own"]
            speed = recipe.tokens_a_step / found["own"]
            ratio = usual_ms / own_ms
            print(f"{vocab:5d}{d:4d}{usual_ms:11.1f}{own_ms:9.1f}{speed:15,.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
