"""What a sweep costs before anyone starts it: jobs, bytes to fetch, GPU hours, disk at its fullest."""

import json
from typing import NamedTuple

import pandas as pd
from transformers import AutoConfig

from headbound import pythia
from sweep import Settings, hub, measure


class Rates(NamedTuple):
    """What a machine sustains: Tflop/s in the sweep's dtype and in float64, MB/s from the Hub, jobs at once."""

    tflops: float = 20
    tflops64: float = 5
    megabytes: float = 200
    jobs: int = 2


def shape(model: str, revision: str) -> dict[str, int | str]:
    """A checkpoint's layers, width, head rows and bytes, and how they are known.

    **Raises:** `ConnectionError` where neither the Hub nor Pythia's table knows; `ValueError` for a
    configuration that transformers can't read.
    """
    try:
        listed = hub.listing(model, revision)
    except ConnectionError:
        size = model.split("pythia-")[-1].removesuffix("-deduped")
        if size not in pythia.PYTHIA:
            raise
        layers, width, rows = pythia.PYTHIA[size]
        size, source = 2 * pythia.parameters(model), "computed: hub out of reach"
    else:
        given = json.loads(hub.small_file(listed, "config.json"))
        # Each family has its own key names; transformers maps them all to these.
        config = AutoConfig.for_model(given.pop("model_type"), **given).get_text_config()
        layers, width, rows = config.num_hidden_layers, config.hidden_size, config.vocab_size
        weights = next(iter(listed.weights().values()))
        size, source = sum(file.size for file in weights.values()), "measured"
    return {"layers": layers, "width": width, "rows": rows, "size": size, "bytes": source}


def table(work: dict[str, list[str]], settings: Settings, rates: Rates) -> pd.DataFrame:
    """A line a model: jobs, bytes of a checkpoint and of its head (float16), bytes fetched, GPU hours.

    Two forward passes, one for the loss (with the head) and one for the hidden states: 2 operations
    for each weight and token, and 4 · layers · width · length for each token's attention. The head's
    spectrum, in float64: V d² for the symmetric Gram matrix and about 4/3 d³ for its eigenvalues.
    """
    frame = pd.DataFrame({model: shape(model, names[-1]) for model, names in work.items()}).T
    frame["jobs"] = [len(names) for names in work.values()]
    frame["head"] = 2 * frame["rows"] * frame["width"]
    frame["each"] = frame["size"] if settings.whole else frame["head"]
    frame["fetched"] = frame["jobs"] * frame["each"]
    body = 24 * frame["layers"] * frame["width"] ** 2
    attention = 4 * frame["layers"] * frame["width"] * settings.length
    tokens = settings.texts * settings.length * settings.whole
    forward = tokens * (2 * (body + attention) + 2 * frame["rows"] * frame["width"])
    spectrum = frame["rows"] * frame["width"] ** 2 + 4 / 3 * frame["width"] ** 3
    seconds = forward / rates.tflops / 1e12 + spectrum / rates.tflops64 / 1e12
    frame["GPU hours"] = frame["jobs"] * seconds / 3600
    return frame


def words(work: dict[str, list[str]], settings: Settings, rates: Rates) -> str:
    """The plan as text."""
    frame = table(work, settings, rates)
    done = frame["jobs"].sum() - len(measure.left(work, settings))
    total = frame["fetched"].sum()
    shown = frame[["jobs", "each", "head", "fetched", "GPU hours", "bytes"]].copy()
    for column in ("each", "head", "fetched"):
        shown[column] = [f"{count / 1e9:,.3f} GB" for count in shown[column]]
    shown["GPU hours"] = [f"{hours:.2f}" for hours in shown["GPU hours"]]
    wait = total / rates.megabytes / 1e6 / 3600
    speed = f"{rates.tflops:g} Tflop/s ({rates.tflops64:g} in float64)"
    peak = rates.jobs * frame["each"].max() / 1e9
    heads = (frame["jobs"] * frame["head"]).sum() / 1e9
    return f"""{shown.to_string()}
jobs: {frame["jobs"].sum()}, {done} of them done
bytes: {total / 1e9:,.1f} GB to fetch, {wait:.1f} h at {rates.megabytes:g} MB/s
bytes of the heads alone (whole: false): {heads:,.1f} GB
GPU hours: {frame["GPU hours"].sum():.2f} busy at {speed}
disk peak: {peak:,.1f} GB with {rates.jobs} jobs at once; HEADBOUND_KEEP=1 keeps all"""
