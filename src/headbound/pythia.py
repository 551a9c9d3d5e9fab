"""Pythia's sizes, and the cited figures of the paper and of EleutherAI in `book/data`."""

import re

import pandas as pd

from headbound import BOOK

# Layers, hidden size and padded vocabulary, as in Biderman et al. 2023, table 1.
PYTHIA = {
    "14m": (6, 128, 50_304),
    "31m": (6, 256, 50_304),
    "70m": (6, 512, 50_304),
    "160m": (12, 768, 50_304),
    "410m": (24, 1024, 50_304),
    "1b": (16, 2048, 50_304),
    "1.4b": (24, 2048, 50_304),
    "2.8b": (32, 2560, 50_304),
    "6.9b": (32, 4096, 50_432),
    "12b": (36, 5120, 50_688),
}
STEP_TOKENS = 2**21  # tokens a step of the main runs
DATA = BOOK / "data"


def count(layers: int, d: int, vocabulary: int, embeddings: bool = True) -> int:
    """Parameters of a GPT-NeoX of l layers, hidden size d and vocabulary V.

    l (12 d² + 13 d) + 2 d,  and 2 V d of embeddings, the head being one
    """
    body = layers * (12 * d**2 + 13 * d) + 2 * d
    return body + 2 * vocabulary * d if embeddings else body


def parameters(model: str, embeddings: bool = True) -> int:
    """Those of a Pythia model; `ValueError` for a name that has no size of Pythia's."""
    return count(*PYTHIA[_size(model)], embeddings)


def nominal(model: str) -> float:
    """The number in a model's name, as Figure 1b plots it: 70e6 for `pythia-70m` or `70M`."""
    size = _size(model)
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


def figures(figure: str, **chosen: str) -> pd.DataFrame:
    """The curves of the paper's figure 1a, 1b, 2, 3, 5, 6b, 7 or 8, read off the picture.

    `chosen` keeps the rows that have this value in this column, as `curve="160M"`.

    **Returns:** columns figure, series, curve, x_name, x, y_name, y, error (±, of reading) and how.

    **Raises:** `ValueError` where nothing is left; `FileNotFoundError` outside a checkout.

    **Source:** Godey et al. 2024; `book/data/README.md` says how each figure was read.
    """
    table = _read("paper-figures.csv", figure=figure, **chosen)
    if table.empty:
        raise ValueError(f"figure {figure!r}, {chosen}: no such curve; see book/data/README.md")
    return table


def evaluations(**chosen: str | int) -> pd.DataFrame:
    """EleutherAI's published evaluations of Pythia's checkpoints; `chosen` as of `figures`.

    **Returns:** columns model, batch (tokens a step), step, tokens (seen in training), shots, task,
    metric (acc, acc_norm, ppl), value and stderr.

    **Source:** `evals/pythia-v1` of EleutherAI/pythia; `book/data/README.md` names the commit.
    """
    return _read("pythia-evals.csv", **chosen)


def _size(model: str) -> str:
    found = re.search(r"(?:pythia-|^)([\d.]+[mb])\b", model.lower())
    if not found or found[1] not in PYTHIA:
        known = ", ".join(PYTHIA)
        raise ValueError(f"model = {model!r}: its size is unknown; Pythia's are {known}")
    return found[1]


def _read(name: str, **chosen: str | int) -> pd.DataFrame:
    path = DATA / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: cited figures lie in the book; run in a checkout of it")
    words = dict.fromkeys(("figure", "series", "curve"), str)
    table = pd.read_csv(path, dtype=words, keep_default_na=False)
    for column, value in chosen.items():
        table = table[table[column] == value]
    return table.reset_index(drop=True)
