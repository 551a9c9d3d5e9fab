"""Are published checkpoints what their names say? Compares hashes that the Hub lists."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pandas as pd

from sweep.hub import Listing, listing

UNUSUAL = 0.01  # a file's size off the usual one, as a share


def audit(model: str, names: Sequence[str]) -> pd.DataFrame:
    """Compare the weight files of revisions, given in training order.

    Two whole checkpoints that swapped names have hashes like any others: that is not seen here.

    **Returns:** a row for each, with its commit, `detail` saying with whom, and `status` one of

    - `ok`;
    - `identical`: the same weights as others, so at most one is what its name says (the last one is
      believed where `main` equals it);
    - `suspicious`: some weight files are another's too, or over 1 % off that file's usual size;
    - `missing`: no such revision, or no weights in it.
    """
    listed = {"main": _look(model, "main")}  # alone: a hub that is silent is waited for once
    with ThreadPoolExecutor(8) as pool:
        looked = pool.map(partial(_look, model), names)
        listed |= dict(zip(names, looked, strict=True))
    weights = {name: _weights(name, found) for name, found in listed.items()}
    files = pd.concat([weights[name] for name in names])
    table = pd.DataFrame({"model": model, "revision": names, "status": "ok", "detail": ""})
    table["commit"] = [listed[name].commit if listed[name] else "" for name in names]
    table = table.set_index("revision")

    last = names[-1]
    ends = pd.concat([weights["main"], weights[last]])
    believed = _sharers(ends, whole=True).index.intersection([last])
    partly = _sharers(files, whole=False).drop(believed, errors="ignore")
    same = _sharers(files, whole=True).drop(believed, errors="ignore")
    gone = table.index.difference(files["revision"])
    there = table.loc[gone, "commit"].ne("")
    lacking = there.map({True: "no weights in it", False: "no such revision"})
    # Each mark is a detail by revision; the later one wins.
    _mark(table, "suspicious", "unusual size: " + _odd(files))
    _mark(table, "suspicious", "shares files with " + partly)
    _mark(table, "identical", same)
    _mark(table, "missing", lacking)
    return table.reset_index()[["model", "revision", "status", "detail", "commit"]]


def _odd(files: pd.DataFrame) -> pd.Series:
    """The files of each revision that are not as large as others of their name; names joined."""
    sizes = files.groupby("path")["size"]
    usual = sizes.transform("median")
    off = files["size"] / usual - 1
    odd = files[off.abs() > UNUSUAL]
    return odd.groupby("revision")["path"].agg(", ".join)


def _look(model: str, name: str) -> Listing | None:
    with suppress(FileNotFoundError):
        return listing(model, name)


def _weights(name: str, listed: Listing | None) -> pd.DataFrame:
    kinds = listed.weights() if listed else {}
    rows = [
        (name, kind, path, *file) for kind, files in kinds.items() for path, file in files.items()
    ]
    return pd.DataFrame(rows, columns=["revision", "kind", "path", "size", "content"])


def _sharers(files: pd.DataFrame, whole: bool) -> pd.Series:
    """With whom each revision shares a file, or (`whole`) all files of a format; names joined."""
    pairs = files.merge(files, on=["kind", "content"], suffixes=("", "_other"))
    pairs = pairs[pairs["revision"] != pairs["revision_other"]]
    if whole:
        one = ["revision", "kind"]
        size = files.groupby(one)["path"].nunique().rename("size")
        shared = pairs.groupby([*one, "revision_other"])["path"].nunique()
        table = shared.rename("shared").reset_index()
        counted = table.merge(size, on=one)
        pairs = counted[counted["shared"] == counted["size"]]
    order = files["revision"].drop_duplicates().tolist()
    places = pairs["revision_other"].map(order.index)
    pairs = pairs.loc[places.sort_values(kind="stable").index]
    once = pairs.drop_duplicates(["revision", "revision_other"])
    return once.groupby("revision")["revision_other"].agg(", ".join)


def _mark(table: pd.DataFrame, status: str, detail: pd.Series) -> None:
    table.loc[detail.index, "status"] = status
    table.loc[detail.index, "detail"] = detail
