"""Many checkpoints measured alike: a row each, kept in the cache, so that a stopped run goes on."""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

import headbound
from headbound import cache, corpus, device, hidden, models
from headbound.measure import checkpoint

SCHEMA = json.loads(files("headbound").joinpath("measurements.json").read_text("utf-8"))
FORMAT = SCHEMA["properties"]["format"]["const"]
COLUMNS = list(SCHEMA["properties"]["rows"]["items"]["properties"])
FEW = 8  # passages for what needs all logits at once
Row = dict[str, Any]
HeadOnHub = Callable[[str, str], Float[Tensor, "vocab d"]]


def run(
    names: Sequence[str],
    revisions: Sequence[str],
    source: str | None,
    texts: int,
    length: int,
    head_on_hub: HeadOnHub,
) -> pd.DataFrame:
    """A row a checkpoint, with the columns and units of `measurements.json`; a line said of each.

    The names are folders, `.gguf` files, and Hub ids, these at each of the `revisions`. `source`
    gives the held-out passages; None reads heads alone, a Hub id's by `head_on_hub`.

    **Raises:** `ValueError` as `corpus.load`, or for revisions without a Hub id; or, after the last
    checkpoint, naming those that could not be measured and why.
    """
    here = {name: name in models.WHEELS or Path(name).expanduser().exists() for name in names}
    if revisions and all(here.values()):
        raise ValueError(f"revisions = {','.join(revisions)}: of Hub ids only, none is given")
    held_out = [] if source is None else corpus.split(corpus.load(source))[1]
    work = []
    for model, local in here.items():
        wanted = [""] if local or not revisions else revisions
        work += [(model, revision) for revision in wanted]
    rows = []
    lost = []
    for model, revision in work:
        try:
            if source is not None:
                row = _whole(model, revision, held_out, texts, length)
            elif here[model]:
                row = _head(models.head_weight(*models.load(model)))
            else:
                row = _head(head_on_hub(model, revision or "main"))
        except (ValueError, OSError, MemoryError) as error:
            lost.append(f"{model} {revision}".strip() + f": {error}")
            continue
        rows.append({"model": model, "revision": revision, **row})
        print(_line(rows[-1]), flush=True)
    if lost:
        told = f"{len(lost)} of {len(work)} not measured: {'; '.join(lost)}"
        raise ValueError(f"{told}; no table is written, what was measured is kept")
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def to_json(frame: pd.DataFrame) -> str:
    """The rows beside their schema; what is not known is null."""
    rows = json.loads(frame.to_json(orient="records", double_precision=15))
    said = {"format": FORMAT, "schema": SCHEMA, "rows": rows}
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def _head(weight: Tensor) -> Row:
    content = weight.detach().float().cpu().contiguous().numpy().tobytes()
    key = [content, list(weight.shape)]
    return _kept(key, weight, lambda: checkpoint.head(weight.to(device.pick())))


def _whole(model: str, revision: str, held_out: Sequence[str], texts: int, length: int) -> Row:
    network, tokenizer = models.load(model, revision or None)
    weight = models.head_weight(network, tokenizer)
    rows = hidden.sequences(tokenizer, held_out, texts, length)
    checkpoint.check_length(network, length, predicted=1)

    def work() -> Row:
        found = checkpoint.measure(network, rows, tokenizer)
        few = rows[:FEW].to(network.device)
        return found | checkpoint.outputs(network, few)

    key = [models.key(network, tokenizer), rows.numpy().tobytes()]
    return _kept(key, weight, work)


def _kept(key: Sequence[object], weight: Tensor, work: Callable[[], Row]) -> Row:
    """A checkpoint's numbers, worked out once; its head's size beside them."""
    name = cache.key(headbound.__version__, *key, libraries=["torch", "transformers"])
    vocabulary, d = weight.shape
    return {"vocabulary": vocabulary, "d": d} | cache.kept(
        cache.cache_dir() / "measured" / f"{name}.json", work
    )


def _line(row: Row) -> str:
    told = f"head entropy {row['singular_entropy']:.4f} nats"
    if "loss" in row:
        cosine = f"last-layer cosine {row['anisotropy_after_norm']:.3f}"
        told = f"loss {row['loss']:.4f} nats a token, {cosine}, {told}"
    name = f"{row['model']} {row['revision']}".strip()
    return f"{name}: {told}"
