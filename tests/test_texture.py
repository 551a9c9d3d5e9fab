"""The code stays readable: density, lengths of lines and packages, who imports whom."""

import ast
import json
import re
from pathlib import Path
from string import Formatter

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Ratchets: what stands today, in lines. The aim is 3,100, 1,300 and 550.
PACKAGES = {"src/headbound": 5872, "src/companion": 2237, "workflow": 923}
DENSITY = 15  # syntax nodes a code line, in functions of MINIMUM lines or more
MINIMUM = 4
WIDTH = 100
NOTEBOOK_WIDTH = 84  # what a page shows
NOTEBOOK_LINES = 1812  # code lines of all notebooks: a ratchet too; the aim was 1,900
NAMES = 133  # public ones of headbound: a ratchet too, the aim is 95


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def density(function: ast.FunctionDef, lines: list[str]) -> float | None:
    """Syntax nodes a code line of a function's body without its docstring; None for a short one."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return None
    text = [line.strip() for line in lines[body[0].lineno - 1 : body[-1].end_lineno]]
    code = [line for line in text if line and not line.startswith("#")]
    nodes = sum(1 for statement in body for _ in ast.walk(statement))
    return nodes / len(code) if len(code) >= MINIMUM else None


def densities(path: Path) -> list[tuple[float, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    found = [(density(function, lines), f"{path.name}: {function.name}") for function in functions]
    return [(value, name) for value, name in found if value is not None]


def notebook_code() -> dict[str, list[str]]:
    code = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code[path.name] = [line for text in texts for line in text.splitlines()]
    return code


def test_density_counts_nodes_a_line():
    source = (
        'def f(x):\n    """Said."""\n    a = x\n    b = a\n\n    # why\n    c = b\n    return c\n'
    )
    (function,) = ast.parse(source).body
    # Three assignments of 5 nodes (statement, name, name, two contexts), a return of 3.
    assert density(function, source.splitlines()) == 18 / 4


@pytest.mark.parametrize("package", ["src/headbound", "src/companion", "workflow"])
def test_nine_functions_of_ten_have_room_on_their_lines(package):
    found = sorted(pair for path in sources(package) for pair in densities(path))
    thick = [f"{value:.1f} {name}" for value, name in found if value > DENSITY]
    assert len(thick) <= 0.1 * len(found), thick


@pytest.mark.parametrize("package", ["src/headbound", "src/companion", "workflow"])
def test_lines_fit_on_a_screen(package):
    lines = [
        line
        for path in sources(package)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    wide = [line for line in lines if len(line) > WIDTH]
    assert len(wide) <= 0.02 * len(lines), wide


@pytest.mark.parametrize(("folder", "most"), PACKAGES.items())
def test_a_package_stays_small(folder, most):
    kinds = {".py", ".smk", ".yaml", ""} if folder == "workflow" else {".py"}
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix in kinds and "__pycache__" not in path.parts]
    count = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in texts
    }
    assert sum(count.values()) <= most, count


def test_no_notebook_line_is_cut_off_and_together_they_are_short():
    code = notebook_code()
    wide = {
        name: [line for line in lines if len(line) > NOTEBOOK_WIDTH] for name, lines in code.items()
    }
    assert not any(wide.values()), wide
    count = {name: sum(bool(line.strip()) for line in lines) for name, lines in code.items()}
    assert sum(count.values()) <= NOTEBOOK_LINES, count


def texts(part: object) -> list[str]:
    """All texts in a part of a chapter's file."""
    if isinstance(part, str):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return [text for piece in inner for text in texts(piece)]


@pytest.mark.parametrize("path", sorted((ROOT / "book/words").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_chapters_words_are_used_and_their_braces_name_what_it_has(path):
    code = ast.parse("\n".join(notebook_code()[f"{path.stem}.ipynb"]))
    nodes = list(ast.walk(code))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    said = {node.value for node in nodes if isinstance(node, ast.Constant)}
    text = path.read_text(encoding="utf-8")
    words = yaml.safe_load(text)
    assert len(re.findall(r"^[^\s#]", text, re.MULTILINE)) == len(words), "a key twice"
    assert {key for key in words if "." not in key} <= said
    computed = {key.partition(".")[2] for key in words}  # a finding's own, made in a loop
    for text in texts(words):
        for _, field, _, _ in Formatter().parse(text):
            name = re.match(r"\w*", field or "")[0]
            assert not name or name in names | said | computed, text


def public(path: Path) -> list[str]:
    """The functions, classes and constants that a module offers."""
    names = []
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def test_few_names_are_public():
    modules = [path for path in sources("src/headbound") if path.name != "cli.py"]
    names = [f"{path.stem}.{name}" for path in modules for name in public(path)]
    assert len(names) <= NAMES, len(names)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_companion_knows_nothing_of_this_book():
    for path in sources("src/companion"):
        assert not imported(path) & {"headbound", "sweep", "exercises"}, path


def test_what_measures_knows_nothing_of_the_sweep():
    for path in sources("src/headbound"):
        assert path.name == "cli.py" or "sweep" not in imported(path), path


def test_everything_is_installed_and_nothing_changes_the_path():
    changing = "sys.path" + "."
    for path in [*sources("src"), *sources("workflow"), *sources("tests"), *sources("benchmarks")]:
        assert changing not in path.read_text(encoding="utf-8"), path
    assert not any(changing in line for lines in notebook_code().values() for line in lines)
