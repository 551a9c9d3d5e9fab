"""What a sweep costs before anyone starts it: jobs, bytes, GPU hours, disk at its fullest."""

import json
from typing import NamedTuple

import pandas as pd
from transformers import AutoConfig

from headbound import pythia
from sweep import Settings, hub, measure


class Rates(NamedTuple):
    """What a machine sustains: Tflop/s in the sweep's dtype and float64, MB/s, jobs at once."""

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
        listed = hub.listing(model, revision, tries=2)  # a silent hub is not waited for
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
    """A line a model: jobs, bytes of a checkpoint and its head (float16), GPU hours.

    One forward pass: 2 operations for each weight and token, and 4 · layers · width · length for
    each token's attention. The head's spectrum, in float64: V d² for the symmetric Gram matrix and
    about 4/3 d³ for its eigenvalues.
    """
    shapes = [shape(model, names[-1]) for model, names in work.items()]
    frame = pd.DataFrame(shapes, index=list(work))
    layers = frame["layers"]
    width = frame["width"]
    rows = frame["rows"]
    frame["jobs"] = [len(names) for names in work.values()]
    frame["head"] = 2 * rows * width
    frame["each"] = frame["size"] if settings.whole else frame["head"]
    frame["fetched"] = frame["jobs"] * frame["each"]

    body = 24 * layers * width**2
    attention = 4 * layers * width * settings.length
    tokens = settings.texts * settings.length * settings.whole
    forward = tokens * (body + attention + frame["head"])
    gram = rows * width**2
    spectrum = gram + 4 / 3 * width**3
    seconds = forward / (1e12 * rates.tflops)
    seconds += spectrum / (1e12 * rates.tflops64)
    busy = frame["jobs"] * seconds
    frame["GPU hours"] = busy / 3600
    return frame


def words(work: dict[str, list[str]], settings: Settings, rates: Rates) -> str:
    """The plan as text."""
    frame = table(work, settings, rates)
    jobs = frame["jobs"].sum()
    left = measure.left(work, settings)
    done = jobs - len(left)
    fetched = frame["fetched"].sum()
    hours = frame["GPU hours"].sum()
    wait = fetched / (1e6 * rates.megabytes) / 3600
    heads = frame["jobs"] @ frame["head"]
    peak = rates.jobs * frame["each"].max()
    gigabytes = frame[["each", "head", "fetched"]].map(lambda count: f"{count / 1e9:,.3f} GB")
    shown = pd.concat([frame["jobs"], gigabytes, frame[["GPU hours", "bytes"]]], axis=1)
    return f"""{shown.to_string(float_format="{:.2f}".format)}
jobs: {jobs}, {done} of them done
bytes: {fetched / 1e9:,.1f} GB to fetch, {wait:.1f} h at {rates.megabytes:g} MB/s
bytes of the heads alone (whole: false): {heads / 1e9:,.1f} GB
GPU hours: {hours:.2f} busy at {rates.tflops:g} Tflop/s ({rates.tflops64:g} in float64)
disk peak: {peak / 1e9:,.1f} GB with {rates.jobs} jobs at once; HEADBOUND_KEEP=1 keeps all"""
