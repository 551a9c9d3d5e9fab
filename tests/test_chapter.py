import json
import math
import re
from importlib.metadata import version
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from companion import chapter, results


class Estimate(NamedTuple):
    """Anything with these four is one."""

    value: float
    low: float
    high: float
    n: int


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed: (html, metadata) pairs."""
    seen = []
    monkeypatch.setattr(
        chapter, "display", lambda style, metadata=None: seen.append((style.to_html(), metadata))
    )
    with mpl.rc_context():
        yield seen


def test_a_chapter_begins_with_its_preset_seed_and_versions(shown):
    run = chapter.begin({"seed": 3, "preset": "smoke", "model": "x", "np": np})
    assert (run.preset, run.seed) == ("smoke", 3)
    assert run.packages["numpy"] == version("numpy")
    assert not shown


def test_begin_seeds_every_generator():
    draws = []
    for _ in range(2):
        chapter.begin({"seed": 5, "preset": "smoke"})
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))  # noqa: NPY002 (what begin seeds)
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ({"preset": "smoke"}, "seed = None: the parameters cell must set it to a int"),
        ({"seed": 0}, "preset = None: the parameters cell must set it to a str"),
        ({"seed": "0", "preset": "smoke"}, "seed = '0'"),
        ({"seed": 0, "preset": 1}, "preset = 1"),
        ({"seed": -1, "preset": "smoke"}, "seed = -1: must be between 0 and 4294967295"),
    ],
)
def test_begin_needs_seed_and_preset(namespace, message, shown):
    with pytest.raises(ValueError, match=message):
        chapter.begin(namespace)
    assert not shown


TEXTS = """\
anisotropy.last: {quantity: "A, {blocks} blocks", paper: high}
spectrum.entropy: {quantity: KL, paper: "0.1", comment: "model {model}"}
spectrum.shape: {quantity: shape, paper: not given}
spectrum.rank: {quantity: rank, paper: low, one_of_many: true}
fig-fall: {x: depth, y: loss, by: model, limits: [0, 1], see: "It ends at {end:.2f}"}
answer: {words: "It *falls* by {fall.value}."}
"""


@pytest.fixture
def run(tmp_path, shown):
    (tmp_path / "texts.yaml").write_text(TEXTS)
    return chapter.begin({"seed": 0, "preset": "smoke"}, tmp_path / "texts.yaml")


def test_findings_are_shown_and_kept_as_json(run, shown):
    told = {
        "anisotropy.last": (Estimate(0.25, 0.2, 0.3, 40), True),
        "spectrum.entropy": (0.123456, bool(np.float64(1) > 2), "the interval excludes it"),
        "spectrum.shape": ("49,152 × 576", None),
    }
    chapter.findings(run, told, blocks=3, model="{another}")
    html, metadata = shown[0]
    for text in (
        "A, 3 blocks",
        "0.250 [0.200, 0.300] (n = 40)",
        "0.1235",
        ">reproduced<",
        "not reproduced",
        "not testable here",
        "model {another}; the interval excludes it",
    ):
        assert text in html
    kept = json.loads(json.dumps(metadata))["companion"]["findings"]
    assert kept[0]["measured"] == {"value": 0.25, "low": 0.2, "high": 0.3, "n": 40}
    verdicts = ["reproduced", "not reproduced", "not testable here"]
    assert [row["verdict"] for row in kept] == verdicts
    assert [row["key"] for row in kept] == list(told)


def test_numpys_own_numbers_and_verdicts_are_kept_too(run, shown):
    # What a notebook gets from comparing numpy numbers.
    measured = Estimate(np.float64(1), np.float32(0), np.float32(2), np.int64(3))
    told = {"spectrum.shape": (measured, np.True_)}
    told["spectrum.rank"] = (np.float64(2), np.False_)
    chapter.findings(run, told)
    kept = json.loads(json.dumps(shown[0][1]))["companion"]["findings"]
    assert [r["verdict"] for r in kept] == ["reproduced", "not reproduced"]
    assert kept[0]["measured"] == {"value": 1, "low": 0, "high": 2, "n": 3}


def test_an_unknown_interval_is_kept_as_strict_json(run, shown):
    chapter.findings(run, {"spectrum.shape": (Estimate(1.0, math.nan, math.nan, 1), None)})
    kept = json.dumps(shown[0][1], allow_nan=False)
    assert json.loads(kept)["companion"]["findings"][0]["measured"]["low"] is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("spectrum.shap", "spectrum.shap: the chapter's file of words does not have this key"),
        ("anisotropy.last", "anisotropy.last: its text asks for 'blocks'; give it"),
    ],
)
def test_a_finding_without_its_text_is_refused(key, message, run, shown):
    with pytest.raises(ValueError, match=re.escape(message)):
        chapter.findings(run, {key: (1.0, True)})
    assert not shown


def test_a_table_rounds_floats_and_has_its_caption(shown):
    chapter.table(
        pd.DataFrame({"x": [1.23456789, math.nan], "n": [10, 20], "s": ["a", "b"]}),
        "Some numbers",
        digits=3,
    )
    html, _ = shown[0]
    for text in ("1.23", "nan", "10", "Some numbers"):
        assert text in html
    assert "1.2345" not in html


def test_a_table_of_rows_shows_estimates_and_answers_in_words(shown):
    rows = [("this head", Estimate(0.25, 0.2, 0.3, 40), True)]
    chapter.table(rows, "Heads", ["head", "loss", "seen"])
    html, _ = shown[0]
    for text in (">head<", "0.250 [0.200, 0.300] (n = 40)", ">yes<"):
        assert text in html


def test_a_table_chooses_columns_of_a_frame_and_renames_them(shown):
    frame = pd.DataFrame({"hidden_size": [8], "loss": [0.5], "step": [99]})
    chapter.table(frame, "Runs", {"step": "steps", "hidden_size": "d"})
    html, _ = shown[0]
    assert html.index(">steps<") < html.index(">d<")
    assert "loss" not in html
    with pytest.raises(KeyError, match="width"):
        chapter.table(frame, "Runs", ["step", "width"])


def test_the_end_shows_where_the_numbers_come_from(shown):
    run = chapter.begin({"seed": 0, "preset": "smoke", "np": np})
    chapter.end(run, {"tokens": 12_345, "texts": "all"})
    html, metadata = shown[-1]
    kept = json.loads(json.dumps(metadata))["companion"]["provenance"]
    assert kept["preset"] == "smoke"
    assert kept["torch"] == torch.__version__.split("+")[0] or kept["torch"] == torch.__version__
    assert kept["sample: tokens"] == "12,345"
    assert {"run time", "peak memory", "device", "numpy", "Python"} <= kept.keys()
    assert "How this page was made" in html


def test_a_table_takes_its_words_from_the_file_and_the_notebooks_names(tmp_path, shown):
    path = tmp_path / "texts.yaml"
    path.write_text('table-heads: {caption: "Heads, {loss}", columns: [head, "loss at {d}"]}')
    notebook = {"seed": 0, "preset": "smoke", "d": 8}
    run = chapter.begin(notebook, path)
    notebook |= {"d": 16, "loss": Estimate(0.25, 0.2, 0.3, 40)}  # after it has begun
    chapter.table([("head", 0.5)], **run.words("table-heads"))
    html, _ = shown[0]
    assert "Heads, 0.250 [0.200, 0.300] (n = 40)" in html
    assert ">loss at 16<" in html


@pytest.mark.parametrize(
    ("agrees", "key", "verdict"),
    [
        (True, "spectrum.shape", "reproduced"),
        (True, "spectrum.rank", "consistent"),
        (False, "spectrum.rank", "not reproduced"),
        (None, "spectrum.rank", "not testable here"),
    ],
)
def test_one_model_that_meets_a_claim_about_all_is_consistent(agrees, key, verdict, run, shown):
    chapter.findings(run, {key: (1.0, agrees)})
    (kept,) = shown[0][1]["companion"]["findings"]
    assert kept["verdict"] == verdict
    assert verdict in results.WORDS


def test_an_answer_is_shown_and_kept(run, monkeypatch):
    seen = []
    monkeypatch.setattr(chapter, "display", lambda part, metadata: seen.append((part, metadata)))
    chapter.answer(**run.words("answer", fall=Estimate(0.25, 0.2, 0.3, 40)))
    ((part, metadata),) = seen
    assert part.data == "It *falls* by 0.25."
    assert metadata == {"companion": {"answer": "It *falls* by 0.25."}}


def test_the_words_of_a_figure_stand_in_the_chapters_file(run, monkeypatch):
    seen = []
    monkeypatch.setattr(chapter.figures, "show", lambda fig, *texts: seen.append((fig, *texts)))
    chapter.figure(run, {"ours": [0.1, 0.5]}, "fig-fall", along=[0, 1], end=0.5)
    ((fig, name, caption, _),) = seen
    assert (name, fig.axes[0].get_ylim()) == ("fig-fall", (0, 1))
    assert caption == "Loss against depth, a line for each model. It ends at 0.50."
    with pytest.raises(ValueError, match="fig-fall: its text asks for 'end'; give it"):
        chapter.figure(run, {"ours": [0.1, 0.5]}, "fig-fall", along=[0, 1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Estimate(0.412, 0.38, 0.44, 64), "0.412 [0.380, 0.440] (n = 64)"),
        ({"value": 70.1, "low": 57.0, "high": 80, "n": 1200}, "70.1 [57.0, 80.0] (n = 1,200)"),
        ({"value": 1.0, "low": None, "high": None, "n": 1}, "1.00 (no interval, n = 1)"),
        (np.float32(0.123456), "0.1235"),
        (49152, "49152"),
        (None, "unknown"),
        ("none found", "none found"),
    ],
)
def test_one_number_format(value, text):
    assert chapter.number(value) == text


def test_an_explorable_holds_its_data_and_what_all_share(tmp_path, monkeypatch):
    (tmp_path / "shared.html").write_text("<b>{% block own %}{% endblock %}{{ data }}</b>")
    own = "{% extends 'shared.html' %}{% block own %}<i>own</i> {% endblock %}"
    (tmp_path / "one.html").write_text(own)
    seen = []
    monkeypatch.setattr(chapter, "display", seen.append)
    data = {"x": np.arange(2), "y": np.float32(0.5), "said": "</script>"}
    chapter.explore(tmp_path / "one.html", data)
    told = r'{"x": [0, 1], "y": 0.5, "said": "\u003c/script>"}'
    assert seen[0].data == f"<b><i>own</i> {told}</b>"
