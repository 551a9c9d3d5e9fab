"""The wind tunnel: GPT-NeoX models that differ in hidden size only, trained here and measured on the way."""

import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from filelock import FileLock
from jaxtyping import Int
from joblib import delayed
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from headbound import cache, device, hidden, progress
from headbound import corpus as prose
from headbound.measure import checkpoint

SAVE_EVERY = 20.0  # seconds between two saves of the training state: what a kill costs at most
HELD_OUT = 0.1  # more than the book's two per cent, which are among it: the last-word task needs many texts


def corpus(
    source: str = "docstrings",
    vocab_size: int = 2048,
    context: int = 128,
    held_out_texts: int = 256,
) -> tuple[PreTrainedTokenizerFast, Int[np.ndarray, " tokens"], Int[Tensor, "texts length"]]:
    """What the suite trains and is measured on.

    **Returns:** the tokenizer, the stream of training tokens, and the first `context + 1` tokens of
    `held_out_texts` held-out texts, drawn from all of them.

    **Raises:** `ValueError` if the text is too short.
    """
    changed = Path(source).stat().st_mtime_ns if Path(source).is_file() else None
    return _corpus(source, vocab_size, context, held_out_texts, cache.cache_dir(), changed)


@functools.lru_cache(maxsize=2)  # a process that trains many models reads and checks the text once
def _corpus(source, vocab_size, context, held_out_texts, cache, changed):
    train_texts, test_texts = prose.split(prose.load(source), HELD_OUT)
    tokenizer = prose.train_bpe(train_texts, vocab_size)
    stream = prose.encode(tokenizer, train_texts)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=prose.END_OF_TEXT)
    drawn = [test_texts[i] for i in np.random.default_rng(0).permutation(len(test_texts))]
    return wrapped, stream, hidden.sequences(wrapped, drawn, held_out_texts, context + 1)


def checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """Step 0 and `checkpoints` log-spaced steps from steps/200 to `steps`, rounded, each once.

    **Raises:** `ValueError` if one of the two is below 1.
    """
    if min(steps, checkpoints) < 1:
        raise ValueError(f"steps = {steps}, checkpoints = {checkpoints}: both must be 1 or more")
    spaced = np.geomspace(
        steps, max(1, steps / 200), checkpoints
    )  # from the end, which one alone is
    return [0, *np.unique(spaced.round().astype(int)).tolist()]


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The learning rate of a step: linear during `warmup` (a share of `steps`), then by `schedule`.

    `cosine` falls to a tenth of the peak, as Pythia's does; `constant` stays.

    **Raises:** `ValueError` for another schedule.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule = {schedule!r}: must be 'cosine' or 'constant'")
    ramp = warmup * steps
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    fall = 0.45 * (1 - math.cos(math.pi * (step - ramp) / (steps - ramp)))
    return peak * (1 - fall) if schedule == "cosine" else peak


def batch(
    stream: Int[np.ndarray, " tokens"],
    step: int,
    size: int,
    context: int,
    seed: int,
    kept: int | None = None,
) -> Int[Tensor, "size length"]:
    """One step's windows of `context + 1` tokens, in a new order each epoch, from seed and step alone.

    With `kept`, an epoch has that many windows, drawn from the whole stream.
    """
    windows = (len(stream) - 1) // context
    places = [divmod(i, kept or windows) for i in range(step * size, (step + 1) * size)]
    starts = [_order(windows, kept, epoch, seed)[place] * context for epoch, place in places]
    return torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts])).long()


@functools.lru_cache(maxsize=4)
def _order(windows, kept, epoch, seed):
    order = np.random.default_rng([seed, epoch]).permutation(kept or windows)
    return (
        np.random.default_rng(seed).choice(windows, kept, replace=False)[order] if kept else order
    )


def train(
    hidden_sizes: Sequence[int],
    steps: int,
    folder: Path | str | None = None,
    *,
    source: str = "docstrings",
    vocab_size: int = 2048,
    layers: int = 2,
    context: int = 128,
    batch_size: int = 16,
    peak: float = 1e-2,
    schedule: str = "cosine",
    warmup: float = 0.01,
    weight_decay: float = 0.1,
    epochs: float | None = None,
    tied: bool = False,
    checkpoints: int = 14,
    held_out_texts: int = 256,
    seed: int = 0,
    variant: str = "neox",
    build: Callable[[GPTNeoXConfig], PreTrainedModel] = GPTNeoXForCausalLM,
    where: str = "auto",
) -> pd.DataFrame:
    """Train the suite, or what is missing of it, and return its measurements; called again, it only reads.

    A killed run goes on from its last training state and ends as an unbroken one, bit for bit: data order and
    random numbers follow from seed and step, and on a CPU a model has one thread (several train at once).

    **Arguments:**

    - `hidden_sizes`: multiples of 8; heads of 16 dimensions (else one head), feed-forwards 4 times as wide.
    - `steps`: of `batch_size` windows of `context` tokens.
    - `folder`: by default in the cache, under a hash of all but `hidden_sizes`, `build` and `where`.
    - `source`, `vocab_size`, `held_out_texts`: see `corpus`. `checkpoints`: see `checkpoint_steps`.
    - `peak`, `schedule`, `warmup`: see `learning_rate`. `weight_decay`: of matrices, by AdamW.
    - `epochs`: passes over the data, a random part of which is kept to fit; None keeps all of them.
    - `tied`: one matrix for embedding and head. Pythia's are two.
    - `build`: from a configuration to a GPT-NeoX with any head, kept under the name `variant`.
    - `where`: the device.

    **Returns:** a row a checkpoint: model, step, tokens, `checkpoint.measure`, `path` (in the Hub's layout).

    **Raises:** `ValueError` for arguments that cannot be; `FloatingPointError` with the step when the loss is
    not finite, the checkpoints before it kept.
    """
    options = {
        k: v for k, v in locals().items() if k not in ("hidden_sizes", "folder", "build", "where")
    }
    wrong = [size for size in hidden_sizes if size < 8 or size % 8]
    if wrong or not len(hidden_sizes):
        raise ValueError(
            f"hidden_sizes = {list(hidden_sizes)}: must be multiples of 8, at least one"
        )
    if (build is GPTNeoXForCausalLM) != (variant == "neox"):
        raise ValueError(
            f"variant = {variant!r}: a model of another build, and only that, has a name of its own"
        )
    checkpoint_steps(steps, checkpoints)
    learning_rate(0, steps, peak, schedule, warmup)
    tokenizer, stream, test = corpus(source, vocab_size, context, held_out_texts)
    windows = (len(stream) - 1) // context
    kept = None if epochs is None else round(steps * batch_size / epochs)
    if not 1 <= (windows if kept is None else kept) <= windows:
        raise ValueError(
            f"epochs = {epochs}: {kept} windows of {windows}; give more text or choose other epochs"
        )
    data = hashlib.sha256(np.asarray(stream).tobytes() + test.numpy().tobytes()).hexdigest()
    record = json.dumps({**options, "data": data}, indent=1, sort_keys=True)
    key = hashlib.sha256(record.encode()).hexdigest()[:16]
    root = Path(folder or cache.cache_dir() / "suites" / key)
    settings = root / f"{variant}.json"
    if settings.exists() and settings.read_text() != record:
        raise ValueError(
            f"folder = {str(root)!r}: {settings.name} there has other arguments; choose another folder"
        )
    with cache.replacing(settings) as temporary:
        temporary.write_text(record)
    on = device.pick(where)
    widest_first = sorted(set(hidden_sizes), reverse=True)
    jobs = [
        delayed(_one)(root, d, options, tokenizer, stream, test, build, on, kept)
        for d in widest_first
    ]
    workers = min(len(jobs), os.cpu_count() or 1) if on.type == "cpu" else 1
    return pd.DataFrame([row for rows in progress.parallel(jobs, workers)[::-1] for row in rows])


def _one(root, hidden_size, options, tokenizer, stream, test, build, on, kept):
    folder = root / f"{options['variant']}-d{hidden_size}"
    wanted = {
        n: folder / f"step{n}" for n in checkpoint_steps(options["steps"], options["checkpoints"])
    }
    folder.mkdir(exist_ok=True)
    # The lock ends with its process: of two chapters that ask for a suite at once, one trains it.
    with FileLock(folder / ".lock"):
        if not all(path.exists() for path in wanted.values()):
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if on.type == "cpu" else threads)
            torch.manual_seed(options["seed"])
            config = GPTNeoXConfig(
                vocab_size=options["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=4 * hidden_size,
                num_attention_heads=1 if hidden_size % 16 else hidden_size // 16,
                num_hidden_layers=options["layers"],
                max_position_embeddings=options["context"],
                tie_word_embeddings=options["tied"],
                **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
            )
            try:
                _fit(build(config).to(on), folder, wanted, options, tokenizer, stream, test, kept)
            finally:
                torch.set_num_threads(threads)
    name = {"variant": options["variant"], "hidden_size": hidden_size, "seed": options["seed"]}
    numbers = {
        n: json.loads((path / "measurements.json").read_text()) for n, path in wanted.items()
    }
    return [{**name, "step": n, **numbers[n], "path": str(path)} for n, path in wanted.items()]


def _fit(model, folder, wanted, options, tokenizer, stream, test, kept):
    steps, size, context, seed = (options[k] for k in ("steps", "batch_size", "context", "seed"))
    schedule = [options[k] for k in ("steps", "peak", "schedule", "warmup")]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    groups = [{"params": matrices, "weight_decay": options["weight_decay"]}, others]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    state, first, saved = folder / "training.pt", 0, time.monotonic()
    if state.exists():
        first, weights, moments = torch.load(state, map_location=model.device)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in progress.bar(range(first, steps + 1), folder.name, steps + 1 - first):
        torch.manual_seed(seed * 1_000_003 + step)  # for a build with dropout
        rows = batch(stream, step, size, context, seed, kept).to(model.device)
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"loss = {loss.item()} at step {step} of {folder.name}: lower peak or lengthen warmup; "
                "the checkpoints before it are kept"
            )
        if step in wanted and not wanted[step].exists():
            row = {"tokens": step * size * context, "parameters": model.num_parameters()}
            _keep(wanted[step], model, tokenizer, {**row, **checkpoint.measure(model, test)})
        if step in wanted or time.monotonic() - saved > SAVE_EVERY:
            with cache.replacing(state) as temporary:
                torch.save((step, model.state_dict(), optimizer.state_dict()), temporary)
            saved = time.monotonic()
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, *schedule)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others["params"], 1.0)
        optimizer.step()
    state.unlink()


def _keep(path, model, tokenizer, row):
    temporary = path.with_name(f".{path.name}")
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "measurements.json").write_text(json.dumps(row))
    temporary.rename(path)
