"""One chapter: its parameters, its kernel, its place, whatever the reader's machine holds."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_workflow import ROOT, notebook, run

from companion import build, execute

SHOWN = """
import locale, os, sys
from pathlib import Path
Path("written.txt").write_text("→ ü")
print(json.dumps({
    "python": sys.executable, "foreign": os.environ.get("FOREIGN"), "secret": "secret" in globals(),
    "read": Path("written.txt").read_bytes().decode("utf-8"), "here": str(Path.cwd()), "n": n,
}))
"""


def told(path: Path) -> dict:
    return json.loads(nbformat.read(path, 4).cells[-1].outputs[-1].text)


def hostile(folder: Path) -> dict[str, str]:
    """A long TMPDIR, another Python's kernel, start-up files, a locale that is not UTF-8."""
    scratch = (
        folder / "scratch" / "my-group-0123" / "my.user.name" / "slurm_tmpdir" / "job.12345678"
    )
    scratch.mkdir(parents=True)
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": launch, "display_name": "x", "language": "python", "env": {"FOREIGN": "1"}}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    startup = folder / "home" / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text('secret = "hf_123"\nn = 99\n')
    (folder / "startup.py").write_text('secret = "hf_456"\n')
    return {
        "TMPDIR": str(scratch),
        "JUPYTER_PATH": str(folder / "jupyter"),
        "HOME": str(folder / "home"),
        "PYTHONSTARTUP": str(folder / "startup.py"),
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }


@pytest.mark.slow
def test_nothing_of_the_readers_environment_reaches_a_chapter(tmp_path):
    folder = tmp_path / "a folder, ü 中 'x'"
    notebook(folder / "one chapter.ipynb", "import json", SHOWN)
    done = run(folder, "chapter", "one chapter.ipynb", "its result.ipynb", **hostile(tmp_path))
    assert done.returncode == 0, done.stderr
    assert told(folder / "its result.ipynb") == {
        "python": sys.executable,
        "foreign": None,
        "secret": False,
        "read": "→ ü",
        "here": str(folder),
        "n": 3,
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "its result.ipynb",
        "one chapter.ipynb",
        "written.txt",
    ]


@pytest.mark.slow
def test_a_chapter_runs_without_a_home(tmp_path):
    notebook(tmp_path / "chapter.ipynb", "import json", SHOWN)
    nowhere = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    done = run(tmp_path, "chapter", "chapter.ipynb", "out.ipynb", **nowhere)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "out.ipynb")["n"] == 3


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("folder", "it is a folder"),
        ("chapter.ipynb", "it is the notebook itself"),
        ("./folder/../chapter.ipynb", "it is the notebook itself"),
        ("file/out.ipynb", "name another file"),
        ("pipe", "it is no plain file"),
        ("/proc/out.ipynb", "name another file"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_the_run(tmp_path, monkeypatch, output, why):
    monkeypatch.chdir(tmp_path)
    before = notebook(tmp_path / "chapter.ipynb", "1 / 0").read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(execute.papermill, "execute_notebook", None)
    with pytest.raises(
        ValueError, match=rf"^output = {re.escape(output.removeprefix('./'))}: .*{why}"
    ):
        execute.execute(Path("chapter.ipynb"), Path(output), "laptop", {})
    assert (tmp_path / "chapter.ipynb").read_bytes() == before


def test_what_a_dead_process_left_beside_a_result_goes(tmp_path):
    here = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = f".running-{here}-{os.getpid()}-x"
    stale = f".running-{here}-{dead.pid}-x"
    elsewhere = f".running-of-another-host-{dead.pid}-x"
    for name in (alive, stale, elsewhere):
        (tmp_path / name).mkdir()
    with execute.beside(tmp_path / "out.ipynb", "running") as scratch:
        assert scratch.parent == tmp_path
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {alive, elsewhere, scratch.name}
    assert not scratch.exists()


def test_a_disk_that_is_full_is_named(tmp_path):
    why = r"No space left on device: .*out\.ipynb"
    with (
        pytest.raises(OSError, match=why),
        execute.beside(tmp_path / "out.ipynb", "running"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chapter_that_is_told_to_end_leaves_nothing(tmp_path, number):
    notebook(tmp_path / "chapter.ipynb", "import time", "open('begun', 'w')", "time.sleep(99)")
    command = [sys.executable, "-m", "companion.cli", "chapter", "chapter.ipynb", "out.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "chapter.ipynb"]


@pytest.mark.slow
def test_the_readers_own_modules_settings_and_flags_stay_out(tmp_path):
    """A random.py in the folder, assertions turned off, a look of the reader's own for figures."""
    for name in ("random", "typing", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the reader's own')")
    (tmp_path / "matplotlibrc").write_text("path.sketch: 1, 100, 2\ntext.usetex: True")
    shown = """
import json, matplotlib.pyplot as plt, pandas as pd
from companion import figures
figures.use_style()
figures.plot(pd.DataFrame({"a": [1, 2, 3], "b": [1.0, 2, 3]}), "x", "a", "b", see="q")
print(json.dumps([plt.rcParams["text.usetex"], plt.rcParams["path.sketch"], n, __debug__]))
"""
    notebook(tmp_path / "chapter.ipynb", shown)
    program = "from companion.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, "chapter", "chapter.ipynb", "out.ipynb"]
    foreign = {"PYTHONPATH": str(ROOT / "src"), "PYTHONOPTIMIZE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | foreign, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "out.ipynb") == [False, None, 3, True]
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    assert "image/png" in outputs[0].data


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="runs as root only")
def test_a_read_only_folder_is_named_in_one_line(tmp_path):
    notebook(tmp_path / "chapter.ipynb", "1 / 0")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    command = [sys.executable, "-m", "companion.cli", "chapter", "chapter.ipynb", "out.ipynb"]
    if os.geteuid() == 0:
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        readable = subprocess.run([*nobody, sys.executable, "-c", ""], capture_output=True)
        if readable.returncode:
            pytest.skip("this Python is not readable for another user")
        command = [*nobody, *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "headbound: output = out.ipynb: Permission denied; name another file\n"


PARAMETERS = (
    "n = 3\nshare = 0.5\nname = 'x'\nsizes = [1, 2]\nwhole = False\nsuite_options = {'steps': 1}"
)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("share", "1e-3", 0.001),
        ("share", 1, 1.0),
        ("n", "12", 12),
        ("name", "160", "160"),
        ("name", "12345e6", "12345e6"),
        ("sizes", "[8, 16]", [8, 16]),
        ("whole", "true", True),
        ("suite_options", "{steps: 40}", {"steps": 40}),
        ("n", "010", 10),
    ],
)
def test_text_is_read_as_the_parameters_own_type(tmp_path, name, text, value):
    path = notebook(tmp_path / "a.ipynb", parameters=PARAMETERS)
    fitted = execute.check_parameters(path, {name: text})
    assert fitted == {name: value}
    assert type(fitted[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("share", "0.8.0", "a: share = '0.8.0': must be of type float, like 0.5"),
        ("sizes", "0.5", r"a: sizes = '0.5': must be of type list, like \[1, 2\]"),
        ("n", "1e-3", "a: n = '1e-3': must be of type int, like 3"),
        ("share", "nan", "a: share = 'nan': must be a finite number"),
        ("name", 3, "a: name = 3: must be of type str, like 'x'"),
        ("suite_options", {"step": 40}, "a: suite_options: .*'step' was unexpected"),
        ("suite_options", {"steps": 0}, "a: suite_options.steps: 0 is less than the minimum of 1"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(tmp_path, name, text, line):
    path = notebook(tmp_path / "notebooks" / "a.ipynb", parameters=PARAMETERS)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    with pytest.raises(ValueError, match=line):
        execute.check_parameters(path, {name: text})


@pytest.mark.slow
def test_a_kernel_that_is_killed_is_told_in_one_line(tmp_path):
    notebook(tmp_path / "chapter.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = run(tmp_path, "chapter", "chapter.ipynb", "out.ipynb")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("headbound: chapter: its kernel was killed")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["chapter.ipynb"]


def test_braces_in_a_path_are_no_parameters(tmp_path):
    notebook(tmp_path / "a.ipynb", parameters=PARAMETERS)
    (tmp_path / "a{b}").mkdir()
    execute.execute(tmp_path / "a.ipynb", tmp_path / "a{b}" / "{x}.ipynb", "laptop", {"n": 7})
    made = nbformat.read(tmp_path / "a{b}" / "{x}.ipynb", as_version=4)
    assert execute.parameters(made)["n"] == 7


@pytest.mark.parametrize(
    "content", [b"- 01_one", b"01_one: 5", b"01_one: [", b"01_one: {a: \xff}", b"text"]
)
def test_a_preset_that_is_none_is_named(tmp_path, content):
    (tmp_path / "small.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"small.yaml: it must give the parameters"):
        build.read_preset(tmp_path / "small.yaml")


def test_an_empty_preset_names_no_chapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    for content, told in {"": "it names none", "99_no: {}": "99_no"}.items():
        (tmp_path / "presets" / "small.yaml").write_text(content)
        with pytest.raises(ValueError, match=f"small.yaml: no such chapter .{told}"):
            build.names("small")


def test_a_preset_gives_a_chapter_its_values_and_another_notebook_none(tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.yaml").write_text("01_one: {n: 3}\n02_two: {}\n")
    notebooks = tmp_path / "notebooks"
    assert execute.of_preset(notebooks / "01_one.ipynb", "small") == {"n": 3}
    assert execute.of_preset(notebooks / "02_two.ipynb", "small") == {}
    assert execute.of_preset(notebooks / "03_three.ipynb", "small") == {}
    with pytest.raises(ValueError, match="PRESET = large: must be one of small"):
        execute.of_preset(notebooks / "01_one.ipynb", "large")
    assert execute.of_preset(tmp_path / "alone" / "notebooks" / "01_one.ipynb", "large") == {}
