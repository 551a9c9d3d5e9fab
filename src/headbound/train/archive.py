"""Long runs kept as tables: `headbound tunnel baseline 8 0` makes one.

A run is measured while its weights are in memory, and only the numbers are kept. After any stop
the same command goes on from the last state, and ends as if nothing had happened.
"""

import datetime
import json
import math
import platform
import re
import shlex
import subprocess
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from headbound import BOOK, cache, pythia
from headbound.corpus import END_OF_TEXT
from headbound.measure import checkpoint
from headbound.measure.anisotropy import mean_cosine
from headbound.train import changes, fast, tunnel
from headbound.train.step import Recipe

BLOCK = 2048  # tokens whose logits are held at once
DIGITS = 5  # significant ones in a table
TABLES = BOOK / "archive"
# Of where a run comes from, what its rows are given; `last` is the day of its last checkpoint.
ORIGIN = ("command", "steps_done", "core_hours", "last", "commit", "machine", "finished")


def _mixed_steps(steps: int, checkpoints: int) -> list[int]:
    """Step 0, a third of the `checkpoints` log-spaced from 8 on, the others evenly spaced."""
    early = np.geomspace(min(8, steps), steps, checkpoints // 3 + 1)[:-1]
    late = np.linspace(0, steps, checkpoints - checkpoints // 3 + 1)
    return np.unique(np.concatenate([early, late]).round().astype(int)).tolist()


@torch.inference_mode()
def _measure(
    model: GPTNeoXForCausalLM, rows: Int[Tensor, "texts length"]
) -> tuple[dict[str, float], Float[np.ndarray, " texts"]]:
    """A model's numbers on held-out texts, and the loss of each text, nats a token.

    - `loss`, `loss_se`: mean and standard error over texts.
    - `cosine_before_norm`, `cosine_after_norm`: mean over pairs of last states of all texts.
    - `entropy`, `entropy_centred`: singular entropy of the head, raw and without its mean row.
    - `mean_share`: of the head's squared norm, what its mean row holds.
    - `logit_mean`, `logit_sd`: the mean logit, and the deviation within a context.
    - `head_norm`, `state_norm`, `gain_norm`, `bias_norm`: Frobenius norm of the head, mean norm of
      the states that it reads, norms of the final norm's gain and bias.
    - `output_rank`: that of `checkpoint.measure`.
    - `mean_alignment`: the cosine of the mean state with the mean row.

    A bent head is described by its last matrix, and by the states that this matrix reads.
    """
    parts = [fast.states(model, some[:, :-1]) for some in rows.split(16)]
    before, after = (torch.cat(side) for side in zip(*parts, strict=True))
    head = model.get_output_embeddings()
    lifted = isinstance(head, changes.LiftedHead)
    read, weight = head.last(after) if lifted else (after, head.weight)
    states = read.flatten(0, 1)
    losses = _losses(states, weight, rows[:, 1:].flatten())
    texts = losses.view(len(rows), -1).mean(1).double().numpy()
    # A context's logits W h have the mean w̄·h and the variance hᵀ C h over the vocabulary.
    variances = (states @ torch.cov(weight.T, correction=0) * states).sum(1)
    described = checkpoint.head(weight)
    norm = model.base_model.final_layer_norm
    numbers = {
        "loss": texts.mean(),
        "loss_se": texts.std(ddof=1) / math.sqrt(len(texts)),
        "cosine_before_norm": mean_cosine(before.flatten(0, 1)).value,
        "cosine_after_norm": mean_cosine(after.flatten(0, 1)).value,
        "entropy": described["singular_entropy"],
        "entropy_centred": described["singular_entropy_centred"],
        "mean_share": described["mean_row_share"],
        "logit_mean": states.mean(0) @ weight.mean(0),
        "logit_sd": variances.mean().sqrt(),
        "head_norm": weight.norm(),
        "state_norm": states.norm(dim=1).mean(),
        "gain_norm": norm.weight.norm(),
        "bias_norm": norm.bias.norm(),
        "output_rank": _output_rank(read, weight),
        "mean_alignment": nn.functional.cosine_similarity(states.mean(0), weight.mean(0), 0),
    }
    return {name: float(value) for name, value in numbers.items()}, texts


def _output_rank(states: Float[Tensor, "texts length width"], weight: Tensor) -> float:
    last = states.shape[1] - 1
    places = torch.linspace(0, last, checkpoint.SHOWN).long().unique()
    shown = states[: checkpoint.SHOWN, places].flatten(0, 1)
    logits = shown @ weight.T
    return checkpoint.output_rank(logits.double())


def _losses(states: Tensor, weight: Tensor, targets: Tensor) -> Float[Tensor, " tokens"]:
    losses = []
    for some, following in zip(states.split(BLOCK), targets.split(BLOCK), strict=True):
        logits = some @ weight.T
        losses.append(nn.functional.cross_entropy(logits, following, reduction="none"))
    return torch.cat(losses)


def run(
    arm: str,
    d: int,
    seed: int,
    folder: Path,
    state: Path,
    until: int | None = None,
    text: tunnel.Text | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train one arm, or what is missing of it, and keep its table in `folder`.

    **Arguments:**

    - `arm`, `d`, `seed`, `options`: see `changes.recipe`.
    - `state`: a folder for what a stopped run goes on from; it is the caller's to delete.
    - `until`: the run stops at its last checkpoint up to this step; None ends it.
    - `text`: what it trains on, such as `first_text`; None makes the recipe's own.

    **Returns:** a row a checkpoint: run, step, tokens, rate, what is measured, and `rise` with
    `rise_se`: the loss over the least one so far, and its standard error paired over texts.
    """
    recipe = changes.recipe(arm, d, seed, **options)
    sizes = recipe.vocab_size, recipe.context, recipe.held_out_texts
    text = text or tunnel.corpus(recipe.source, *sizes)
    name = f"{re.sub(r'[^a-z0-9.]+', '-', arm.lower())}-d{d}-s{seed}"
    place = state / name
    place.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.csv"
    with FileLock(place / ".lock"):
        _run(arm, recipe, text, place, table, recipe.steps if until is None else until)
    return pd.read_csv(table)


def _run(arm: str, recipe: Recipe, text: tunnel.Text, place: Path, table: Path, until: int) -> None:
    kept = place / "measured.pt"
    measured = torch.load(kept, weights_only=False) if kept.exists() else {}
    before = measured.pop("seconds", 0.0)
    data = text.digest()
    started = time.process_time()

    def keep(model: GPTNeoXForCausalLM, step: int) -> None:
        measured[step] = _measure(model, text.held_out)
        seconds = before + time.process_time() - started
        with cache.replacing(kept) as temporary:
            torch.save({**measured, "seconds": seconds}, temporary)
        done = {known: measured[known] for known in sorted(measured) if known <= step}
        rows = _table(arm, recipe, done)
        with cache.replacing(table) as temporary:
            rows.to_csv(temporary, index=False, float_format=f"%.{DIGITS}g")
        _describe(table.with_suffix(".json"), arm, recipe, data, step, seconds)

    steps = _mixed_steps(recipe.steps, recipe.checkpoints)
    wanted = [step for step in steps if step <= until]
    build = partial(changes.build, arm)
    tunnel.fit(recipe, text, place / "training.pt", wanted, keep, build)


def _table(arm: str, recipe: Recipe, measured: dict[int, tuple]) -> pd.DataFrame:
    rows = []
    best = None
    for step, (numbers, texts) in measured.items():
        if best is None or texts.mean() < best.mean():
            best = texts
        rise = texts - best
        row = {
            "arm": arm,
            "hidden_size": recipe.hidden_size,
            "seed": recipe.seed,
            "step": step,
            "tokens": step * recipe.tokens_a_step,
            "rate": recipe.learning_rate(step),
            **numbers,
            "rise": rise.mean(),
            "rise_se": rise.std(ddof=1) / math.sqrt(len(rise)),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _describe(path: Path, arm: str, recipe: Recipe, data: str, step: int, seconds: float) -> None:
    """Write beside a table where it comes from; the commit is that of the first time."""
    today = datetime.date.today().isoformat()
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    first = {"commit": commit or "unknown", "begun": today}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        first = {name: before[name] for name in first}
    record = {
        "command": f"headbound tunnel {shlex.quote(arm)} {recipe.hidden_size} {recipe.seed}",
        **first,
        "machine": f"{platform.platform()}, one core",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "last": today,
        "core_hours": round(seconds / 3600, 3),
        "finished": step == recipe.steps,
        "steps_done": step,
        "data": data,
        "recipe": asdict(recipe),
    }
    with cache.replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load() -> pd.DataFrame:
    """All archived runs, a row a checkpoint, with the `parameters` and the `ORIGIN` of each.

    **Raises:** `FileNotFoundError` where there is none, as outside a checkout of the book.
    """
    tables = []
    for path in sorted(TABLES.glob("*-s*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        recipe = record["recipe"]
        size = pythia.count(recipe["layers"], recipe["hidden_size"], recipe["vocab_size"])
        origin = {name: record[name] for name in ORIGIN}
        table = pd.read_csv(path.with_suffix(".csv"))
        tables.append(table.assign(parameters=size, **origin))
    if not tables:
        raise FileNotFoundError(f"no archived run in {TABLES}; work in a checkout of the book")
    return pd.concat(tables).sort_values(["arm", "hidden_size", "seed", "step"], ignore_index=True)


def first_text() -> tunnel.Text:
    """The archived runs' text as far as the first steps of seed 0 read it; the rest is zeros.

    The text is made of installed packages' docstrings, so another version of one of them changes
    it. What `first_text.py` of that folder kept lets the beginnings of the runs be made again
    whatever is installed.
    """
    with np.load(TABLES / "first-text.npz") as kept:
        stream = np.zeros(int(kept["length"]), np.int32)
        stream[kept["places"]] = kept["tokens"]
        backend = Tokenizer.from_str(str(kept["tokenizer"]))
        held_out = torch.from_numpy(kept["held_out"].astype(np.int64))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    return tunnel.Text(tokenizer, stream, held_out)


def differences(found: pd.DataFrame, kept: pd.DataFrame) -> pd.Series:
    """How far two tables of one run are apart: each column's largest difference.

    It is a share of the column's largest number in `kept`, over the steps that both have.

    **Raises:** `ValueError` if they have no step in common.
    """
    numbers = [table.set_index("step").select_dtypes("number") for table in (found, kept)]
    one, other = numbers[0].align(numbers[1], join="inner")
    if one.empty:
        raise ValueError("the tables have no step in common")
    apart = (one - other).abs().max()
    largest = other.abs().max()
    return apart / largest.clip(lower=1e-12)
