"""One chapter: check its parameters, execute it, keep the result only when it is whole."""

import ast
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import nbformat
import papermill
import psutil
import yaml
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from companion.build import read_preset
from companion.words import markdown

SCHEMA = "presets/schema.json"  # of parameters, by their names; beside the folder of notebooks
# A kernel that is told to end while it waits would say so, after the line that names the failure.
KERNEL = """
import logging
from ipykernel.kernelapp import launch_new_instance
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
launch_new_instance()
"""
# What a reader sets for other Pythons: it would silence assertions, add output, or hide figures.
FOREIGN = ("PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONDEVMODE", "MPLBACKEND")
SOCKETS = "/tmp"  # a socket's path must be short, and TMPDIR may be long


class ChapterError(RuntimeError):
    """A notebook that could not be executed to its end, in one line with its name."""


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """A notebook's parameters: the plain values that its cells of them set, the last one's count.

    These cells are tagged `parameters` or, by papermill, `injected-parameters`.
    """
    values = {}
    for cell in notebook.cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            lines = [line for line in ast.parse(cell.source).body if isinstance(line, ast.Assign)]
            values |= {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    return values


def outputs(cells: Iterable[nbformat.NotebookNode]) -> Iterator[tuple]:
    """Each output of these cells with its cell, and what `companion.chapter` keeps with it."""
    for cell in cells:
        for output in cell.get("outputs", []):
            yield cell, output, output.get("metadata", {}).get("companion", {})


def defaults(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook that has not run.

    **Raises:** `ValueError` for a file that is no notebook, or has no cell of parameters.
    """
    if not notebook.is_file():
        raise ValueError(f"notebook = {notebook}: no such file")
    try:
        found = parameters(nbformat.read(notebook, as_version=4))
    except Exception as error:  # nbformat has a kind for each way of being none
        why = f"not a notebook whose parameters are plain values ({type(error).__name__})"
        raise ValueError(f"notebook = {notebook}: {why}") from error
    if not found:
        raise ValueError(f"notebook = {notebook}: no cell of it is tagged `parameters`")
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the notebook takes them: each exists, and has the type of its default.

    Text is read as the default's type, so that `1e-3` is a number and a folder `160` is none. What
    its value may hold says `presets/schema.json`, where that names it.

    **Raises:** `ValueError` naming the parameter and what would fit.
    """
    known = defaults(notebook)
    fitting = {}
    for name, value in parameters.items():
        if name not in known:
            has = ", ".join(known)
            raise ValueError(f"{notebook.stem}: unknown parameter {name!r}; it has {has}")
        fitting[name] = _fitted(f"{notebook.stem}: {name}", value, known[name])
    schema = _book(notebook) / SCHEMA
    if schema.exists():
        rules = jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))
        for error in rules.iter_errors(fitting):
            where = ".".join(map(str, error.path))
            raise ValueError(f"{notebook.stem}: {where}: {error.message}")
    return fitting


def _fitted(name: str, given: Any, default: Any) -> Any:
    value = given
    if isinstance(given, str) and not isinstance(default, str):
        kind = type(default) if type(default) in (int, float) else yaml.safe_load
        with suppress(ValueError, yaml.YAMLError):
            value = kind(given)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        expected = type(default).__name__
        raise ValueError(f"{name} = {given!r}: must be of type {expected}, like {default!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {given!r}: must be a finite number")
    return value


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the cells' sources, injected parameters left out: is a result stale?"""
    injected = "injected-parameters"
    cells = [c.source for c in notebook.cells if injected not in c.metadata.get("tags", [])]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def commit() -> str:
    """The commit of this checkout, and whether anything differs from it."""
    command = ["git", "describe", "--always", "--dirty=, changed"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return told.stdout.strip()


def describe_figures(notebook: nbformat.NotebookNode) -> None:
    """Move captions and alt texts from the outputs to where myst-nb reads them."""
    for cell, _, about in outputs(notebook.cells):
        if "alt" in about:
            figure = {"caption": markdown(about["caption"]), "name": about["name"]}
            cell.metadata["mystnb"] = {"figure": figure, "image": {"alt": about["alt"]}}


def _book(notebook: Path) -> Path:
    """The folder of the book that a notebook is of."""
    return Path(os.path.realpath(notebook)).parent.parent


def of_preset(notebook: Path, preset: str) -> dict[str, Any]:
    """What a preset changes of a chapter: nothing where the book has no presets.

    **Raises:** `ValueError` for a preset that is not among those that the book has.
    """
    presets = {path.stem: path for path in _book(notebook).glob("presets/*.yaml")}
    if not presets:
        return {}
    if preset not in presets:
        raise ValueError(f"PRESET = {preset}: must be one of {', '.join(sorted(presets))}")
    return read_preset(presets[preset]).get(notebook.stem, {})


def execute(notebook: Path, output: Path, preset: str, parameters: dict[str, Any]) -> None:
    """Execute a notebook into `output`, which appears only when every cell has run.

    **Raises:** `ValueError` for bad parameters or a bad place, before anything runs;
    `ChapterError` for a cell that failed, or a kernel that was killed.
    """
    parameters = check_parameters(notebook, parameters)
    if preset != "laptop":  # laptop is what the notebooks say themselves
        parameters = {"preset": preset, **parameters}
    output = output.expanduser()
    if os.path.realpath(output) == os.path.realpath(notebook):
        raise ValueError(f"output = {output}: it is the notebook itself; name another file")
    check_place(output)
    with beside(output, "running") as scratch, _own_kernel() as kernel:
        finished = scratch / output.name
        _run(notebook, finished, parameters, kernel)
        content = nbformat.read(finished, as_version=4)
        describe_figures(content)
        source = source_hash(nbformat.read(notebook, as_version=4))
        made = {"preset": preset, "source": source, "commit": commit()}
        content.metadata["companion"] = {**content.metadata.get("companion", {}), **made}
        nbformat.write(content, finished)
        finished.replace(output)


def _run(notebook: Path, finished: Path, parameters: dict[str, Any], kernel: Config) -> None:
    for talker in ("papermill", "traitlets"):  # what they say of a dead kernel is said here
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    how = {"kernel_name": "python3", "progress_bar": False, "config": kernel}
    # papermill fills braces in a path with the parameters.
    places = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, finished)]
    try:
        papermill.execute_notebook(*places, parameters, **how)
    except PapermillExecutionError as error:
        raise ChapterError(f"{notebook.stem}: {error.ename}: {error.evalue}") from error
    except RuntimeError as error:  # the kernel's, while it works or before it has answered once
        why = f"its kernel was killed or did not answer ({error}); is there memory enough?"
        raise ChapterError(f"{notebook.stem}: {why}") from error


def check_place(place: Path) -> None:
    """Find out before long work that a result can be written there; else a `ValueError`."""
    if place.exists() and not place.is_file():
        what = "a folder" if place.is_dir() else "no plain file"
        raise ValueError(f"output = {place}: it is {what}; name a file")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise ValueError(f"output = {place}: {error.strerror}; name another file") from error


@contextmanager
def beside(output: Path, kind: str) -> Iterator[Path]:
    """A hidden folder beside a result, for what becomes it; what a dead process left there goes."""
    here = f".{kind}-{socket.gethostname()}"
    for left in output.parent.glob(f".{kind}-*"):
        host, _, process = left.name.rpartition("-")[0].rpartition("-")
        if host == here and process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{here}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as scratch:
        try:
            yield Path(scratch)
        except OSError as error:  # a full disk does not say where
            if error.filename is None and error.errno is not None:
                error.filename = str(output)
            raise


def write_whole(place: Path, content: str) -> None:
    """Write a file that appears only when it is whole."""
    with beside(place, "writing") as scratch:
        written = scratch / place.name
        written.write_text(content, encoding="utf-8")
        written.replace(place)


@contextmanager
def _own_kernel() -> Iterator[Config]:
    """A kernel of this environment's Python that nothing of the reader's own settings reaches.

    It finds its kernel file, its configuration and its start-up files in an empty folder. It
    listens on no network port where `SOCKETS` can be written.
    """
    place = SOCKETS if os.access(SOCKETS, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as scratch, mock.patch.dict(os.environ):
        folder = Path(scratch) / "kernels" / "python3"
        folder.mkdir(parents=True)
        quiet = ["--log-level=CRITICAL", "--InteractiveShellApp.ignore_cwd=True"]
        # -P and ignore_cwd: a reader's own random.py in this folder is not what a chapter imports.
        argv = [sys.executable, "-P", "-c", KERNEL, "-f", "{connection_file}", *quiet]
        spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ |= dict.fromkeys(("JUPYTER_PATH", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"), scratch)
        os.environ |= {"JUPYTER_RUNTIME_DIR": f"{scratch}/run", "PYTHONUTF8": "1"}
        for name in FOREIGN:
            os.environ.pop(name, None)
        if not os.access(Path.home(), os.W_OK):
            os.environ.setdefault("MPLCONFIGDIR", scratch)
        sockets = {"transport": "ipc", "ip": f"{scratch}/socket"} if place else {}
        yield Config(KernelManager=sockets)


def report_failure(name: str, work: Callable[[], int | None]) -> int:
    """Do the work of a command: its exit status, and one clear line for a failure."""
    try:
        return work() or 0
    except ChapterError as error:
        status = 1
        why = str(error)
    except (OSError, ValueError) as error:
        status = 2
        why = str(error)
        if getattr(error, "filename", None):
            why = f"{error.filename}: {error.strerror}"
    except Exception as error:
        if os.environ.get("HEADBOUND_DEBUG"):
            raise
        status = 1
        why = f"{name}: {type(error).__name__}: {error} (HEADBOUND_DEBUG=1 shows where)"
    print("headbound:", *why.split(), file=sys.stderr)
    return status
