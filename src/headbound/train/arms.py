"""The long runs of the wind tunnel: to Pythia's tokens a parameter, one change an arm."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn.functional import gelu
from transformers import GPTNeoXForCausalLM

from headbound.train.changes import Factored, with_head
from headbound.train.step import Recipe
from headbound.train.tunnel import Build

TOKENS_A_PARAMETER = 4000  # Pythia-70M's
VOCAB = 1024
LAYERS = 2

# An arm has fields of `Recipe`, and `head`. Every arm sees the tokens of the baseline, but for the
# ones whose `steps` are said to be equal.
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "batch / 4": {"batch_size": 4},
    "batch x 8, equal tokens": {"batch_size": 128},
    "batch x 8, equal steps": {"batch_size": 128, "equal": "steps"},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "weight decay 1": {"weight_decay": 1.0},
    "rate held": {"schedule": "constant"},
    "rate held, weight decay 0": {"schedule": "constant", "weight_decay": 0.0},
    "rate x 4": {"peak": 4e-2},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "centred rows": {"centred": True},
    "z-loss": {"z_loss": 1e-4},
    "coupled Adam": {"optimizer": "coupled"},
    "momentum": {"optimizer": "sgd", "peak": 0.3, "weight_decay": 0.0},
    "tied": {"tied": True},
    "rank cut, forward": {"cut": "forward"},
    "rank cut, backward": {"cut": "backward"},
    "lifted head, two layers": {"head": partial(Factored, ratio=4.0, activation=gelu)},
    "lifted head, linear": {"head": partial(Factored, ratio=4.0)},
    "10 epochs": {"epochs": 10.0},
    "100 epochs": {"epochs": 100.0},
    "unused tokens": {"unused": 0.2},
}


def parameters(d: int, vocab: int = VOCAB, layers: int = LAYERS) -> int:
    """Of a GPT-NeoX of width d with two tables: 2 V d, and 12 d² + 13 d a layer, and the final norm."""
    return 2 * vocab * d + layers * (12 * d**2 + 13 * d) + 2 * d


def recipe(
    arm: str, d: int, seed: int, tokens_a_parameter: float = TOKENS_A_PARAMETER, **options: Any
) -> Recipe:
    """An arm's recipe at a width; `options` change fields of the baseline.

    **Raises:** `KeyError` for an unknown arm.
    """
    base = Recipe(d, 1, vocab_size=VOCAB, layers=LAYERS, checkpoints=60, seed=seed)
    base = replace(base, **options)
    size = parameters(d, base.vocab_size, base.layers)
    steps = round(tokens_a_parameter * size / base.tokens_a_step)
    change = dict(ARMS[arm])
    equal = change.pop("equal", "tokens")
    if change.pop("head", None) is not None:
        change["variant"] = arm
    changed = replace(base, **change)
    if equal == "tokens":
        steps = round(steps * base.batch_size / changed.batch_size)
    return replace(changed, steps=steps)


def build(arm: str, arms: Mapping[str, Mapping[str, Any]] = ARMS) -> Build:
    """How an arm's model is built."""
    head = arms[arm].get("head")
    return partial(with_head, head=head) if head else GPTNeoXForCausalLM
