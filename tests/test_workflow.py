"""The pipeline around the notebooks: gates, resumption; on a tiny chapter, for speed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from companion import cli, execute, gates

ROOT = Path(__file__).resolve().parent.parent

FIGURE = """
import matplotlib.pyplot as plt
from companion import figures
fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([1, 2])
figures.show(fig, name="fig-line", caption=f"Line {n}.", alt=f"A line rising {n} times.")
"""


def notebook(
    path: Path, *cells: str, parameters: str = "n = 3\nshare = 0.5\nname = 'x'\npreset = 'laptop'"
) -> Path:
    content = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    content.cells = [
        nbformat.v4.new_markdown_cell("# A tiny chapter"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(source) for source in cells),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(content, path)
    return path


SOURCES = os.pathsep.join([str(ROOT / "src"), str(ROOT / "workflow")])


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """One command of `headbound`, as its own process."""
    command = [sys.executable, "-m", "companion.cli", *(arguments or ["book"])]
    environment = os.environ | {"PYTHONPATH": SOURCES} | variables
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def project(tmp_path):
    """A copy of the pipeline with one tiny chapter and a one-page book."""
    for name in ("presets", "book"):
        (tmp_path / name).mkdir()
    shutil.copytree(
        ROOT / "workflow", tmp_path / "workflow", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "src" / "headbound").mkdir(parents=True)
    (tmp_path / "src" / "headbound" / "module.py").write_text("X = 1\n")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copy(ROOT / "book" / "references.bib", tmp_path / "book")
    (tmp_path / "book" / "index.md").write_text(
        "# A book\n\n{cite}`godey2024saturation`\n\n```{bibliography}\n```\n"
    )
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: chapters/01_tiny\n"
    )
    for preset in ("laptop", "smoke"):
        (tmp_path / "presets" / f"{preset}.yaml").write_text("01_tiny: {}\n")
    notebook(tmp_path / "notebooks" / "01_tiny.ipynb", "print(n)", FIGURE)
    return tmp_path


def test_every_preset_fits_every_notebook():
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for path in sorted((ROOT / "presets").glob("*.yaml")):
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(preset) == chapters, path.name
        for chapter, parameters in preset.items():
            execute.check_parameters(ROOT / "notebooks" / f"{chapter}.ipynb", parameters or {})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"m": 1}, "unknown parameter 'm'; it has n, share, name"),
        ({"n": "many"}, "n = 'many': must be of type int, like 3"),
        ({"n": 0.5}, "n = 0.5: must be of type int"),
        ({"n": True}, "n = True: must be of type int"),
        ({"share": "half"}, "share = 'half': must be of type float"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(tmp_path, parameters, message):
    path = notebook(tmp_path / "01_tiny.ipynb")
    with pytest.raises(ValueError, match=message.split(";")[0]):
        execute.check_parameters(path, parameters)


def test_parameters_that_fit_are_taken(tmp_path):
    execute.check_parameters(
        notebook(tmp_path / "01_tiny.ipynb"), {"n": 4, "share": 1, "name": "y"}
    )


@pytest.mark.slow
def test_a_chapter_that_fails_says_so_in_one_line_and_leaves_no_result(project):
    notebook(
        project / "notebooks" / "01_tiny.ipynb", "raise ValueError('rank = 0: choose another')"
    )
    done = run(project, "chapter", "notebooks/01_tiny.ipynb", "out/01_tiny.ipynb")
    assert done.returncode == 1
    assert "headbound: 01_tiny: ValueError: rank = 0: choose another" in done.stderr
    assert not list((project / "out").iterdir())


def told(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a command of `headbound`, in this process."""
    monkeypatch.setattr(sys, "argv", ["headbound", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capfd.readouterr().err


def test_an_unknown_notebook_parameter_or_preset_has_its_own_line(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    nothing = told(monkeypatch, capfd, "chapter", "notebooks/02_none.ipynb", "out/x.ipynb")
    assert nothing == (2, "headbound: notebook = notebooks/02_none.ipynb: no such file\n")
    chapter = ["chapter", "notebooks/01_tiny.ipynb", "out/x.ipynb"]
    status, line = told(monkeypatch, capfd, *chapter, "--set", "q=1")
    assert status == 2
    assert "unknown parameter 'q'" in line
    huge = told(monkeypatch, capfd, "book", "--preset", "huge")
    assert huge == (2, "headbound: PRESET = huge: must be one of laptop, smoke\n")


def executed(tmp_path: Path, *cells: str) -> tuple[Path, Path]:
    source = notebook(tmp_path / "notebooks" / "01_tiny.ipynb", *cells)
    output = tmp_path / "out" / "01_tiny.ipynb"
    execute.execute(source, output, "laptop", {})
    return output, source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return executed(tmp_path_factory.mktemp("good"), FIGURE)


def test_a_sound_chapter_passes_the_gates_with_computed_alt_text(good):
    assert gates.faults(*good) == []
    (cell,) = [c for c in nbformat.read(good[0], 4).cells if "mystnb" in c.metadata]
    assert cell.metadata.mystnb.image.alt == "A line rising 3 times."
    assert cell.metadata.mystnb.figure == {"caption": "Line 3.", "name": "fig-line"}


def spoil(good: tuple[Path, Path], tmp_path: Path, change) -> list[str]:
    content = nbformat.read(good[0], 4)
    change(content)
    nbformat.write(content, tmp_path / "01_tiny.ipynb")
    return gates.faults(tmp_path / "01_tiny.ipynb", good[1])


def test_each_planted_fault_is_caught(good, tmp_path):
    def error(content):
        content.cells[1].outputs.append(
            nbformat.v4.new_output("error", ename="E", evalue="bad", traceback=[])
        )

    def exception(content):
        content.metadata["papermill"]["exception"] = True

    def no_alt(content):
        content.cells[2].outputs[-1].metadata["companion"]["alt"] = " "

    def undescribed(content):
        content.cells[2].outputs[-1].metadata = {}

    def two(content):
        content.cells[2].outputs *= 2

    def noise(content):
        content.cells[1].outputs.append(
            nbformat.v4.new_output("stream", name="stderr", text="a warning")
        )

    def stale(content):
        content.metadata["companion"]["source"] = "another"

    expected = {
        error: "error output E: bad",
        exception: "papermill recorded an exception",
        no_alt: "figure without alt text",
        undescribed: "figure without alt text",
        two: "more than one figure",
        noise: "text on standard error: a warning",
        stale: "stale",
    }
    for change, message in expected.items():
        (fault,) = spoil(good, tmp_path, change)
        assert message in fault


@pytest.mark.slow
def test_build_skip_change_and_kill(project):
    """A book's life: built; nothing to do; package or notebook changed; killed -9 and resumed."""
    page = project / "_build" / "html" / "chapters" / "01_tiny.html"
    result = project / "_build" / "executed" / "laptop" / "01_tiny.ipynb"
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert "open" in done.stdout
    assert 'alt="A line rising 3 times."' in page.read_text()
    stamp = result.stat().st_mtime_ns

    assert run(project).returncode == 0
    assert result.stat().st_mtime_ns == stamp, (
        "nothing had changed, yet the chapter was executed again"
    )

    (project / "src" / "headbound" / "module.py").write_text("X = 2\n")
    assert run(project).returncode == 0
    assert result.stat().st_mtime_ns != stamp, (
        "the package had changed, yet the chapter was not executed again"
    )

    slow = notebook(
        project / "notebooks" / "01_tiny.ipynb",
        "import time\ntime.sleep(4)",
        FIGURE.replace("Line", "Row"),
    )
    before = result.read_bytes()
    command = [sys.executable, "-m", "companion.cli", "book"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": SOURCES}
    process = subprocess.Popen(
        command, cwd=project, start_new_session=True, env=environment, **quiet
    )
    while not list(result.parent.glob(".running-*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not result.exists() or result.read_bytes() == before, (
        "a half-made result took the place of the old one"
    )
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert gates.faults(result, slow) == []
    assert "Row 3." in page.read_text()
    assert not list(result.parent.glob(".running-*")), "a killed run's folder is still there"

    notebook(project / "notebooks" / "01_tiny.ipynb", "1 / 0")
    done = run(project)
    assert done.returncode == 1
    assert "headbound: 01_tiny: ZeroDivisionError: division by zero" in done.stderr
    assert "Row 3." in page.read_text(), "the earlier book must outlive a failure"


@pytest.mark.slow
def test_sphinx_warnings_stop_the_book(project):
    (project / "book" / "index.md").write_text("# A book\n\n[nowhere](no-such-page.md)\n")
    done = run(project)
    assert done.returncode == 1
    assert "no-such-page" in done.stderr
    assert not (project / "_build" / "html").exists()


def test_notebooks_are_committed_clean():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        content = json.loads(path.read_text())
        for cell in content["cells"]:
            assert not cell.get("outputs"), f"{path.name}: outputs committed"
            assert cell.get("execution_count") is None, f"{path.name}: execution counts committed"
            lines = "".join(cell["source"]).count("\n") + 1
            assert cell["cell_type"] != "code" or lines <= 30, (
                f"{path.name}: a code cell of {lines} lines"
            )


@pytest.mark.slow
def test_chapters_executed_at_once_in_one_folder_do_not_meet(tmp_path):
    notebook(tmp_path / "chapter.ipynb", "import time; time.sleep(2); print(n)")
    command = [sys.executable, "-m", "companion.cli", "chapter", "chapter.ipynb"]
    environment = os.environ | {"PYTHONPATH": SOURCES}
    runs = [
        subprocess.Popen([*command, f"{n}.ipynb", "--set", f"n={n}"], cwd=tmp_path, env=environment)
        for n in range(3)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    for n in range(3):
        assert nbformat.read(tmp_path / f"{n}.ipynb", 4).cells[-1].outputs[0].text == f"{n}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.ipynb",
        "1.ipynb",
        "2.ipynb",
        "chapter.ipynb",
    ]
