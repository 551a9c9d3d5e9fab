"""Are published checkpoints what their names say? Compares hashes that the Hub lists."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from statistics import median

import pandas as pd

from sweep.hub import File, Listing, listing

UNUSUAL = 0.01  # a file's size off the usual one, as a share
Weights = Mapping[str, Mapping[str, File]]  # by format and path


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
    weights = {name: found.weights() if found else {} for name, found in listed.items()}
    main = weights.pop("main")
    rows = []
    for name in names:
        commit = listed[name].commit if listed[name] else ""
        believed = name == names[-1] and _shares(weights[name], main, whole=True)
        others = [] if believed else [other for other in names if other != name]
        status, detail = _judge(weights, name, others)
        if status == "missing" and not commit:
            detail = "no such revision"
        rows.append((model, name, status, detail, commit))
    return pd.DataFrame(rows, columns=["model", "revision", "status", "detail", "commit"])


def _look(model: str, name: str) -> Listing | None:
    with suppress(FileNotFoundError):
        return listing(model, name)


def _judge(weights: Mapping[str, Weights], name: str, others: Sequence[str]) -> tuple[str, str]:
    own = weights[name]
    if not own:
        return "missing", "no weights in it"
    same = [other for other in others if _shares(own, weights[other], whole=True)]
    if same:
        return "identical", ", ".join(same)
    partly = [other for other in others if _shares(own, weights[other], whole=False)]
    if partly:
        return "suspicious", f"shares files with {', '.join(partly)}"
    odd = []
    for kind, files in own.items():
        for path, file in files.items():
            alike = [w[kind][path].size for w in weights.values() if path in w.get(kind, {})]
            usual = median(alike)
            if abs(file.size - usual) > UNUSUAL * usual:
                odd.append(path)
    return ("suspicious", f"unusual size: {', '.join(odd)}") if odd else ("ok", "")


def _shares(own: Weights, other: Weights, whole: bool) -> bool:
    """Whether a file is another's too, or (`whole`) all files of a format are."""
    for kind, files in own.items():
        mine = {file.content for file in files.values()}
        shared = mine & {file.content for file in other.get(kind, {}).values()}
        if shared == mine if whole else shared:
            return True
    return False
