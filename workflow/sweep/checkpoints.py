"""Published checkpoints: read no more of one than is needed, and check that it is what its name says."""

import json
import zipfile
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sweep.remote import FORMATS, Listing, byte_range, files, listing, small_file

HEADS = ("embed_out.weight", "lm_head.weight")
TIED = ("embed_in.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
HEADER = 16_384  # bytes of a safetensors file asked for first; most headers fit


class Head(NamedTuple):
    """A head as stored, padding rows included; its tensor's name, and the bytes it took to fetch."""

    weight: Float[Tensor, "rows d"]
    name: str
    fetched: int
    listed: Listing


def head(model: str, revision: str = "main", reads: int | None = None, keep: bool = False) -> Head:
    """Fetch a checkpoint's head alone: one tensor's bytes out of safetensors, or one whole `.bin` file.

    Checked of each range: bounds, length, the file's size and hash as listed, its header, finite values. As a SHA-256
    covers a whole file only, the bytes themselves rest on the transport (https authenticates them) or on equal
    answers: a server that is wrong each time in the same way goes unnoticed. Whole files are checked against
    their SHA-256.

    **Arguments:**

    - `reads`: how many equal answers to ask for; None: one over https, two otherwise.
    - `keep`: leave a `.bin` file in the cache.

    **Raises:** as `remote.listing`; `ValueError` for a checkpoint without a head, or with NaN or Inf in it.
    """
    listed = listing(model, revision, reads)
    kind = next(iter(listed.weights()), None)
    if kind is None:
        raise ValueError(
            f"revision = {revision!r}: {model} has no .safetensors or .bin there; choose another"
        )
    path = f"{FORMATS[kind]}.{kind}"
    if path not in listed.files:
        where = json.loads(small_file(listed, f"{path}.index.json"))["weight_map"]
        path = where[_head_name(listed, where)]
    if kind == "bin":
        with files(listed, [path], keep) as folder:
            mapped = zipfile.is_zipfile(folder / path)
            try:
                state = torch.load(
                    folder / path, map_location="cpu", weights_only=True, mmap=mapped
                )
            except UnpicklingError as error:
                raise ValueError(
                    f"{model} at {revision}: {path} holds more than weights; not loaded"
                ) from error
            name = _head_name(listed, state)
            return _checked(listed, state[name].clone(), name, listed.files[path].size)
    data = byte_range(listed, path, 0, HEADER, reads)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        data += byte_range(listed, path, len(data), start, reads)
    header = json.loads(data[8:start])
    name = _head_name(listed, header)
    begin, end = header[name]["data_offsets"]
    # A file of this one tensor, for the library to read.
    alone = json.dumps({name: {**header[name], "data_offsets": [0, end - begin]}}).encode()
    tensor = byte_range(listed, path, start + begin, start + end, reads)
    weight = load(len(alone).to_bytes(8, "little") + alone + tensor)[name]
    return _checked(listed, weight, name, len(data) + len(tensor))


@contextmanager
def local(model: str, revision: str = "main", keep: bool = False) -> Iterator[tuple[Path, Listing]]:
    """A whole checkpoint in a folder, each file checked against its hash; removed after, unless `keep`.

    **Raises:** as `remote.listing`; `ValueError` for a model that needs code of its own; `OSError` on a full disk.
    """
    listed = listing(model, revision)
    config = json.loads(small_file(listed, "config.json"))
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"model = {model!r}: it needs code of its own, which is never run; choose another model"
        )
    texts = [p for p in listed.files if "/" not in p and p.endswith((".json", ".txt", ".model"))]
    with files(listed, [*texts, *next(iter(listed.weights().values()), {})], keep) as folder:
        yield folder, listed


def audit(model: str, names: Sequence[str]) -> pd.DataFrame:
    """Compare the content hashes that the Hub lists for revisions, given in training order; no weights move.

    Two whole checkpoints that swapped their names have hashes like any others: hashes can't show that.

    **Returns:** a row for each, with its commit, `detail` saying with whom, and `status` one of

    - `ok`;
    - `identical`: the same weights as others, so at most one is what its name says (the last is believed where `main`
      equals it);
    - `suspicious`: some weight files are another's too, or over 1 % off that file's usual size;
    - `missing`: no such revision, or no weights in it.
    """

    def look(name: str) -> Listing | None:
        with suppress(FileNotFoundError):
            return listing(model, name)

    with ThreadPoolExecutor(8) as pool:
        listed = dict(zip(["main", *names], pool.map(look, ["main", *names]), strict=True))
    found = {name: each.weights() if each else {} for name, each in listed.items()}
    owners, sizes = defaultdict(set), defaultdict(list)
    for name in names:
        for path, file in ChainMap(*found[name].values()).items():
            owners[file.content].add(name)
            sizes[path].append(file.size)
    usual = {path: sorted(values)[len(values) // 2] for path, values in sizes.items()}

    def judge(name: str) -> tuple[str, str]:
        kinds = found[name]
        if not kinds:
            return "missing", "no weights in it" if listed[name] else "no such revision"
        if name == names[-1] and any(
            found["main"].get(kind) == files for kind, files in kinds.items()
        ):
            return "ok", ""
        sharers = [[owners[f.content] - {name} for f in files.values()] for files in kinds.values()]
        alike = set().union(*(set.intersection(*each) for each in sharers))
        others = ", ".join(sorted(alike or set().union(*chain(*sharers)), key=list(names).index))
        if others:
            return ("identical", others) if alike else ("suspicious", f"shares files with {others}")
        odd = [
            p
            for p, file in ChainMap(*kinds.values()).items()
            if abs(file.size / usual[p] - 1) > 0.01
        ]
        return ("suspicious", f"unusual size: {', '.join(odd)}") if odd else ("ok", "")

    rows = [(model, name, *judge(name), getattr(listed[name], "commit", "")) for name in names]
    return pd.DataFrame(rows, columns=["model", "revision", "status", "detail", "commit"])


def _head_name(listed: Listing, names: Iterable[str]) -> str:
    """The head among a file's tensors, else the embedding that a tied model uses as head."""
    for endings in (HEADS, TIED):
        found = [
            name for name in names if f".{name}".endswith(tuple(f".{ending}" for ending in endings))
        ]
        untied = (
            endings == TIED
            and json.loads(small_file(listed, "config.json")).get("tie_word_embeddings") is False
        )
        if len(found) == 1 and not untied:
            return found[0]
    raise ValueError(
        f"{listed.model} at {listed.revision}: no single head among its tensors; choose another"
    )


def _checked(listed: Listing, weight: Tensor, name: str, fetched: int) -> Head:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(
            f"{listed.model} at {listed.revision}: {name} is no finite matrix; choose another revision"
        )
    return Head(weight, name, fetched, listed)
