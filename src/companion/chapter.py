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
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from operator import methodcaller
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from IPython.display import HTML, Markdown, display
from jinja2 import Environment, FileSystemLoader
from pandas.io.formats.style import Styler

from companion import figures
from companion.words import Estimate, markdown, number, visible

__all__ = ["Run", "answer", "begin", "end", "explore", "figure", "findings", "markdown"]
__all__ += ["number", "say", "table"]


class _Filling(Formatter):
    """Writes an estimate without a format as the whole book does."""

    def format_field(self, value: Any, how: str) -> str:
        plain = isinstance(value, Estimate) and not how
        return number(value) if plain else super().format_field(value, how)


class Run(NamedTuple):
    """One execution of a notebook: versions of packages, start in seconds, its file's words."""

    preset: str
    seed: int
    packages: dict[str, str]
    started: float
    texts: dict[str, dict[str, Any]]
    namespace: Mapping[str, Any]

    def words(self, key: str, **fields: Any) -> dict[str, Any]:
        """What the chapter's file has under a key, the braces in it filled.

        They name `fields`, or what the notebook calls so. An estimate without a format is written
        as `number` does. A verb takes the words by name: `table(rows, **run.words("table-heads"))`.

        **Raises:** `ValueError` for a key that is not there, or a name that is not given.
        """
        names = ChainMap(fields, self.namespace)

        def filled(part: Any) -> Any:
            if isinstance(part, list):
                return [filled(piece) for piece in part]
            return _Filling().vformat(part, (), names) if isinstance(part, str) else part

        if key not in self.texts:
            raise ValueError(f"{key}: the chapter's file of words does not have this key")
        try:
            return {name: filled(part) for name, part in self.texts[key].items()}
        except KeyError as error:
            raise ValueError(f"{key}: its text asks for {error}; give it") from None


def begin(namespace: Mapping[str, Any], texts: Path | None = None) -> Run:
    """Start a chapter: seed every generator and set the style of figures.

    **Arguments:** `namespace`: the notebook's `globals()`, right after its parameters cell and its
    imports; it must hold `seed` and `preset`. `texts`: the file of the chapter's words, as
    `book/words/NN_name.yaml`.

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
    told = yaml.safe_load(texts.read_text("utf-8")) if texts else {}
    packages = _packages(namespace)
    return Run(namespace["preset"], seed, packages, time.time(), told, namespace)


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


def table(rows: Any, caption: str, columns: Collection[str] = (), digits: int = 4) -> None:
    """Show a captioned table, floats to `digits` significant digits, estimates as `number` does.

    The text of a cell is shown as it is, whatever it holds.

    **Arguments:** `rows`: a frame, or rows whose `columns` are given. Of a frame, `columns` chooses
    some, and a mapping tells how they are called.
    """

    def words(cell: Any) -> str:
        if isinstance(cell, bool | np.bool_):
            return "yes" if cell else "no"
        return number(cell, digits) if isinstance(cell, float | Estimate) else visible(cell)

    if isinstance(rows, pd.DataFrame) and columns:
        rows = rows[[*columns]]
    frame = pd.DataFrame(rows, columns=[*columns] or None)
    if isinstance(columns, Mapping):
        frame = frame.rename(columns=columns)
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


def figure(run: Run, frame: pd.DataFrame | Mapping[Any, Any], name: str, **given: Any) -> None:
    """Show a figure as `figures.plot` does, with what the chapter's file has under its name.

    **Arguments:** `given`: what of a `figures.Look` is computed, as `along`, `cited` or `marks`,
    and fields of `Run.words`.
    """
    computed = {part: given.pop(part) for part in figures.PARTS & given.keys()}
    figures.plot(frame, name, **run.words(name, **given), **computed)


def findings(run: Run, told: Mapping[str, Sequence[Any]], **fields: Any) -> None:
    """Show a chapter's numbers beside the paper's; the pages that collect them have them too.

    The chapter's file has by key what is measured (`quantity`) and what the paper says of it. A
    `comment` there goes before the one here.

    **Arguments:** `told`: by key (`chapter.quantity`), the number, estimate or words measured; what
    a tested rule says, None where this scale can't tell; and maybe how it came to that. `fields`:
    as of `Run.words`.
    """
    kept = []
    rows = []
    for key, (measured, agrees, *comments) in told.items():
        texts = run.words(key, **fields)
        quantity = texts["quantity"]
        paper = str(texts["paper"])
        comment = "; ".join(filter(None, [texts.get("comment"), *comments]))
        verdict = _verdict(agrees, texts.get("one_of_many", False))
        rows.append((quantity, paper, number(measured), verdict, comment))
        finding = {"key": key, "quantity": quantity, "paper": paper, "comment": comment}
        kept.append(finding | {"measured": _plain(measured), "verdict": verdict})
    columns = ["quantity", "the paper (cited)", "measured here", "verdict", "comment"]
    _show(pd.DataFrame(rows, columns=columns), "This chapter's findings", {"findings": kept})


def _verdict(agrees: bool | None, one_of_many: bool) -> str:
    """The word; one model of many can at best be consistent with a claim about all."""
    if agrees is None:
        return "not testable here"
    good = "consistent" if one_of_many else "reproduced"
    return good if agrees else "not reproduced"


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
