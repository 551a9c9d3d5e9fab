"""The figures of a book: one verb for what most of them are, and what every figure must say."""

import math
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
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from seaborn.utils import relative_luminance

from companion.words import Estimate, visible

# Each has a contrast of 4.5 : 1 or more on white, and all differ for the colour-blind.
COLORS = ["#0b4f99", "#b34700", "#00705a", "#8f2d7a", "#5c5c00", "#333333"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = [(1, 0), (5, 2), (1.5, 1.5), (7, 2, 2, 2), (3, 1), (1, 1, 4, 1)]
CITED = "#6b6b6b"
CITED_DASHES = DASHES[1:] + DASHES[:1]
MOST_CURVES = 6
LABEL = 40  # characters of a name in a figure; its table has the whole


class Look(TypedDict, total=False):
    """How a figure looks, where it is not the usual.

    - `by`: the column whose values are the curves, six of them at most.
    - `panels`: the column whose values are the panels, one above the other.
    - `kind`: `line` (the usual), `dot` (a point and its interval a row), or `scatter` (points).
    - `log`: the axes that are logarithmic: `x`, `y` or `xy`.
    - `marks`: lines across the figure, label to value on the y axis; `upright`: on the x axis.
    - `limits`: of the y axis.
    - `along`: the places along x where each curve of a mapping has its sequence of numbers.
    - `cited`: curves of another, drawn in grey behind ours. Its columns may be called `curve`, `x`
      and `y`, as those of a figure that was read off.
    """

    by: str | None
    panels: str | None
    kind: str
    log: str
    marks: Mapping[str, float]
    upright: Mapping[str, float]
    limits: tuple[float | None, float | None]
    along: Sequence[float]
    cited: pd.DataFrame


PARTS = {"see", "at", *Look.__annotations__}  # what `plot` takes beside columns and a name


def use_style() -> None:
    """Set seaborn up for the book: a white grid, and colours that are read on it."""
    # A name in a script that the font lacks shows boxes; its table has it whole.
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    settings = {
        "figure.constrained_layout.use": True,
        "savefig.dpi": 144,
        "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
        "lines.markersize": 4,
        "axes.titlesize": "medium",
        "legend.fontsize": "small",
        "text.parse_math": False,  # a name may hold a dollar sign: it is shown as it is
    }
    plt.rcdefaults()  # nothing of a reader's own matplotlibrc
    sns.set_theme(context="notebook", style="whitegrid", palette=COLORS, rc=settings)


def tidy(values: Mapping[Any, Any], *names: str) -> pd.DataFrame:
    """A frame that `plot` draws: a row for each number, estimate or not.

    The parts of its key stand under the first names, the number under the last one. Where some are
    estimates, the columns `low` and `high` are their intervals.
    """
    rows = []
    for key, value in values.items():
        parts = key if isinstance(key, tuple) else (key,)
        if isinstance(value, Estimate):
            rows.append((*parts, value.value, value.low, value.high))
        else:
            rows.append((*parts, value, value, value))
    frame = pd.DataFrame(rows, columns=[*names, "low", "high"])
    known = any(isinstance(value, Estimate) for value in values.values())
    return frame if known else frame.drop(columns=["low", "high"])


def plot(
    frame: pd.DataFrame | Mapping[Any, Any],
    name: str,
    x: str,
    y: str,
    *,
    see: str = "",
    at: float | None = None,
    **look: Unpack[Look],
) -> None:
    """Draw a frame of estimates, and show it with a caption and an alt text made from its names.

    The names of columns are the labels of the figure, so they say their units.

    **Arguments:**

    - `frame`: a row a point. The columns `low` and `high`, where they are, are the interval of `y`.
      Rows whose column `cited` is true are drawn in grey: they are another's, not computed here.
      Or what `tidy` makes one of: numbers or estimates by panel, curve and place along x. Or, with
      `along`, a sequence of them for each curve.
    - `name`: the label for cross-references, `fig-…`.
    - `x`, `y`: the columns that are drawn.
    - `see`: the one thing to see, as a sentence without its full stop; it may be computed.
    - `at`: without `see`, a place along x. The curves' values there are then what to see.
    - `look`: see `Look`.

    **Raises:** `ValueError` for a column that is not there, more than six curves, or no row.
    """
    frame = _whole(frame, x, y, look)
    fig = draw(frame, x, y, look)
    see = see or _values(frame, x, y, look["by"], at)
    what = y
    if "panels" in look and y == "value":
        what = ", ".join(map(str, frame[look["panels"]].unique()))
    caption = _caption(frame, x, what, look)
    alt = _alt(frame, x, what, look)
    show(fig, name, f"{caption} {see}.", f"{alt} {see}.")


def _whole(frame: pd.DataFrame | Mapping[Any, Any], x: str, y: str, look: Look) -> pd.DataFrame:
    """The frame to draw: our own points, then what is cited beside them."""
    if "along" in look:
        points = {}
        for curve, row in frame.items():
            for place, value in zip(look["along"], row, strict=True):
                points[curve, place] = value
        frame = points
    if isinstance(frame, Mapping):
        names = [look[part] for part in ("panels", "by") if part in look]
        names += [y, x] if look.get("kind") == "dot" else [x, y]
        frame = tidy(frame, *names)
    if "cited" in look:
        cited = look["cited"].assign(cited=True)
        named = {"x": x, "y": y, "curve": look.get("by", "curve")}
        missing = {old: new for old, new in named.items() if new not in cited}
        cited = cited.rename(columns=missing)
        frame = pd.concat([frame, cited]) if len(frame) else cited
    marked = frame["cited"].eq(True) if "cited" in frame else False
    return frame.assign(cited=marked)


def draw(frame: pd.DataFrame, x: str, y: str, look: Look) -> Figure:
    """The figure that `plot` shows."""
    by = look.get("by")
    panels = look.get("panels")
    columns = [column for column in (x, y, by, panels) if column]
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"columns {missing}: not in the frame, which has {', '.join(frame)}")
    if frame.empty:
        raise ValueError("the frame has no row, so there is nothing to draw")
    curves = frame.loc[~frame["cited"], by].nunique() if by else 0
    if curves > MOST_CURVES:
        raise ValueError(f"{curves} curves by {by!r}: show {MOST_CURVES} at most, or use panels")
    frame = _labelled(frame, columns)
    parts = _parts(frame, panels)
    height = 4.2 if len(parts) == 1 else 2.8 * len(parts)
    if look.get("kind") == "dot":
        height = max(height, 0.35 * frame[y].nunique())
    fig, axes = plt.subplots(len(parts), sharex=True, figsize=(7.0, height), squeeze=False)
    for ax, (title, part) in zip(axes[:, 0], parts.items(), strict=True):
        _fill(ax, part, x, y, look)
        if panels:
            ax.set_title(str(title))
        ax.label_outer()
    _legend(fig)
    return fig


def show(fig: Figure, name: str, caption: str, alt: str) -> None:
    """Display a figure under its label with a caption and an alt text, then close it.

    Texts are plain: what would be Markdown is shown as it is. What would keep a reader from seeing
    the figure is kept with it: the weakest contrast of its lines, and how many panels stand side by
    side.
    """
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    columns = {round(ax.get_position().x0, 1) for ax in panels}
    about = {"name": name, "caption": visible(caption), "alt": visible(alt)}
    about |= {"contrast": round(contrast(fig), 2), "columns": len(columns)}
    display(fig, metadata={"companion": about})
    plt.close(fig)


def contrast(fig: Figure) -> float:
    """The weakest contrast on white of a figure's lines, as WCAG defines it: 1 to 21."""
    lines = [line for ax in fig.axes for line in ax.lines]
    ratios = [1.05 / (relative_luminance(line.get_color()) + 0.05) for line in lines]
    return min(ratios, default=21.0)


def _labelled(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The frame with names that fit into a figure, whatever they hold; equal names stay apart."""
    frame = frame.copy()
    for column in set(columns):
        labels: dict[str, str] = {}
        for name in dict.fromkeys(frame[column]):
            if not isinstance(name, str):
                continue
            label = visible(name)
            if len(label) > LABEL:
                label = f"{label[: LABEL // 2]}…{label[-LABEL // 2 :]}"
            if label.startswith("_"):  # matplotlib would leave it out of the legend
                label = f" {label}"
            if label in labels.values():
                label = f"{label} ({len(labels)})"
            labels[name] = label
        if labels:
            frame[column] = [labels.get(name, name) for name in frame[column]]
    return frame


def _fill(ax: Axes, frame: pd.DataFrame, x: str, y: str, look: Look) -> None:
    by = look.get("by")
    kind = look.get("kind", "line")
    cited = frame["cited"]
    if not cited.all():
        {"line": _lines, "dot": _dots, "scatter": _points}[kind](ax, frame[~cited], x, y, by)
    for (key, part), dash in zip(_parts(frame[cited], by).items(), CITED_DASHES, strict=False):
        label = f"{key} (cited)" if by else "cited"
        ax.plot(part[x], part[y], label=label, color=CITED, lw=1.2, ls=(0, dash), marker="")
        ax.set(xlabel=x, ylabel=y)
    for axis in look.get("log", ""):
        _logarithmic(ax, axis)
    for across, lines in ((ax.axhline, "marks"), (ax.axvline, "upright")):
        for label, value in look.get(lines, {}).items():
            across(value, color=CITED, lw=1, ls=":", label=label)
    if "limits" in look:
        ax.set_ylim(*look["limits"])
    if ax.get_legend():
        ax.get_legend().remove()


def _logarithmic(ax: Axes, axis: str) -> None:
    ax.set(**{f"{axis}scale": "log"})
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    low, high = chosen.get_view_interval()
    ticks = "{x:g}" if low > 1e-3 and high < 1e4 else power  # one way for all of an axis
    narrow = high < 100 * low
    chosen.set_major_formatter(ticks)
    chosen.set_minor_locator(LogLocator(subs=[2, 5] if narrow else "auto"))
    chosen.set_minor_formatter(ticks if narrow else "")


def _legend(fig: Figure) -> None:
    """One legend above all panels, where it covers no curve."""
    entries = {}
    for ax in fig.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    columns = max(1, 80 // (8 + max(map(len, entries))))
    rows = math.ceil(len(entries) / columns)
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)
    fig.set_figheight(fig.get_figheight() + 0.25 * rows)


def _lines(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    parts = _parts(frame, by)
    style = _style(parts, by)
    if by:
        keys = list(parts)
        style |= {"hue_order": keys, "style": by, "style_order": keys}
        style["dashes"] = DASHES[: len(keys)]
    if len(frame) == len(parts):
        style["markersize"] = 9  # single points, which no line makes seen
    sns.lineplot(frame, x=x, y=y, ax=ax, estimator=None, errorbar=None, **style)
    if "low" not in frame:
        return
    for part, color in zip(parts.values(), COLORS, strict=False):
        part = part.sort_values(x)
        ax.fill_between(part[x], part["low"], part["high"], color=color, alpha=0.2, lw=0)
        if len(part) == 1:
            ax.vlines(part[x], part["low"], part["high"], color=color, lw=2)


def _dots(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    parts = _parts(frame, by)
    width = 0.4 if len(parts) > 1 else 0.0
    style = {"errorbar": None, "linestyle": "none", "dodge": width, **_style(parts, by)}
    sns.pointplot(frame, x=x, y=y, ax=ax, **style)
    if "low" not in frame:
        return
    rows = list(dict.fromkeys(frame[y]))
    shifts = np.linspace(-width / 2, width / 2, len(parts))
    for part, shift, color in zip(parts.values(), shifts, COLORS, strict=False):
        places = part[y].map(rows.index) + shift
        ax.hlines(places, part["low"], part["high"], color=color, lw=2)


def _points(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None) -> None:
    style = _style(_parts(frame, by), by)
    sns.scatterplot(frame, x=x, y=y, style=by, ax=ax, s=40, **style)


def _parts(frame: pd.DataFrame, by: str | None) -> dict[Any, pd.DataFrame]:
    """The curves of a frame, or its panels."""
    if by:
        return dict(list(frame.groupby(by, sort=False)))
    return {None: frame} if len(frame) else {}


def _style(parts: Mapping[Any, pd.DataFrame], by: str | None) -> dict[str, Any]:
    """How seaborn tells the curves apart."""
    count = len(parts)
    return {"hue": by, "palette": COLORS[:count], "markers": MARKERS[:count]} if by else {}


def power(value: float, _place: int = 0) -> str:
    """A tick of a logarithmic axis in plain characters, such as 10⁶ or 2·10⁶."""
    first, exponent = f"{value:.0e}".split("e")
    times = "" if first == "1" else f"{first}·"
    digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{times}10{digits}"


def _values(frame: pd.DataFrame, x: str, y: str, by: str, at: float | None) -> str:
    """What our own curves are at the drawn place that is nearest to `at`."""
    told = []
    own = frame[~frame["cited"]]
    for curve, part in _parts(own, by).items():
        nearest = part.iloc[(part[x] - at).abs().argmin()]
        told.append(f"{nearest[y]:.2g} {curve}")
    return f"At {x} = {nearest[x]:,.4g}: {'; '.join(told)}"


def _caption(frame: pd.DataFrame, x: str, y: str, look: Look) -> str:
    """What is drawn, in one sentence."""
    line = look.get("kind", "line") == "line"
    caption = f"{y[:1].upper()}{y[1:]} against {x}"
    if look.get("by"):
        caption += f", {'a line for each' if line else 'by'} {look['by']}"
    notes = []
    if "low" in frame:
        notes.append(f"{'bands' if line else 'bars'} are 95 % intervals")
    if frame["cited"].any():
        notes.append("grey is cited, not computed here")
    return f"{caption} ({'; '.join(notes)})." if notes else f"{caption}."


def _alt(frame: pd.DataFrame, x: str, y: str, look: Look) -> str:
    """The shape of what is drawn, in one sentence."""
    by = look.get("by")
    own = frame[~frame["cited"]]
    grey = len(_parts(frame[frame["cited"]], by))
    shape = "point"
    count = len(own)
    if look.get("kind", "line") == "line":
        shape = "line"
        count = len(_parts(own, by))
    shown = count or grey
    alt = f"{shown} {shape}{'' if shown == 1 else 's'} of {y} against {x}"
    if look.get("panels"):
        alt += f" in {frame[look['panels']].nunique()} panels"
    if grey:
        alt += f", beside {grey} cited in grey" if count else ", cited, in grey"
    return f"{alt}."
