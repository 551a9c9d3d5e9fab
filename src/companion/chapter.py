"""What every chapter says of itself: its parameters, its findings beside the paper's, its provenance."""

import ast
import hashlib
import math
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from pandas.io.formats.style import Styler

from companion import figures
from companion.figures import draw, plot, show

__all__ = ["Finding", "Run", "begin", "draw", "end", "findings", "plot", "say", "show", "table"]

VERDICTS = ("reproduced", "consistent", "not reproduced", "not testable here")
PACKAGES = ("torch", "transformers", "numpy", "scipy")  # named in the provenance where installed


@runtime_checkable
class Estimate(Protocol):
    """Anything that has a value, an interval and a sample size."""

    value: float
    low: float
    high: float
    n: int


class Run(NamedTuple):
    """One execution of a notebook: its parameters and when it began (seconds since the epoch)."""

    parameters: dict[str, Any]
    started: float


class Finding(NamedTuple):
    """One number of a chapter beside the paper's.

    - `key` names it across the book (`chapter.quantity`).
    - `paper` is what the paper says, in words, or `not given`.
    - `agrees` is what a tested rule says; None where this scale can't tell.
    - `comment` says how the rule decides, and how far its threshold could move.
    - `one_of_many`: the paper's claim is about many models and this is one, so it can at best be
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

    The parameters are the names that the cells before this one set to plain values. What a start-up
    file of the
    reader's has set is none.

    **Arguments:**

    - `namespace`: the notebook's `globals()`, right after its parameters cell and imports. It must
      hold `seed` and
      `preset`.

    **Raises:** `ValueError` if `seed` or `preset` is missing or of the wrong type.
    """
    parameters = _parameters(namespace)
    for name, kind in {"seed": int, "preset": str}.items():
        value = parameters.get(name)
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} = {value!r}: the parameters cell must set it to a {kind.__name__}"
            )
    seed = parameters["seed"]
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: must be between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries below still draw from it)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    figures.use_style()
    return Run(parameters, time.time())


def _parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, list, dict, type(None))
    cells = namespace.get("In")
    names = list(namespace) if cells is None else _assigned(cells)
    return {
        name: namespace[name]
        for name in names
        if not name.startswith("_") and isinstance(namespace.get(name, plain), plain)
    }


def _assigned(cells: Sequence[str]) -> list[str]:
    """The names that cells set at their outermost level, in order."""
    names: dict[str, None] = {}
    for cell in cells:
        try:
            statements = ast.parse(cell).body
        except SyntaxError:  # a cell with a magic
            continue
        for statement in statements:
            if isinstance(statement, ast.Assign):
                names |= {t.id: None for t in statement.targets if isinstance(t, ast.Name)}
    return list(names)


def say(words: str) -> None:
    """Show computed sentences (Markdown)."""
    display(Markdown(words))


def table(frame: pd.DataFrame, caption: str, digits: int = 4) -> None:
    """Show a frame as a captioned table without its index, floats to `digits` significant digits.

    The text of a cell is shown as it is, whatever it holds.
    """

    def words(cell: Any) -> str:
        return f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)

    display(_styled(frame, caption).format(words, escape="html"))


def findings(rows: Sequence[Finding]) -> None:
    """Show a chapter's numbers beside the paper's, and keep them for the pages that collect them."""
    frame = pd.DataFrame(
        [(r.quantity, r.paper, number(r.measured), r.verdict, r.comment) for r in rows],
        columns=["quantity", "the paper", "measured here", "verdict", "comment"],
    )
    kept = [
        {
            "key": r.key,
            "quantity": r.quantity,
            "paper": r.paper,
            "measured": _plain(r.measured),
            "verdict": r.verdict,
            "comment": r.comment,
        }
        for r in rows
    ]
    shown = _styled(frame, "This chapter's findings").format(str, escape="html")
    display(shown, metadata={"companion": {"findings": kept}})


def end(run: Run, samples: Mapping[str, int | str], package: str = "headbound") -> None:
    """Close a chapter with its provenance: preset, seed, versions, device, run time, memory, sample sizes."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    rows = {
        "preset": run.parameters["preset"],
        "seed": run.parameters["seed"],
        **{name: version(name) for name in (package, *PACKAGES)},
        "Python": platform.python_version(),
        "device": _device(),
        "CPU cores": os.cpu_count(),
        "run time": f"{time.time() - run.started:.0f} s",
        "peak memory": f"{peak:.1f} GiB",
        **{f"sample: {k}": f"{n:,}" if isinstance(n, int) else n for k, n in samples.items()},
    }
    kept = {k: str(v) for k, v in rows.items()}
    frame = pd.DataFrame(kept.items(), columns=["what", "value"])
    shown = _styled(frame, "How this page was made").format(str, escape="html")
    display(shown, metadata={"companion": {"provenance": kept}})


def number(value: Estimate | float | str | None) -> str:
    """A number as the whole book prints it: with its interval and sample size where it has them."""
    if value is None:
        return "unknown"
    if isinstance(value, Estimate):
        scale = max(abs(value.value), abs(value.high - value.low), 1e-12)
        digits = max(0, 2 - math.floor(math.log10(scale))) if math.isfinite(scale) else 3
        low, high = f"{value.low:.{digits}f}", f"{value.high:.{digits}f}"
        return f"{value.value:.{digits}f} [{low}, {high}] (n = {value.n:,})"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return f"CPU ({platform.machine()})"
    return torch.cuda.get_device_name()


def _styled(frame: pd.DataFrame, caption: str) -> Styler:
    # pandas draws the table's id at random; one that follows from the content keeps equal runs
    # equal.
    content = hashlib.sha256(f"{caption}{frame.to_csv()}".encode()).hexdigest()[:8]
    styler = Styler(frame, uuid=content, uuid_len=8, cell_ids=False)
    return styler.set_caption(_escaped(caption)).hide(axis="index")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(value: Any) -> Any:
    # Strict JSON: no numpy number, and null for NaN, which a kernel would turn into text.
    if isinstance(value, Estimate):
        return {name: _plain(getattr(value, name)) for name in ("value", "low", "high", "n")}
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
