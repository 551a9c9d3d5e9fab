import io
import json
import math
import subprocess
import sys

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from companion import chapter
from headbound import device, progress
from headbound.stats import Estimate


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed: (html, metadata) pairs."""
    seen = []
    monkeypatch.setattr(
        chapter, "display", lambda style, metadata=None: seen.append((style.to_html(), metadata))
    )
    with mpl.rc_context():
        yield seen


def test_begin_shows_the_plain_parameters_and_nothing_else(shown):
    namespace = {
        "seed": 3,
        "preset": "smoke",
        "model": "x",
        "ranks": [1, 2],
        "_": 1,
        "__name__": "m",
        "np": np,
        "In": [],
    }
    run = chapter.begin(namespace)
    assert run.parameters == {"seed": 3, "preset": "smoke", "model": "x", "ranks": [1, 2]}
    html, _ = shown[0]
    assert "Parameters of this run" in html
    assert "[1, 2]" in html
    assert "__name__" not in html


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


def test_findings_are_shown_and_kept_as_json(shown):
    chapter.findings(
        [
            chapter.Finding("anisotropy.last", "A", "high", Estimate(0.25, 0.2, 0.3, 40), True),
            chapter.Finding(
                "spectrum.entropy", "KL", "0.1", 0.123456, bool(np.float64(1) > 2), "another model"
            ),
            chapter.Finding("spectrum.shape", "shape", "-", "49,152 × 576", None),
        ]
    )
    html, metadata = shown[0]
    for text in (
        "0.250 [0.200, 0.300] (n = 40)",
        "0.1235",
        ">reproduced<",
        "not reproduced",
        "not testable here",
        "another model",
    ):
        assert text in html
    kept = json.loads(json.dumps(metadata))["headbound"]["findings"]
    assert kept[0]["measured"] == {"value": 0.25, "low": 0.2, "high": 0.3, "n": 40}
    assert [row["agrees"] for row in kept] == [True, False, None]
    assert [row["key"] for row in kept] == ["anisotropy.last", "spectrum.entropy", "spectrum.shape"]


def test_numpys_own_numbers_and_verdicts_are_kept_too(shown):
    # What a notebook gets from comparing numpy numbers.
    row = chapter.Finding(
        "a.b",
        "q",
        "p",
        Estimate(np.float64(1), np.float32(0), np.float32(2), np.int64(3)),
        np.True_,
    )
    chapter.findings([row, row._replace(measured=np.float64(2), agrees=np.False_)])
    kept = json.loads(json.dumps(shown[0][1]))["headbound"]["findings"]
    assert [r["agrees"] for r in kept] == [True, False]
    assert kept[0]["measured"] == {"value": 1, "low": 0, "high": 2, "n": 3}


def test_an_unknown_interval_is_kept_as_strict_json(shown):
    chapter.findings([chapter.Finding("a.b", "q", "p", Estimate(1.0, math.nan, math.nan, 1), None)])
    kept = json.dumps(shown[0][1], allow_nan=False)
    assert json.loads(kept)["headbound"]["findings"][0]["measured"]["low"] is None


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


def test_the_end_shows_where_the_numbers_come_from(shown):
    chapter.end(chapter.begin({"seed": 0, "preset": "smoke"}), {"tokens": 12_345, "texts": "all"})
    html, metadata = shown[-1]
    kept = json.loads(json.dumps(metadata))["headbound"]["provenance"]
    assert kept["preset"] == "smoke"
    assert kept["torch"] == torch.__version__.split("+")[0] or kept["torch"] == torch.__version__
    assert kept["sample: tokens"] == "12,345"
    assert {"run time", "peak memory", "device", "headbound", "Python"} <= kept.keys()
    assert "How this page was made" in html


def test_a_bar_writes_to_standard_error_and_never_into_a_notebook(capfd):
    assert list(progress.bar(range(3), "counting")) == [0, 1, 2]
    written = capfd.readouterr()
    assert not written.out
    assert written.err.count("\r") <= 3


def test_what_workers_say_is_logged_and_not_published(tmp_path):
    cell = """
import os, sys, warnings
from headbound import progress
from joblib import delayed

def work(number):
    os.write(2, b"raw ")
    return [number for _ in progress.bar(range(3), "working")][0]

print(progress.parallel([delayed(work)(i) for i in range(4)], 2), work(4))
warnings.warn("to be seen")
"""
    path = tmp_path / "talks.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
    program = "import sys, papermill; papermill.execute_notebook(sys.argv[1], sys.argv[1], kernel_name='python3')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    published = {o.name: o.text for o in nbformat.read(path, as_version=4).cells[0].outputs}
    assert published["stdout"] == "[0, 1, 2, 3] 4\n"
    assert "to be seen" in published["stderr"]
    assert "raw" not in published["stderr"]
    assert done.stderr.count("raw") == 5
    assert "leaked" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bar_is_rare_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "__stderr__", log)
    for _ in progress.bar(range(10_000), "many"):
        pass
    assert log.getvalue().count("\r") <= 3


def test_devices(monkeypatch):
    assert device.pick("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick() == torch.device("cuda")
    assert device.pick("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick() == torch.device("mps")
    assert device.precise(device.pick()) == torch.device("cpu")
    assert device.precise(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.describe() == "cpu"
    with pytest.raises(
        ValueError, match="device = 'cuda': this machine has cpu; use one of them or 'auto'"
    ):
        device.pick("cuda")
