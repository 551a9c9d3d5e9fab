import warnings
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from companion import figures

TEXTS = {"name": "fig-x", "caption": "A line.", "alt": "A line that rises."}
FOREIGN = [
    "<script>alert(1)</script>",
    "<!--",
    "a$b^{c$d",
    "`|`",
    "_final",
    "\u202eabc",
    "模型",
    "x" * 10_000,
]


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed: (figure, what is kept with it) pairs, drawn as a notebook would."""
    seen = []

    def display(fig, metadata):
        fig.canvas.draw()
        seen.append((fig, metadata["companion"]))

    monkeypatch.setattr(figures, "display", display)
    with mpl.rc_context(), warnings.catch_warnings():
        figures.use_style()
        yield seen
    plt.close("all")


def frame(**more):
    return pd.DataFrame({"layer": [0, 1, 2], "mean cosine": [0.1, 0.5, 0.2], **more})


def test_a_figure_is_shown_with_its_texts_and_closed(shown):
    fig, _ = plt.subplots()
    figures.show(fig, **TEXTS)
    assert shown == [(fig, {**TEXTS, "contrast": 21.0, "columns": 1})]
    assert not plt.fignum_exists(fig.number)


def test_caption_and_alt_text_come_from_the_names(shown):
    told = frame(low=[0, 0.4, 0.1], high=[0.2, 0.6, 0.3])
    figures.plot(told, "fig-x", "layer", "mean cosine", see="Highest in block 1 (0.5)")
    ((_, kept),) = shown
    assert kept["caption"] == (
        "Mean cosine against layer (bands are 95 % intervals). Highest in block 1 (0.5)."
    )
    assert kept["alt"] == "1 line of mean cosine against layer. Highest in block 1 (0.5)."


def test_estimates_and_numbers_become_a_frame():
    cut = SimpleNamespace(value=2.0, low=1.5, high=2.5, n=9)
    told = figures.tidy({("text", 8): cut, ("text", 16): 1.0}, "source", "rank", "loss")
    assert told.columns.tolist() == ["source", "rank", "loss", "low", "high"]
    assert told.values.tolist() == [["text", 8, 2.0, 1.5, 2.5], ["text", 16, 1.0, 1.0, 1.0]]
    assert figures.tidy({8: 1.0}, "rank", "loss").columns.tolist() == ["rank", "loss"]


def test_numbers_by_curve_and_place_are_drawn_as_they_are(shown):
    figures.plot({("ours", 0): 0.1, ("ours", 1): 0.5}, "fig-x", "layer", "cosine", by="of", at=1)
    cut = SimpleNamespace(value=2.0, low=1.5, high=2.5, n=9)
    figures.plot({"whole": cut}, "fig-y", "loss", "head", kind="dot", see="It costs two")
    line, dot = shown
    assert line[1]["caption"] == "Cosine against layer, a line for each of. At layer = 1: 0.5 ours."
    assert dot[0].axes[0].get_xlabel() == "loss"
    assert "bars are 95 % intervals" in dot[1]["caption"]


def test_a_single_point_is_seen_with_its_interval(shown):
    told = pd.DataFrame({"size": [1, 1], "cosine": [0.2, 0.3], "model": ["a", "b"]})
    told = told.assign(low=0.1, high=0.4)
    figures.plot(told, "fig-x", "size", "cosine", by="model", see="Two")
    ((fig, _),) = shown
    lines = [part for part in fig.axes[0].collections if hasattr(part, "get_segments")]
    assert [line.get_segments()[0][:, 1].tolist() for line in lines] == [[0.1, 0.4]] * 2
    assert fig.axes[0].lines[0].get_markersize() == 9


def test_what_to_see_is_made_of_our_own_curves_where_it_is_not_said(shown):
    told = frame(model=["ours", "ours", "theirs"], cited=[False, False, True])
    figures.plot(told, "fig-x", "layer", "mean cosine", by="model", at=1.9)
    assert shown[0][1]["caption"].endswith(" At layer = 1: 0.5 ours.")


def test_what_is_cited_is_grey_and_said_so(shown):
    told = frame(model=["ours", "ours", "theirs"], cited=[False, False, True])
    figures.plot(told, "fig-x", "layer", "mean cosine", by="model", see="Alike")
    ((fig, kept),) = shown
    assert "grey is cited, not computed here" in kept["caption"]
    assert "beside 1 cited in grey" in kept["alt"]
    lines = {line.get_label(): line.get_color() for line in fig.axes[0].lines}
    assert lines["theirs (cited)"] == figures.CITED


def test_a_sequence_a_curve_is_drawn_along_its_places_above_what_is_cited(shown):
    read_off = pd.DataFrame({"curve": "theirs", "x": [0, 1], "y": [0.2, 0.4]})
    look = {"by": "model", "cited": read_off, "see": "Alike"}
    cut = SimpleNamespace(value=0.5, low=0.4, high=0.6, n=9)
    figures.plot({"ours": [0.1, cut]}, "fig-x", "layer", "cosine", along=[0, 1], **look)
    figures.plot({}, "fig-y", "layer", "cosine", **look)
    (both, told), (alone, _) = shown
    drawn = [list(line.get_ydata()) for line in both.axes[0].lines if len(line.get_ydata())]
    assert drawn == [[0.1, 0.5], [0.2, 0.4]]
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["ours", "theirs (cited)"]
    assert "bands are 95 % intervals; grey is cited" in told["caption"]
    assert [line.get_label() for line in alone.axes[0].lines] == ["theirs (cited)"]
    with pytest.raises(ValueError, match="zip"):
        figures.plot({"ours": [0.1]}, "fig-z", "layer", "cosine", along=[0, 1], **look)


def test_names_from_elsewhere_are_shown_as_they_are(shown):
    told = pd.concat([frame(model=name) for name in FOREIGN[:6]])
    figures.plot(told, "fig-x", "layer", "mean cosine", by="model", see="It rises")
    figures.plot(
        told.assign(model=FOREIGN[-1]), "fig-y", "layer", "mean cosine", by="model", see="x"
    )
    figures.plot(frame(model=FOREIGN[-3:]), "fig-z", "mean cosine", "model", see="x", kind="dot")
    legends = [text.get_text() for text in shown[0][0].legends[0].get_texts()]
    assert legends == ["<script>alert(1)</script>", "<!--", "a$b^{c$d", "`|`", " _final", "abc"]
    (long,) = shown[1][0].legends[0].get_texts()
    assert len(long.get_text()) == figures.LABEL + 1


def test_equal_labels_stay_apart(shown):
    long = "x" * 50
    told = pd.concat([frame(model=long + "a" + long), frame(model=long + "b" + long)])
    figures.plot(told, "fig-x", "layer", "mean cosine", by="model", see="Two lines")
    assert len(shown[0][0].legends[0].get_texts()) == 2


def test_dots_have_an_interval_each_whatever_the_groups(shown):
    told = pd.concat([frame(low=0, high=1, seed=seed) for seed in "ab"])
    told["layer"] = told["layer"].map("block {}".format)
    figures.plot(told, "fig-x", "mean cosine", "layer", by="seed", see="Wide", kind="dot")
    intervals = shown[0][0].axes[0].collections
    assert sum(len(part.get_segments()) for part in intervals) == 6


def test_scattered_points_are_not_joined(shown):
    told = pd.concat([frame(model=name) for name in "ab"])
    look = {"by": "model", "see": "Far apart", "kind": "scatter"}
    figures.plot(told, "fig-x", "layer", "mean cosine", **look)
    (fig, about) = shown[0]
    assert len(fig.axes[0].collections[0].get_offsets()) == 6
    assert not any(len(line.get_xdata()) for line in fig.axes[0].lines)
    assert about["alt"].startswith("6 points of mean cosine against layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "depth"}, r"columns \['depth'\]: not in the frame, which has layer, mean cosine"),
        ({"frame": frame().iloc[:0]}, "the frame has no row"),
        ({"by": "layer", "frame": pd.DataFrame({"layer": range(7), "mean cosine": 0})}, "7 curves"),
    ],
)
def test_what_cannot_be_drawn_is_named(change, message):
    asked = {"frame": frame(), "name": "fig-x", "x": "layer", "y": "mean cosine", "see": "x"}
    with pytest.raises(ValueError, match=message):
        figures.plot(**{**asked, **change})


def test_lines_are_told_apart_without_colour_and_seen_on_white(shown):
    told = pd.concat([frame(model=name) for name in "abcdef"])
    figures.plot(told, "fig-x", "layer", "mean cosine", by="model", see="Six")
    ((fig, _),) = shown
    lines = fig.axes[0].lines[:6]
    assert len({line.get_marker() for line in lines}) == 6
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 6
    assert len({line.get_color() for line in lines}) == 6
    assert figures.contrast(fig) >= 4.5


def test_a_pale_line_and_panels_side_by_side_are_told(shown):
    fig, axes = plt.subplots(1, 3)
    axes[0].plot([0, 1], color="#ffb6c1")
    figures.show(fig, **TEXTS)
    assert shown[0][1]["contrast"] < 3
    assert shown[0][1]["columns"] == 3


def test_panels_stand_one_above_the_other(shown):
    told = pd.concat([frame(model=name) for name in "abc"])
    figures.plot(told, "fig-x", "layer", "mean cosine", panels="model", see="It rises")
    assert shown[0][1]["columns"] == 1
    assert "in 3 panels" in shown[0][1]["alt"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 512, ["1", "10", "100"]),
        (100, 900, ["100"]),
        (8, 35_000, ["10¹", "10²", "10³", "10⁴"]),
        (1e-5, 0.2, ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]),
    ],
)
def test_a_logarithmic_axis_writes_all_ticks_in_one_way(low, high, ticks):
    places = np.geomspace(low, high, 20)
    told = pd.DataFrame({"step": places, "loss": places, "cited": False})
    fig = figures.draw(told, "step", "loss", {"log": "x"})
    fig.canvas.draw()
    ax = fig.axes[0]
    seen = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    assert [label.get_text() for place, label in seen if 0.99 * low < place < high] == ticks
    plt.close(fig)
