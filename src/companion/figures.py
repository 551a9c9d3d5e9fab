"""The figures of a book: one verb for what most of them are, and what every figure must say."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from companion.words import visible

# Each has a contrast of 4.5 : 1 or more on white, and all differ for the colour-blind.
COLORS = ["#0b4f99", "#b34700", "#00705a", "#8f2d7a", "#5c5c00", "#333333"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = [(1, 0), (5, 2), (1.5, 1.5), (7, 2, 2, 2), (3, 1), (1, 1, 4, 1)]
CITED = "#6b6b6b"
MOST_CURVES = 6
LABEL = 40  # characters of a name in a figure; its table has the whole


class Look(TypedDict, total=False):
    """How a figure looks, where it is not the usual.

    - `kind`: `line` (the usual), `dot` (a point and its interval a row), `bar` or `heat`.
    - `log`: the axes that are logarithmic: `x`, `y` or `xy`.
    - `marks`: lines across the figure, label to value on the y axis (on the x axis for `dot`).
    - `upright`: the same on the x axis.
    - `limits`: of the y axis.
    """

    kind: str
    log: str
    marks: Mapping[str, float]
    upright: Mapping[str, float]
    limits: tuple[float | None, float | None]


def use_style() -> None:
    """Set seaborn up for the book: a white grid, and colours that are read on it."""
    # A name in a script that the font lacks shows boxes; the caption has it whole.
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    sns.set_theme(context="notebook", style="whitegrid", palette=COLORS)
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 4.2),
            "figure.constrained_layout.use": True,
            "savefig.dpi": 144,
            "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
            "lines.markersize": 4,
            "axes.titlesize": "medium",
            "legend.fontsize": "small",
            "text.parse_math": False,  # a name may hold a dollar sign: it is shown as it is
        }
    )


def plot(
    frame: pd.DataFrame,
    name: str,
    x: str,
    y: str,
    *,
    by: str | None = None,
    panels: str | None = None,
    see: str,
    **look: Unpack[Look],
) -> None:
    """Draw a frame of estimates, and show it with a caption and an alt text made from its names.

    The names of columns are the labels of the figure, so they say their units.

    **Arguments:**

    - `frame`: a row a point. The columns `low` and `high`, where they are, are the interval of `y`.
      Rows whose column `cited` is true are drawn in grey: they are another's, not computed here.
    - `name`: the label for cross-references, `fig-…`.
    - `x`, `y`: the columns that are drawn.
    - `by`: the column whose values are the curves, six of them at most.
    - `panels`: the column whose values are the panels, one above the other.
    - `see`: the one thing to see, as a sentence without its full stop; it may be computed.
    - `look`: see `Look`.

    **Raises:** `ValueError` for a column that is not there, more than six curves, or no row.
    """
    fig = draw(frame, x, y, by=by, panels=panels, **look)
    caption = _caption(frame, x, y, by, look.get("kind", "line"))
    alt = _alt(frame, x, y, by, panels, look.get("kind", "line"))
    show(fig, name, f"{caption} {see}.", f"{alt} {see}.")


def draw(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    by: str | None = None,
    panels: str | None = None,
    **look: Unpack[Look],
) -> Figure:
    """The figure that `plot` shows, for a chapter that adds something before it calls `show`."""
    _check(frame, x, y, by, panels)
    frame = _labelled(frame, [x, y, by, panels])
    parts = [("", frame)]
    if panels:
        parts = list(frame.groupby(panels, sort=False))
    height = 4.2 if len(parts) == 1 else 2.8 * len(parts)
    fig, axes = plt.subplots(len(parts), sharex=True, figsize=(7.0, height), squeeze=False)
    for ax, (title, part) in zip(axes[:, 0], parts, strict=True):
        _fill(ax, part, x, y, by, look)
        ax.set_title(str(title))
        if ax is not axes[-1, 0]:
            ax.set_xlabel("")
    return fig


def show(fig: Figure, name: str, caption: str, alt: str) -> None:
    """Display a figure with what a reader needs beside it, then close it.

    **Arguments:**

    - `fig`: the figure; one a cell.
    - `name`: its label in the book (`fig-…`), for cross-references.
    - `caption`: what is drawn and what to see in it; it may be computed.
    - `alt`: the shape and the one thing to see, for those who can't see it; it may be computed.

    What would keep a reader from seeing it is kept with it: the weakest contrast of its lines, and
    its columns of panels.

    **Raises:** `ValueError` if a text is missing, or the name is none.
    """
    texts = {"name": name, "caption": visible(caption), "alt": visible(alt)}
    for field, text in texts.items():
        if not text:
            raise ValueError(
                f"{field} = {text!r}: a figure needs a name, a caption and an alt text"
            )
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name = {name!r}: must be letters, digits and hyphens, like fig-loss")
    seen = {"contrast": round(contrast(fig), 2), "columns": _columns(fig)}
    display(fig, metadata={"companion": {**texts, **seen}})
    plt.close(fig)


def contrast(fig: Figure) -> float:
    """The weakest contrast on white of a figure's lines and points, as WCAG defines it: 1 to 21."""
    colours = [line.get_color() for ax in fig.axes for line in ax.lines]
    ratios = [1.05 / (_luminance(colour) + 0.05) for colour in colours]
    return min(ratios, default=21.0)


def _luminance(colour: Any) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


def _columns(fig: Figure) -> int:
    """How many panels stand side by side; bars of colours are none."""
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    starts = {round(ax.get_position().x0, 1) for ax in panels}
    return len(starts)


def _check(frame: pd.DataFrame, x: str, y: str, by: str | None, panels: str | None) -> None:
    missing = [column for column in (x, y, by, panels) if column and column not in frame]
    if missing:
        raise ValueError(
            f"columns {missing}: not in the frame, which has {', '.join(frame.columns)}"
        )
    if frame.empty:
        raise ValueError("the frame has no row, so there is nothing to draw")
    own = frame[~_cited(frame)]
    if by and own[by].nunique() > MOST_CURVES:
        raise ValueError(
            f"{own[by].nunique()} curves by {by!r}: show {MOST_CURVES} at most, or use panels"
        )


def _labelled(frame: pd.DataFrame, columns: Sequence[str | None]) -> pd.DataFrame:
    """The frame with names that fit into a figure, whatever they hold; equal names stay apart."""
    frame = frame.copy()
    for column in {column for column in columns if column}:
        if pd.api.types.is_numeric_dtype(frame[column]):
            continue
        labels: dict[Any, str] = {}
        for name in dict.fromkeys(frame[column]):
            label = visible(name)
            if len(label) > LABEL:
                label = f"{label[: LABEL // 2]}…{label[-LABEL // 2 :]}"
            if label.startswith("_"):  # matplotlib would leave it out of the legend
                label = f" {label}"
            same = sum(known.startswith(label) for known in labels.values())
            labels[name] = f"{label} ({same + 1})" if label in labels.values() else label
        frame[column] = frame[column].map(labels)
    return frame


def _cited(frame: pd.DataFrame) -> "pd.Series[bool]":
    if "cited" in frame:
        return frame["cited"].fillna(False).astype(bool)
    return pd.Series(data=False, index=frame.index)


def _fill(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None, look: Look) -> None:
    kind = look.get("kind", "line")
    if kind == "heat":
        sns.heatmap(
            frame.pivot(index=by, columns=x, values=y), ax=ax, annot=True, fmt=".2g", cmap="Blues"
        )
        return
    cited = _cited(frame)
    own = frame[~cited]
    drawing = {"line": _lines, "dot": _dots, "bar": _bars}[kind]
    if len(own):
        drawing(ax, own, x, y, by)
    if cited.any():
        _lines_cited(ax, frame[cited], x, y, by)
    for axis in look.get("log", ""):
        ax.set(**{f"{axis}scale": "log"})
        chosen = ax.xaxis if axis == "x" else ax.yaxis
        chosen.set_major_formatter(power)
        chosen.set_minor_formatter("")
    flat = ax.axvline if kind == "dot" else ax.axhline
    for label, value in look.get("marks", {}).items():
        flat(value, color=CITED, lw=1, ls=":", label=label)
    for label, value in look.get("upright", {}).items():
        ax.axvline(value, color=CITED, lw=1, ls=":", label=label)
    if "limits" in look:
        ax.set_ylim(*look["limits"])
    if ax.get_legend_handles_labels()[1]:
        ax.legend(title=None)


def _lines(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    keys = _order(frame, by)
    style: dict[str, Any] = {}
    if by:
        style = {
            "hue": by,
            "hue_order": keys,
            "style": by,
            "style_order": keys,
            "palette": COLORS[: len(keys)],
            "dashes": DASHES[: len(keys)],
            "markers": MARKERS[: len(keys)],
        }
    sns.lineplot(frame, x=x, y=y, ax=ax, estimator=None, errorbar=None, **style)
    if not {"low", "high"} <= set(frame):
        return
    for place, key in enumerate(keys):
        part = frame if by is None else frame[frame[by] == key]
        part = part.sort_values(x)
        ax.fill_between(part[x], part["low"], part["high"], color=COLORS[place], alpha=0.2, lw=0)


def _lines_cited(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    for place, key in enumerate(_order(frame, by)):
        part = frame if by is None else frame[frame[by] == key]
        label = f"{key} (cited)" if by else "cited"
        dashes = (0, DASHES[(place + 1) % len(DASHES)])
        ax.plot(part[x], part[y], color=CITED, lw=1.2, ls=dashes, marker="", label=label)


def _dots(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    keys = _order(frame, by)
    width = 0.4 if len(keys) > 1 else 0.0
    style = {"markers": MARKERS[: len(keys)], "palette": COLORS[: len(keys)]} if by else {}
    sns.pointplot(
        frame, x=x, y=y, hue=by, ax=ax, errorbar=None, linestyle="none", dodge=width, **style
    )
    if not {"low", "high"} <= set(frame):
        return
    rows = _order(frame, y)
    shifts = np.linspace(-width / 2, width / 2, len(keys))
    for key, shift, color in zip(keys, shifts, COLORS[: len(keys)], strict=True):
        part = frame if by is None else frame[frame[by] == key]
        places = [rows.index(row) + shift for row in part[y]]
        ax.hlines(places, part["low"], part["high"], color=color, lw=2)


def _bars(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    sns.barplot(frame, x=x, y=y, hue=by, ax=ax, errorbar=None)


def _order(frame: pd.DataFrame, by: str | None) -> Sequence[Any]:
    return [None] if by is None else list(dict.fromkeys(frame[by]))


def power(value: float, _place: int = 0) -> str:
    """A tick of a logarithmic axis in plain characters, such as 10⁶."""
    exponent = math.log10(value)
    if -3 < exponent < 4:
        return f"{value:g}"
    digits = f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _caption(frame: pd.DataFrame, x: str, y: str, by: str | None, kind: str) -> str:
    """What is drawn, in one sentence."""
    caption = f"{y[:1].upper()}{y[1:]} against {x}"
    if by:
        caption += f", a line for each {by}" if kind == "line" else f", by {by}"
    notes = []
    if {"low", "high"} <= set(frame):
        notes.append(f"{'bands' if kind == 'line' else 'bars'} are 95 % intervals")
    if _cited(frame).any():
        notes.append("grey is cited, not computed here")
    return f"{caption} ({'; '.join(notes)})." if notes else f"{caption}."


def _alt(frame: pd.DataFrame, x: str, y: str, by: str | None, panels: str | None, kind: str) -> str:
    """The shape of what is drawn, in one sentence."""
    cited = _cited(frame)
    own = frame[~cited]
    shape = {"line": "line", "dot": "point", "bar": "bar", "heat": "cell"}[kind]
    curves = len(own)
    if kind == "line":
        curves = len(_order(own, by)) if len(own) else 0
    alt = f"{curves} {shape}{'' if curves == 1 else 's'} of {y} against {x}"
    if panels:
        alt += f" in {frame[panels].nunique()} panels"
    if cited.any():
        count = len(_order(frame[cited], by))
        alt += f", beside {count} cited in grey"
    return f"{alt}."
