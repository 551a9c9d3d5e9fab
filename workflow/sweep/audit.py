"""Are published checkpoints what their names say? Compares hashes that the Hub lists."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pandas as pd

from sweep.hub import Listing, listing

COLUMNS = ["model", "revision", "status", "detail", "commit"]
NO_REVISION = "no such revision"
FILE = ["revision", "kind", "path", "size", "content"]
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
    with ThreadPoolExecutor(8) as pool:
        looked = pool.map(partial(_look, model), ["main", *names])
    listed = dict(zip(["main", *names], looked, strict=True))
    files = pd.concat([_weights(name, listed[name]) for name in names])
    table = pd.DataFrame({"model": model, "revision": names, "status": "ok", "detail": ""})
    table["commit"] = [listed[name].commit if listed[name] else "" for name in names]
    table = table.set_index("revision")

    # Each mask is a detail by revision; the later one wins.
    usual = files.groupby("path")["size"].transform("median")
    odd = files[(files["size"] / usual - 1).abs() > UNUSUAL]
    _mark(table, "suspicious", "unusual size: " + odd.groupby("revision")["path"].agg(", ".join))
    ends = pd.concat([_weights("main", listed["main"]), _weights(names[-1], listed[names[-1]])])
    believed = _sharers(ends, whole=True).index.intersection([names[-1]])
    partly = _sharers(files, whole=False).drop(believed, errors="ignore")
    _mark(table, "suspicious", "shares files with " + partly)
    _mark(table, "identical", _sharers(files, whole=True).drop(believed, errors="ignore"))
    gone = table.index.difference(files["revision"])
    lacking = table.loc[gone, "commit"].ne("").map({True: "no weights in it", False: NO_REVISION})
    _mark(table, "missing", lacking)
    return table.reset_index()[COLUMNS]


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
        size = files.groupby(["revision", "kind"])["path"].nunique().rename("size")
        shared = pairs.groupby(["revision", "kind", "revision_other"])["path"].nunique()
        counted = shared.rename("shared").reset_index().merge(size, on=["revision", "kind"])
        pairs = counted[counted["shared"] == counted["size"]]
    order = files["revision"].drop_duplicates().tolist()
    pairs = pairs.sort_values("revision_other", key=lambda names: names.map(order.index))
    return pairs.groupby("revision")["revision_other"].agg(_joined)


def _joined(names: pd.Series) -> str:
    return ", ".join(names.unique())


def _mark(table: pd.DataFrame, status: str, detail: pd.Series) -> None:
    table.loc[detail.index, "status"] = status
    table.loc[detail.index, "detail"] = detail
