"""The figures of a book: one verb for what most of them are, and what every figure must say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Each has a contrast of 4.5 : 1 or more on white, and all differ for the colour-blind.
COLORS = ["#0b4f99", "#b34700", "#00705a", "#8f2d7a", "#5c5c00", "#333333"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = [(1, 0), (5, 2), (1.5, 1.5), (7, 2, 2, 2), (3, 1), (1, 1, 4, 1)]
CITED = "#6b6b6b"
MOST_CURVES = 6


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
    kind = look.get("kind", "line")
    caption, alt = _words(frame, x, y, by, panels, kind)
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
    """The figure that `plot` shows, for a chapter that adds something special before it calls `show`."""
    _check(frame, x, y, by, panels)
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

    **Raises:** `ValueError` if a text is missing: the book has no figure without alt text.
    """
    for field, text in {"name": name, "caption": caption, "alt": alt}.items():
        if not text.strip():
            raise ValueError(
                f"{field} = {text!r}: a figure needs a name, a caption and an alt text"
            )
    display(fig, metadata={"companion": {"name": name, "caption": caption, "alt": alt}})
    plt.close(fig)


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
    sns.pointplot(
        frame, x=x, y=y, hue=by, ax=ax, errorbar=None, linestyle="none", dodge=0.4 if by else False
    )
    if {"low", "high"} <= set(frame) and by is None:
        places = range(len(frame))
        ax.hlines(places, frame["low"], frame["high"], color=COLORS[0], lw=2)


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


def _words(
    frame: pd.DataFrame, x: str, y: str, by: str | None, panels: str | None, kind: str
) -> tuple[str, str]:
    """What is drawn: for the caption, and for the alt text."""
    cited = _cited(frame)
    curves = len(_order(frame[~cited], by)) if (~cited).any() else 0
    shapes = {"line": "line", "dot": "point", "bar": "bar", "heat": "field"}
    shape = shapes[kind]
    caption = f"{y[:1].upper()}{y[1:]} against {x}"
    if by:
        caption += f", a {shape} for each {by}" if kind == "line" else f", by {by}"
    caption += "."
    if {"low", "high"} <= set(frame):
        bands = "Bands" if kind == "line" else "Bars"
        caption += f" {bands}: 95 % intervals."
    if cited.any():
        caption += " Grey: cited, not computed here."
    alt = f"{curves} {shape}{'' if curves == 1 else 's'} of {y} against {x}"
    if panels:
        alt += f" in {frame[panels].nunique()} panels"
    if cited.any():
        alt += f", beside {len(_order(frame[cited], by))} cited in grey"
    return caption, f"{alt}."
