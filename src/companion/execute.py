"""One chapter: check its parameters, execute it with papermill, keep the result only when it is whole."""

import argparse
import ast
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config


def literals(source: str) -> dict[str, Any]:
    """The names that a cell sets and their values, which are plain literals. (papermill's own reading of a cell
    breaks off a literal at the end of its first line.)"""
    lines = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Every parameter given exists in the notebook, with the type of its default.

    papermill itself only logs an unknown parameter and goes on.

    **Raises:** `ValueError` naming the parameter and what would fit.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    defaults = literals(
        next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    )
    for name, value in parameters.items():
        if name not in defaults:
            raise ValueError(
                f"{notebook.stem}: unknown parameter {name!r}; it has {', '.join(defaults)}"
            )
        default = defaults[name]
        fits = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if default is not None and not fits:
            expected = type(default).__name__
            raise ValueError(
                f"{notebook.stem}: {name} = {value!r}: must be of type {expected}, like {default!r}"
            )


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the cells' sources, the parameters papermill injected left out: tells whether a result is stale."""
    cells = [
        c.source for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])
    ]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def commit() -> str:
    """The commit of this checkout, and whether anything differs from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=, changed"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown (no git)"
    return told.stdout.strip() if told.returncode == 0 else "unknown (not a git checkout)"


def describe_figures(notebook: nbformat.NotebookNode) -> None:
    """Move captions and alt texts from the outputs, where code computed them, to where myst-nb reads them."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("companion", {})
            if "alt" in about:
                figure = {"caption": about["caption"], "name": about["name"]}
                cell.metadata["mystnb"] = {"figure": figure, "image": {"alt": about["alt"]}}


def execute(notebook: Path, output: Path, preset: str, parameters: dict[str, Any]) -> None:
    """Execute a notebook into `output`, which appears only when every cell has run.

    **Raises:** `ValueError` for bad parameters, `PapermillExecutionError` for a cell that failed.
    """
    if not notebook.is_file():
        raise ValueError(f"notebook = {notebook}: no such file")
    check_parameters(notebook, parameters)
    if preset != "laptop":  # laptop is what the notebooks say themselves
        parameters = {"preset": preset, **parameters}
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = {"dir": output.parent, "prefix": ".running-"}
    with tempfile.TemporaryDirectory(**beside) as scratch, tempfile.TemporaryDirectory() as sockets:
        finished = Path(scratch) / output.name
        # The kernel listens on no network port, and kernels of several chapters share no socket.
        local_only = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        papermill.execute_notebook(
            notebook,
            finished,
            parameters,
            kernel_name="python3",
            progress_bar=False,
            config=local_only,
        )
        content = nbformat.read(finished, as_version=4)
        describe_figures(content)
        source = source_hash(nbformat.read(notebook, as_version=4))
        made = {"preset": preset, "source": source, "commit": commit()}
        content.metadata["companion"] = {**content.metadata.get("companion", {}), **made}
        nbformat.write(content, finished)
        finished.replace(output)


def report_failure(notebook: Path, work: Callable[[], None]) -> int:
    """Do the work of a command line: its exit status, and one clear line on standard error for what went wrong."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        work()
    except PapermillExecutionError as error:
        print(f"headbound: {notebook.stem}: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"headbound: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON object")
    asked = parser.parse_args()
    work = partial(execute, asked.notebook, asked.output, asked.preset, asked.parameters)
    return report_failure(asked.notebook, work)


if __name__ == "__main__":
    sys.exit(main())
