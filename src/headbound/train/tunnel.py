"""The wind tunnel: GPT-NeoX models that differ in hidden size only, trained and measured."""

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Int
from joblib import delayed
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from headbound import cache, device, hidden, progress
from headbound import corpus as prose
from headbound.measure import checkpoint
from headbound.train.step import Recipe, Trainer

SAVE_EVERY = 20.0  # seconds between two saves of the training state: what a kill costs at most
HELD_OUT = 0.1  # more than the book's two per cent, which are among it: one task needs many
Build = Callable[[GPTNeoXConfig], PreTrainedModel]


class Text(NamedTuple):
    """What a run is trained and measured on."""

    tokenizer: PreTrainedTokenizerFast
    stream: Int[np.ndarray, " tokens"]
    held_out: Int[Tensor, "texts length"]

    def digest(self) -> str:
        """A hash of the tokens."""
        tokens = np.asarray(self.stream).tobytes() + self.held_out.numpy().tobytes()
        return hashlib.sha256(tokens).hexdigest()


def corpus(
    source: str = "docstrings",
    vocab_size: int = 2048,
    context: int = 128,
    held_out_texts: int = 256,
) -> Text:
    """What the suite trains on, and the first `context + 1` tokens of held-out texts.

    **Raises:** `ValueError` if the text is too short.
    """
    train_texts, test_texts = prose.split(prose.load(source), HELD_OUT)
    tokenizer = prose.train_bpe(train_texts, vocab_size)
    stream = prose.encode(tokenizer, train_texts)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=prose.END_OF_TEXT)
    order = np.random.default_rng(0).permutation(len(test_texts))
    drawn = [test_texts[place] for place in order]
    rows = hidden.sequences(wrapped, drawn, held_out_texts, context + 1)
    return Text(wrapped, stream, rows)


def _checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """Step 0 and `checkpoints` log-spaced steps from steps/200 to `steps`, rounded, each once."""
    # From the end, which one alone is.
    spaced = np.geomspace(steps, max(1, steps / 200), checkpoints)
    whole = spaced.round().astype(int)
    return [0, *np.unique(whole).tolist()]


def batch(
    stream: Int[np.ndarray, " tokens"], step: int, recipe: Recipe
) -> Int[Tensor, "size length"]:
    """One step's windows of `context + 1` tokens, in a new order each epoch, from seed and step.

    **Raises:** `ValueError` if the text has fewer windows than `recipe.epochs` needs.
    """
    windows = (len(stream) - 1) // recipe.context
    kept = windows
    if recipe.epochs is not None:
        kept = round(recipe.steps * recipe.batch_size / recipe.epochs)
    if not 1 <= kept <= windows:
        raise ValueError(
            f"epochs = {recipe.epochs}: {kept} windows of {windows}; "
            "give more text or choose other epochs"
        )
    starts = []
    for place in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, inside = divmod(place, kept)
        window = _order(windows, kept, epoch, recipe.seed)[inside]
        starts.append(window * recipe.context)
    tokens = [stream[start : start + recipe.context + 1] for start in starts]
    return torch.from_numpy(np.stack(tokens)).long()


@functools.lru_cache(maxsize=4)
def _order(windows: int, kept: int, epoch: int, seed: int) -> Int[np.ndarray, " windows"]:
    order = np.random.default_rng([seed, epoch]).permutation(kept)
    if kept == windows:
        return order
    return np.random.default_rng(seed).choice(windows, kept, replace=False)[order]


def train(
    hidden_sizes: Sequence[int], steps: int, *, build: Build = GPTNeoXForCausalLM, **options: Any
) -> pd.DataFrame:
    """Train the suite, or what is missing of it; called again, it only reads.

    A killed run goes on from its last training state and ends as an unbroken one, bit for bit: data
    order and random numbers follow from seed and step, and on a CPU a model has one thread.

    `options` are those of `Recipe`. The suite lies in the cache, under a hash of the recipe without
    its hidden size. `build` makes of a configuration a GPT-NeoX with any head, which is kept under
    the name `variant`.

    **Returns:** a row a checkpoint: model, step, tokens, `checkpoint.measure`, and `path` to it in
    the Hub's layout.

    **Raises:** `ValueError` for arguments that cannot be. `FloatingPointError` with the step when
    the loss is not finite; the checkpoints before it are kept.
    """
    widest_first = sorted(set(hidden_sizes), reverse=True)
    recipes = [Recipe(size, steps, **options) for size in widest_first]
    first = recipes[0]
    if (build is GPTNeoXForCausalLM) != (first.variant == "neox"):
        raise ValueError(
            f"variant = {first.variant!r}: only a model of another build has a name of its own"
        )
    text = corpus(first.source, first.vocab_size, first.context, first.held_out_texts)
    batch(text.stream, 0, first)  # refuses a text that is too short, before anything is written
    root = _root(first, text)
    jobs = [delayed(_one)(root, recipe, text, build) for recipe in recipes if _lacks(root, recipe)]
    progress.parallel(jobs, None if device.pick().type == "cpu" else 1)
    return pd.DataFrame([row for recipe in recipes[::-1] for row in _rows(root, recipe)])


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they were
def fit(
    recipe: Recipe,
    text: Text,
    state: Path,
    wanted: Collection[int],
    keep: Callable[[PreTrainedModel, int], None],
    build: Build = GPTNeoXForCausalLM,
    on: str = "cpu",
) -> None:
    """Train to the last `wanted` step, from a kept `state` where there is one.

    `keep` gets the model at each `wanted` step, before its update; after a kill perhaps once more.
    """
    with _one_thread(device.pick(on)) as where:
        torch.manual_seed(recipe.seed)
        trainer = Trainer(build(recipe.config(text.tokenizer.eos_token_id)).to(where), recipe)
        first = 0
        if state.exists():
            first, before = torch.load(state, map_location=where)
            trainer.restore(before)
        saved = time.monotonic()
        name = state.parent.name
        last = max(wanted)
        for step in progress.bar(range(first, last + 1), name, last + 1 - first):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # for a head with dropout
            loss = trainer.loss(batch(text.stream, step, recipe).to(where))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"loss = {loss.item()} at step {step} of {name}: lower peak or lengthen "
                    "warmup; the checkpoints before it are kept"
                )
            if step in wanted:
                keep(trainer.model, step)
            if step in wanted or time.monotonic() - saved > SAVE_EVERY:
                with cache.replacing(state) as temporary:
                    torch.save((step, trainer.state()), temporary)
                saved = time.monotonic()
            if step < last:
                trainer.apply(loss, recipe.learning_rate(step))


@contextmanager
def _one_thread(on: torch.device) -> Iterator[torch.device]:
    """One thread inside, on a CPU: what the last bit of a sum depends on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if on.type == "cpu" else threads)
    try:
        yield on
    finally:
        torch.set_num_threads(threads)


def _root(recipe: Recipe, text: Text) -> Path:
    """The suite's folder: all that decides it but the width is in its name."""
    options = asdict(recipe) | {"data": text.digest()}
    del options["hidden_size"]
    record = json.dumps(options, indent=1, sort_keys=True)
    return cache.cache_dir() / "suites" / hashlib.sha256(record.encode()).hexdigest()[:16]


def _places(root: Path, recipe: Recipe) -> dict[int, Path]:
    """Where a model's checkpoints lie, by step."""
    folder = root / f"{recipe.variant}-d{recipe.hidden_size}"
    steps = _checkpoint_steps(recipe.steps, recipe.checkpoints)
    return {step: folder / f"step{step}" for step in steps}


def _lacks(root: Path, recipe: Recipe) -> bool:
    return not all(path.exists() for path in _places(root, recipe).values())


def _one(root: Path, recipe: Recipe, text: Text, build: Build) -> None:
    """Train a model, or what is missing of it."""
    wanted = _places(root, recipe)
    folder = wanted[0].parent
    state = folder / "training.pt"

    def keep(model: PreTrainedModel, step: int) -> None:
        if not wanted[step].exists():
            _publish(wanted[step], model, text, step * recipe.tokens_a_step)

    with cache.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The lock ends with its process: of two chapters that ask for a suite at once, one trains it.
    with FileLock(folder / ".lock"):
        if _lacks(root, recipe):
            fit(recipe, text, state, wanted, keep, build, "auto")
            state.unlink()


def _rows(root: Path, recipe: Recipe) -> list[dict]:
    name = {"variant": recipe.variant, "hidden_size": recipe.hidden_size, "seed": recipe.seed}
    rows = []
    for step, path in _places(root, recipe).items():
        numbers = json.loads((path / "measurements.json").read_text(encoding="utf-8"))
        rows.append({**name, "step": step, **numbers, "path": str(path)})
    return rows


def _publish(path: Path, model: PreTrainedModel, text: Text, tokens: int) -> None:
    """Keep a checkpoint in the Hub's layout, measured."""
    numbers = {"tokens": tokens, "parameters": model.num_parameters()}
    numbers |= checkpoint.measure(model, text.held_out)
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(temporary, state_dict=weights)
    text.tokenizer.save_pretrained(temporary)
    (temporary / "measurements.json").write_text(json.dumps(numbers), encoding="utf-8")
    temporary.rename(path)
