"""Are published checkpoints what their names say? The hashes that the Hub lists, compared; no weights move."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pandas as pd

from sweep.hub import Listing, listing

FILE = ["revision", "kind", "path", "size", "content"]
UNUSUAL = 0.01  # a file's size off the usual one, as a share


def audit(model: str, names: Sequence[str]) -> pd.DataFrame:
    """Compare the weight files of revisions, given in training order.

    Two whole checkpoints that swapped their names have hashes like any others: hashes can't show that.

    **Returns:** a row for each, with its commit, `detail` saying with whom, and `status` one of

    - `ok`;
    - `identical`: the same weights as others, so at most one is what its name says (the last one is
      believed where `main` equals it);
    - `suspicious`: some weight files are another's too, or over 1 % off that file's usual size;
    - `missing`: no such revision, or no weights in it.
    """
    with ThreadPoolExecutor(8) as pool:
        listed = list(pool.map(lambda name: _look(model, name), ["main", *names]))
    found = dict(zip(names, listed[1:], strict=True))
    files = pd.concat([_weights(name, each) for name, each in found.items()])
    table = pd.DataFrame({"status": "ok", "detail": ""}, index=pd.Index(names, name="revision"))
    table["model"] = model
    table["commit"] = [each.commit if each else "" for each in listed[1:]]

    there = files.groupby("revision").size()
    odd_size = (files["size"] / files.groupby("path")["size"].transform("median") - 1).abs()
    odd = files[odd_size > UNUSUAL].groupby("revision")["path"].agg(", ".join)
    partly = _sharers(files, whole=False)
    fully = _sharers(files, whole=True)
    ends = pd.concat([_weights("main", listed[0]), _weights(names[-1], listed[-1])])
    if names[-1] in _sharers(ends, whole=True):  # the last is what it says
        partly = partly.drop(names[-1], errors="ignore")
        fully = fully.drop(names[-1], errors="ignore")

    # The later mask wins.
    _mark(table, "suspicious", "unusual size: " + odd)
    _mark(table, "suspicious", "shares files with " + partly)
    _mark(table, "identical", fully)
    gone = table.index.difference(there.index)
    reasons = ["no weights in it" if found[name] else "no such revision" for name in gone]
    _mark(table, "missing", pd.Series(reasons, index=gone, dtype=object))
    return table.reset_index()[["model", "revision", "status", "detail", "commit"]]


def _look(model: str, name: str) -> Listing | None:
    with suppress(FileNotFoundError):
        return listing(model, name)


def _weights(name: str, listed: Listing | None) -> pd.DataFrame:
    kinds = listed.weights() if listed else {}
    rows = [
        (name, kind, path, *file) for kind, files in kinds.items() for path, file in files.items()
    ]
    return pd.DataFrame(rows, columns=FILE)


def _sharers(files: pd.DataFrame, whole: bool) -> pd.Series:
    """With whom each revision shares a file, or (`whole`) all files of a format; names joined."""
    pairs = files.merge(files, on=["kind", "content"], suffixes=("", "_other"))
    pairs = pairs[pairs["revision"] != pairs["revision_other"]]
    if whole:
        size = files.groupby(["revision", "kind"])["path"].nunique()
        shared = pairs.groupby(["revision", "kind", "revision_other"])["path"].nunique()
        every = shared == size.reindex(shared.index.droplevel(2)).to_numpy()
        pairs = shared[every].reset_index()
    order = {name: place for place, name in enumerate(files["revision"].unique())}
    pairs = pairs.sort_values("revision_other", key=lambda column: column.map(order))
    return pairs.groupby("revision")["revision_other"].agg(lambda names: ", ".join(names.unique()))


def _mark(table: pd.DataFrame, status: str, detail: pd.Series) -> None:
    table.loc[detail.index, "status"] = status
    table.loc[detail.index, "detail"] = detail
