"""What every chapter shows of itself: parameters, provenance, and its findings beside the paper's."""

import hashlib
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from pandas.io.formats.style import Styler

import headbound
from companion import plot
from headbound import device
from headbound.stats import Estimate

VERDICTS = {True: "reproduced", False: "not reproduced", None: "not testable here"}


class Run(NamedTuple):
    """One execution of a notebook: its parameters and when it began (seconds since the epoch)."""

    parameters: dict[str, Any]
    started: float


class Finding(NamedTuple):
    """One number of a chapter beside the paper's.

    `key` names it across the book (`chapter.quantity`); `agrees` is computed by the notebook against a stated
    tolerance, and None where this scale can't tell.
    """

    key: str
    quantity: str
    paper: str
    measured: Estimate | float | str
    agrees: bool | None
    comment: str = ""


def table(frame: pd.DataFrame, caption: str, digits: int = 4) -> None:
    """Display a data frame as a captioned table without its index, floats to `digits` significant digits."""
    display(
        _styled(frame, caption).format(
            lambda cell: f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)
        )
    )


def begin(namespace: Mapping[str, Any]) -> Run:
    """Start a chapter: seed every generator, set the plotting style, show the parameters in force.

    **Arguments:**

    - `namespace`: the notebook's `globals()`, right after its parameters cell and imports. Its plain values
      are the parameters; it must hold `seed` and `preset`.

    **Raises:** `ValueError` if `seed` or `preset` is missing or of the wrong type.
    """
    plain = (bool, int, float, str, list, dict, type(None))
    hidden = {"In", "Out"}
    parameters = {
        k: v
        for k, v in namespace.items()
        if isinstance(v, plain) and k[0] != "_" and k not in hidden
    }
    for name, kind in {"seed": int, "preset": str}.items():
        if not isinstance(parameters.get(name), kind):
            raise ValueError(
                f"{name} = {parameters.get(name)!r}: the parameters cell must set it to a {kind.__name__}"
            )
    if not 0 <= parameters["seed"] < 2**32:
        raise ValueError(f"seed = {parameters['seed']}: must be between 0 and {2**32 - 1}")
    np.random.seed(parameters["seed"])  # noqa: NPY002 (libraries below still draw from it)
    torch.manual_seed(parameters["seed"])
    plot.use_style()
    rows = [(name, repr(value)) for name, value in parameters.items()]
    table(pd.DataFrame(rows, columns=["parameter", "value"]), "Parameters of this run")
    return Run(parameters, time.time())


def findings(rows: Sequence[Finding]) -> None:
    """Show a chapter's numbers beside the paper's, and keep them in the notebook for pages that collect them."""
    frame = pd.DataFrame(
        [(r.quantity, r.paper, _text(r.measured), VERDICTS[r.agrees], r.comment) for r in rows],
        columns=["quantity", "the paper", "measured here", "verdict", "comment"],
    )
    kept = [
        {
            **r._asdict(),
            "measured": _plain(r.measured),
            "agrees": None if r.agrees is None else bool(r.agrees),
        }
        for r in rows
    ]
    display(
        _styled(frame, "This chapter's findings"),
        metadata={"headbound": {"findings": kept}},
    )


def end(run: Run, samples: Mapping[str, int | str]) -> None:
    """Close a chapter with its provenance: preset, seed, versions, device, run time, memory, sample sizes."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    rows = {
        "preset": run.parameters["preset"],
        "seed": run.parameters["seed"],
        "headbound": headbound.__version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy", "scipy")},
        "Python": platform.python_version(),
        "device": device.describe(),
        "CPU cores": os.cpu_count(),
        "run time": f"{time.time() - run.started:.0f} s",
        "peak memory": f"{peak:.1f} GiB",
        **{f"sample: {name}": f"{n:,}" if isinstance(n, int) else n for name, n in samples.items()},
    }
    frame = pd.DataFrame([(k, str(v)) for k, v in rows.items()], columns=["what", "value"])
    kept = {k: str(v) for k, v in rows.items()}
    display(
        _styled(frame, "How this page was made"),
        metadata={"headbound": {"provenance": kept}},
    )


def _styled(frame: pd.DataFrame, caption: str) -> Styler:
    # pandas draws the table's id at random; one that follows from the content keeps equal runs equal.
    content = hashlib.sha256(f"{caption}{frame.to_csv()}".encode()).hexdigest()[:8]
    return Styler(frame, uuid=content, uuid_len=8, cell_ids=False, caption=caption).hide(
        axis="index"
    )


def _text(value: Estimate | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _plain(value: Any) -> Any:
    # Strict JSON: no numpy number, and null for NaN, which a kernel would turn into text.
    if isinstance(value, Estimate):
        return {name: _plain(number) for name, number in value._asdict().items()}
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
