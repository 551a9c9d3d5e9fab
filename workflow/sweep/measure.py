"""Measurements over models × revisions: one small file a checkpoint, never half, never stale."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.linalg import norm

from headbound import cache, corpus, device, hidden, models
from headbound.measure import checkpoint
from headbound.progress import bar
from sweep import Settings, hub
from sweep.audit import audit

SAMPLE = 64  # entries of the head kept with each result, evenly spread
DETOUR = 3  # times the direct way between two heads: over one out of place it is longer


def audited(model: str, revisions: Sequence[str], settings: Settings) -> list[dict[str, str]]:
    """The audit of a model's revisions, made once for the sweep and kept beside its results."""
    path = settings.folder(model) / "audit.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if [row["revision"] for row in rows] != list(revisions):
        rows = audit(model, revisions).to_dict("records")
        _write(path, rows)
    return rows


def result(model: str, revision: str, settings: Settings) -> dict[str, Any] | None:
    """A job's result if it is of these settings and this version; any other is named, not used."""
    path = settings.folder(model) / f"{revision}.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))
    wanted = settings.made_by()
    if row["made_by"] != wanted:
        old = {k: v for k, v in row["made_by"].items() if wanted.get(k) != v}
        again = f"its result was made with {old}; it is measured again"
        print(f"{model} at {revision}: {again}", file=sys.stderr)
        return None
    return row


def measure(
    model: str,
    revision: str,
    settings: Settings,
    audit: Sequence[Mapping[str, str]],
    keep: bool = False,
) -> dict[str, Any]:
    """Measure one checkpoint, or read its result; one that is not `ok` gets no numbers.

    **Returns:** model, revision, step, the audit's status, detail and commit, a fingerprint of the
    vocabulary, and the numbers: those of `checkpoint.head`, and of whole checkpoints those of
    `checkpoint.measure`.

    **Raises:** as `hub.listing` does; `ValueError` if the checkpoint changed since the audit.
    """
    row = result(model, revision, settings)
    if row:
        return row
    row = next(dict(row) for row in audit if row["revision"] == revision)
    row["step"] = int(revision.removeprefix("step"))
    if row["status"] == "ok":
        of = _whole if settings.whole else _head
        head, numbers = of(model, revision, settings, keep)
        if head.listed.commit != row["commit"]:
            fix = f"changed on the Hub since its audit; remove {settings.folder(model)}"
            raise ValueError(f"{model} at {revision}: {fix} and run again")
        vocabulary = json.dumps(sorted(hub.tokenizer(head.listed).get_vocab().items()))
        step = max(1, head.weight.numel() // SAMPLE)
        some = head.weight.flatten()[::step][:SAMPLE]
        row |= {**numbers, "d": head.weight.shape[1], "sample_of_head": some.float().tolist()}
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        row["vocabulary"] = digest[:12]
    row["made_by"] = settings.made_by()
    _write(settings.folder(model) / f"{revision}.json", row)
    return row


def left(table: Mapping[str, Sequence[str]], settings: Settings) -> list[tuple[str, str]]:
    """The jobs of a table without a valid result."""
    return [(m, r) for m, names in table.items() for r in names if not result(m, r, settings)]


def run(table: Mapping[str, Sequence[str]], settings: Settings) -> pd.DataFrame:
    """All results of a table, what is missing computed here. Only `ok` rows belong on a curve.

    Beyond the audit's, a row is `suspicious` if the way from the head before to the head after is
    over `DETOUR` times as long when it leads over this one: what two checkpoints look like that
    swapped their names.

    **Raises:** `ConnectionError` at the end, naming what the network left out; `ValueError` if the
    models have different vocabularies, whose losses can't be compared.
    """
    lost: list[str] = []
    lost_models: set[str] = set()
    todo = left(table, settings)
    for model, revision in bar(todo, "checkpoints") if todo else []:
        if model in lost_models:
            continue
        rows = None
        try:
            rows = audited(model, table[model], settings)
            measure(model, revision, settings, rows)
        except ConnectionError as error:
            lost.append(str(error) if rows else f"audit of {model}, so all of it: {error}")
            lost_models |= set() if rows else {model}
    if lost:
        missing = len(left(table, settings))
        raise ConnectionError(f"{missing} checkpoints are missing: {'; '.join(lost)}")
    jobs = [(model, name) for model, names in table.items() for name in names]
    frame = pd.DataFrame([result(*job, settings) for job in jobs])
    _same_vocabulary(frame)
    for _, rows in frame[frame["status"] == "ok"].groupby("model"):
        far = _out_of_place(rows)
        frame.loc[far, "status"] = "suspicious"
        frame.loc[far, "detail"] = "far from the checkpoints before and after it"
    return frame.drop(columns=["made_by", "sample_of_head"], errors="ignore")


def _same_vocabulary(frame: pd.DataFrame) -> None:
    known = frame.reindex(columns=["model", "vocabulary"]).dropna()
    groups = known.groupby("vocabulary")["model"].unique()
    if len(groups) > 1:
        told = groups.map(list).tolist()
        raise ValueError(f"models of different vocabularies, {told}: sweep each group by itself")


def _out_of_place(rows: pd.DataFrame) -> list[int]:
    heads = np.array(rows["sample_of_head"].tolist())
    if len(heads) < 3:
        return []
    steps = norm(np.diff(heads, axis=0), axis=1)
    over = steps[:-1] + steps[1:]
    straight = norm(heads[2:] - heads[:-2], axis=1)
    inner = rows.index[1:-1]
    return inner[over > DETOUR * straight].tolist()


def _head(model: str, revision: str, settings: Settings, keep: bool):
    head = hub.head(model, revision, keep)
    rows = hub.tokenizer(head.listed).get_vocab_size()
    weight = head.weight[:rows]
    numbers = checkpoint.head(weight.to(device.pick()))
    return head._replace(weight=weight), numbers


def _whole(model: str, revision: str, settings: Settings, keep: bool):
    texts = corpus.load(settings.source)
    held_out = corpus.split(texts)[1]
    with hub.local(model, revision, keep) as (path, listed):
        dtype = getattr(torch, settings.dtype)
        network, tokenizer = models.load(str(path), dtype=dtype)
        rows = hidden.sequences(tokenizer, held_out, settings.texts, settings.length)
        numbers = checkpoint.measure(network, rows, tokenizer)
        weight = models.head_weight(network, tokenizer)
    return hub.Head(weight, listed), numbers


def _write(path: Path, value: object) -> None:
    with cache.replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
