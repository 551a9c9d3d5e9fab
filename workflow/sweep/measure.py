"""Measurements over models × revisions: one small file a checkpoint, never half a one, never a stale one."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.linalg import norm

import headbound
from headbound import cache, corpus, device, hidden, models
from headbound.measure import checkpoint, spectrum
from headbound.progress import bar
from sweep import checkpoints, remote

SAMPLE = 64  # entries of the head kept with each result, evenly spread


class Settings(NamedTuple):
    """What a sweep measures. With the package's version, it is what makes a result valid.

    `name` is the folder of the results. `whole` loads each checkpoint, for loss and anisotropy; else only heads
    are read. `texts` passages of `length` tokens are held-out ones of `source`; `dtype` is the model's in
    memory; `reads`: see `checkpoints.head`.
    """

    name: str = "paper"
    whole: bool = True
    source: str = "docstrings"
    texts: int = 256
    length: int = 256
    dtype: str = "float32"
    reads: int | None = None


def read(path: str | Path) -> tuple[dict[str, list[str]], Settings]:
    """A sweep's file (YAML), or that which `HEADBOUND_SWEEP` names: its table of work and its settings.

    **Raises:** `ValueError` for a key that is neither `models`, `steps` nor a setting.
    """
    path = os.environ.get("HEADBOUND_SWEEP") or path
    plan = yaml.safe_load(Path(path).read_text())
    revisions = [f"step{step}" for step in sorted(plan.pop("steps"))]
    table = dict.fromkeys(plan.pop("models"), revisions)
    if unknown := set(plan) - set(Settings._fields):
        raise ValueError(
            f"{path}: unknown {sorted(unknown)}; it may have models, steps, {', '.join(Settings._fields)}"
        )
    return table, Settings(**plan)


def folder(model: str, settings: Settings) -> Path:
    """Where the results of a model are."""
    return cache.cache_dir() / "sweeps" / settings.name / model.replace("/", "--")


def audited(model: str, revisions: Sequence[str], settings: Settings) -> list[dict[str, str]]:
    """The audit of a model's revisions, made once for the sweep and kept beside its results."""
    path = folder(model, settings) / "audit.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    if [row["revision"] for row in rows] != list(revisions):
        rows = checkpoints.audit(model, revisions).to_dict("records")
        _write(path, rows)
    return rows


def result(model: str, revision: str, settings: Settings) -> dict[str, Any] | None:
    """A job's result if it is there and of these settings and this version; any other is named and not used."""
    path = folder(model, settings) / f"{revision}.json"
    row = json.loads(path.read_text()) if path.exists() else None
    if row and row["made_by"] != (made_by := _made_by(settings)):
        old = {k: v for k, v in row["made_by"].items() if made_by.get(k) != v}
        print(
            f"{model} at {revision}: its result was made with {old}; it is measured again",
            file=sys.stderr,
        )
        return None
    return row


def measure(
    model: str,
    revision: str,
    settings: Settings,
    audit: Sequence[Mapping[str, str]],
    keep: bool = False,
) -> dict[str, Any]:
    """Measure one checkpoint, or read its result; one that the audit does not find `ok` gets no numbers.

    **Returns:** model, revision, step, the audit's status, detail and commit, a fingerprint of the vocabulary,
    how the bytes were checked, and the numbers: `singular_entropy`, `effective_rank`, and of whole checkpoints
    `loss` (nats a token) and last-layer `anisotropy`, before and after the norm, with intervals over texts.

    **Raises:** as `remote.listing` does; `ValueError` if the checkpoint changed since the audit.
    """
    if row := result(model, revision, settings):
        return row
    row = {"model": model, **next(dict(row) for row in audit if row["revision"] == revision)}
    row["step"] = int(revision.removeprefix("step"))
    if row["status"] == "ok":
        listed, numbers = (_whole if settings.whole else _head)(model, revision, settings, keep)
        if listed.commit != row["commit"]:
            where = folder(model, settings)
            raise ValueError(
                f"{model} at {revision}: changed on the Hub since its audit; remove {where} and run again"
            )
        vocabulary = json.dumps(sorted(remote.tokenizer(listed).get_vocab().items()))
        row.update(numbers, vocabulary=hashlib.sha256(vocabulary.encode()).hexdigest()[:12])
    row["made_by"] = _made_by(settings)
    _write(folder(model, settings) / f"{revision}.json", row)
    return row


def left(table: Mapping[str, Sequence[str]], settings: Settings) -> list[tuple[str, str]]:
    """The jobs of a table without a valid result."""
    return [(m, r) for m, names in table.items() for r in names if not result(m, r, settings)]


def run(table: Mapping[str, Sequence[str]], settings: Settings) -> pd.DataFrame:
    """All results of a table, what is missing computed here. Only rows with the status `ok` belong on a curve.

    Beyond the audit's, a row is `suspicious` if the way from the head before to the head after is over three times as
    long when it leads over this one: what two checkpoints look like that swapped their names.

    **Raises:** `ConnectionError` at the end, naming what the network left out; `ValueError` if the models have
    different vocabularies, whose losses can't be compared.
    """
    lost: list[str] = []
    todo = left(table, settings)
    for model, revision in bar(todo, "checkpoints") if todo else []:
        try:
            if not any(error.startswith(f"audit of {model}") for error in lost):
                measure(model, revision, settings, audited(model, table[model], settings))
        except ConnectionError as error:
            known = (folder(model, settings) / "audit.json").exists()
            lost.append(str(error) if known else f"audit of {model}, so all of it: {error}")
    if lost:
        raise ConnectionError(
            f"{len(left(table, settings))} checkpoints are missing: " + "; ".join(lost)
        )
    frame = pd.DataFrame(
        [result(model, r, settings) for model, names in table.items() for r in names]
    )
    if "vocabulary" in frame and frame.vocabulary.nunique() > 1:
        groups = frame.dropna(subset="vocabulary").groupby("vocabulary").model.unique().map(list)
        raise ValueError(
            f"models of different vocabularies, {groups.tolist()}: sweep each group by itself"
        )
    for _, rows in frame[frame.status == "ok"].groupby("model"):
        for before, here, after in zip(rows.index, rows.index[1:], rows.index[2:], strict=False):
            a, b, c = (np.array(frame.sample_of_head[i]) for i in (before, here, after))
            if norm(a - b) + norm(b - c) > 3 * norm(a - c):
                frame.loc[here, ["status", "detail"]] = (
                    "suspicious",
                    "far from the checkpoints before and after it",
                )
    return frame.drop(columns=["made_by", "sample_of_head"], errors="ignore")


def _head(
    model: str, revision: str, settings: Settings, keep: bool
) -> tuple[remote.Listing, dict[str, Any]]:
    head = checkpoints.head(model, revision, settings.reads, keep)
    real = remote.tokenizer(head.listed).get_vocab_size()
    weight = head.weight[:real]
    entropy = spectrum.singular_entropy(spectrum.singular_values(weight.to(device.pick())))
    return head.listed, {
        **_described(weight, entropy),
        "fetched": head.fetched,
        "checked": "ranges",
    }


def _whole(
    model: str, revision: str, settings: Settings, keep: bool
) -> tuple[remote.Listing, dict[str, Any]]:
    held_out = corpus.split(corpus.load(settings.source))[1]
    with checkpoints.local(model, revision, keep) as (path, listed):
        network, tokenizer = models.load(str(path), dtype=getattr(torch, settings.dtype))
        rows = hidden.sequences(tokenizer, held_out, settings.texts, settings.length)
        found = checkpoint.measure(network, rows, tokenizer)
        head = _described(models.head_weight(network, tokenizer), found["singular_entropy"])
        return listed, {**found, **head, "checked": "whole files"}


def _described(weight: torch.Tensor, entropy: float) -> dict[str, Any]:
    d = min(weight.shape)
    some = weight.flatten()[:: max(1, weight.numel() // SAMPLE)][:SAMPLE].float().tolist()
    rank = d * math.exp(-entropy)  # spectrum.effective_rank
    return {"d": d, "singular_entropy": entropy, "effective_rank": rank, "sample_of_head": some}


def _made_by(settings: Settings) -> dict[str, Any]:
    return {"version": headbound.__version__, **settings._asdict()}


def _write(path: Path, value: object) -> None:
    with cache.replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
