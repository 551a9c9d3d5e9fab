"""What every chapter says of itself: its findings beside the paper's, its answer, its origin."""

import hashlib
import html
import json
import math
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from operator import methodcaller
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display
from jinja2 import Environment, FileSystemLoader
from pandas.io.formats.style import Styler

from companion import figures
from companion.figures import draw, plot, show, tidy
from companion.words import VERDICTS, Estimate, markdown, number, visible

__all__ = ["VERDICTS", "Finding", "Run", "answer", "begin", "draw", "end", "findings"]
__all__ += ["explore", "markdown", "number", "plot", "say", "show", "table", "tidy"]


class Run(NamedTuple):
    """One execution of a notebook: preset, seed, versions of packages, start (seconds)."""

    preset: str
    seed: int
    packages: dict[str, str]
    started: float


class Finding(NamedTuple):
    """One number of a chapter beside the paper's.

    - `key` names it across the book (`chapter.quantity`).
    - `paper` is what the paper says, in words, or `not given`.
    - `agrees` is what a tested rule says; None where this scale can't tell.
    - `comment` says how the rule decides, and how far its threshold could move.
    - `one_of_many`: the paper's claim is about many models and this is one. It can at best be
      consistent.
    """

    key: str
    quantity: str
    paper: str
    measured: Estimate | float | str
    agrees: bool | None
    comment: str = ""
    one_of_many: bool = False

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.agrees is None:
            return "not testable here"
        if not self.agrees:
            return "not reproduced"
        return "consistent" if self.one_of_many else "reproduced"


def begin(namespace: Mapping[str, Any]) -> Run:
    """Start a chapter: seed every generator and set the style of figures.

    **Arguments:** `namespace`: the notebook's `globals()`, right after its parameters cell and its
    imports. It must hold `seed` and `preset`.

    **Raises:** `ValueError` if `seed` or `preset` is missing or of the wrong type.
    """
    for name, kind in {"seed": int, "preset": str}.items():
        if not isinstance(namespace.get(name), kind):
            told = f"{name} = {namespace.get(name)!r}"
            raise ValueError(f"{told}: the parameters cell must set it to a {kind.__name__}")
    seed = namespace["seed"]
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: must be between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries below still draw from it)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    figures.use_style()
    return Run(namespace["preset"], seed, _packages(namespace), time.time())


def _packages(namespace: Mapping[str, Any]) -> dict[str, str]:
    """The versions of what the notebook imports, and of what its numbers rest on."""
    modules = [value for value in namespace.values() if isinstance(value, ModuleType)]
    names = {module.__name__.split(".")[0] for module in modules}
    names |= {"torch", "transformers", "numpy", "scipy"} & sys.modules.keys()
    versions = {}
    for name in sorted(names):
        with suppress(PackageNotFoundError):  # of the standard library, or named otherwise
            versions[name] = version(name)
    return versions


def say(words: str) -> None:
    """Show computed sentences (Markdown); `markdown` makes text from elsewhere safe in them."""
    display(Markdown(words))


def answer(words: str) -> None:
    """Show the computed answer to the chapter's question (Markdown); the start page has it too."""
    display(Markdown(words), metadata={"companion": {"answer": words}})


def table(rows: Any, caption: str, columns: Sequence[str] = (), digits: int = 4) -> None:
    """Show a captioned table, floats to `digits` significant digits, estimates as `number` does.

    The text of a cell is shown as it is, whatever it holds.

    **Arguments:** `rows`: a frame, or rows whose `columns` are given.
    """

    def words(cell: Any) -> str:
        if isinstance(cell, bool | np.bool_):
            return "yes" if cell else "no"
        return number(cell, digits) if isinstance(cell, float | Estimate) else visible(cell)

    frame = pd.DataFrame(rows, columns=columns or None)
    display(_styled(frame, caption).format(words, escape="html"))


def explore(page: Path, data: Mapping[str, Any]) -> None:
    """Show a page of plain JavaScript over computed data, arrays of numpy among them.

    The page is a jinja2 template, which may extend another one of its folder; `data` is its data.
    """
    told = json.dumps(data, default=methodcaller("tolist"))
    told = told.replace("<", "\\u003c")  # so that no text of the data ends the script
    templates = Environment(loader=FileSystemLoader(page.parent))
    template = templates.get_template(page.name)
    display(HTML(template.render(data=told)))


def findings(rows: Sequence[Any], of: str = "", one_of_many: bool = False) -> None:
    """Show a chapter's numbers beside the paper's; the pages that collect them have them too.

    **Arguments:** `rows`: findings, or their values in order. The keys of the latter begin with
    `of`, and they are all `one_of_many` or not.
    """
    whole = []
    for row in rows:
        if not isinstance(row, Finding):
            row = Finding(f"{of}.{row[0]}", *row[1:])._replace(one_of_many=one_of_many)
        whole.append(row)
    rows = whole
    shown = {
        "quantity": [row.quantity for row in rows],
        "the paper (cited)": [row.paper for row in rows],
        "measured here": [number(row.measured) for row in rows],
        "verdict": [row.verdict for row in rows],
        "comment": [row.comment for row in rows],
    }
    kept = []
    for row in rows:
        about = {name: getattr(row, name) for name in ("key", "quantity", "paper", "comment")}
        kept.append({**about, "measured": _plain(row.measured), "verdict": row.verdict})
    _show(pd.DataFrame(shown), "This chapter's findings", {"findings": kept})


def end(run: Run, samples: Mapping[str, int | str]) -> None:
    """Close a chapter with its provenance: preset, seed, versions, device, memory, samples."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    rows = {
        "preset": run.preset,
        "seed": run.seed,
        "Python": platform.python_version(),
        **run.packages,
        "device": _device(),
        "CPU cores": os.cpu_count(),
        "run time": f"{time.time() - run.started:.0f} s",
        "peak memory": f"{peak:.1f} GiB",
        **{f"sample: {k}": f"{n:,}" if isinstance(n, int) else n for k, n in samples.items()},
    }
    kept = {k: str(v) for k, v in rows.items()}
    frame = pd.DataFrame(kept.items(), columns=["what", "value"])
    _show(frame, "How this page was made", {"provenance": kept, "packages": run.packages})


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return f"CPU ({platform.machine()})"
    return torch.cuda.get_device_name()


def _show(frame: pd.DataFrame, caption: str, about: dict[str, Any]) -> None:
    shown = _styled(frame, caption).format(visible, escape="html")
    display(shown, metadata={"companion": about})


def _styled(frame: pd.DataFrame, caption: str) -> Styler:
    # pandas draws a table's id at random. One that follows from the content keeps equal runs equal.
    content = caption + frame.to_csv()
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    styler = Styler(frame, uuid=digest, uuid_len=8, cell_ids=False)
    styler.set_caption(html.escape(visible(caption)))
    styler.hide(axis="index")
    return styler.format_index(visible, axis="columns", escape="html")


def _plain(value: Any) -> Any:
    # Strict JSON: no numpy number, and null for NaN, which a kernel would turn into text.
    if isinstance(value, Estimate):
        names = ("value", "low", "high", "n")
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
