"""What learners are handed: exercises in three grades, solutions that run, hints that fit."""

import contextlib
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import exercises
from companion import execute
from companion.exercises import mistakes
from headbound.measure import ngrams

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DIRECTIVE = re.compile(
    r"^(`{3,})\{(exercise|solution)\} *(.*?)\n(.*?)^\1$", re.MULTILINE | re.DOTALL
)
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Not prose: fences and titles, formulas, code, and roles but those of terms.
NO_PROSE = re.compile(
    r"^```(?:python|sh)\n.*?^```$|^(?:#|```|\([\w-]+\)=|:\w+:)[^\n]*$|\$\$.*?\$\$|\$[^$]*\$|(\{[\w:]+\})?`[^`\n]*`",
    re.MULTILINE | re.DOTALL,
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
PAGES += sorted((ROOT / "book").glob("*.md.j2"))
PROSE = {path: path.read_text("utf-8") for path in PAGES}
PLACE = re.compile(r"\{\{ (figure|findings)\(\"([\w-]+)\"\) \}\}")


def exercise(name: str):
    return import_module(f"exercises.{name}")


@pytest.fixture
def one_thread():
    """Matrices this small are slow where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exercises_cell(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    assert cells[-2]["id"] == "exercises", (
        f"{path.name}: the cell before the last, with the id 'exercises', has them"
    )
    return "".join(cells[-2]["source"])


def answer(capsys, name: str, function) -> str:
    exercises.check(name, function)
    return capsys.readouterr().out.strip().removeprefix(f"{name}: ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_has_exercises_in_three_grades_each_with_a_folded_solution(path):
    found = DIRECTIVE.findall(exercises_cell(path))
    titles = [title for _, kind, title, _ in found if kind == "exercise"]
    labels = [
        re.search(r":label: (\S+)", body)[1] for _, kind, _, body in found if kind == "exercise"
    ]
    solved = [title for _, kind, title, _ in found if kind == "solution"]
    grades = [title.split(":")[0] for title in titles]
    assert set(grades) == {"Warm-up", "Standard", "Project"}
    assert grades == sorted(grades, key=["Warm-up", "Standard", "Project"].index)
    assert solved == labels
    assert all(":class: dropdown" in body for _, kind, _, body in found if kind == "solution")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.usefixtures("one_thread")
def test_the_solutions_run_and_pass_their_checks(path):
    text = exercises_cell(path)
    for _, kind, label, body in DIRECTIVE.findall(text):
        for code in CODE.findall(body) if kind == "solution" else []:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{path.stem}, {label}", "exec"), {})
            for name in re.findall(r'exercises\.check\("(\w+)"', code):
                assert f"{name}: correct\n" in printed.getvalue()
    asked = set(re.findall(r'exercises\.check\("(\w+)"', text))
    assert asked == set(re.findall(r'^exercises\.check\("(\w+)"', text, re.MULTILINE)), (
        "asked for and not solved"
    )


def test_every_check_belongs_to_an_exercise():
    asked = {
        name
        for path in NOTEBOOKS
        for name in re.findall(r'exercises\.check\("(\w+)"', exercises_cell(path))
    }
    assert asked == set(exercises.NAMES)


@pytest.mark.parametrize("name", exercises.NAMES)
def test_what_is_right_is_correct_and_each_known_mistake_gets_its_own_hint(name, capsys):
    assert answer(capsys, name, exercise(name).right) == "correct"
    known = mistakes(exercise(name))
    assert len(known) >= 3
    for mistaken in known:
        assert answer(capsys, name, mistaken) == mistaken.__doc__


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: 1 / 0, "your function stopped with ZeroDivisionError: division by zero"),
        (lambda h, i: 0.0, "your function stopped with TypeError"),
        (lambda h: h, r"your result has the shape \(9, 4\), it should have \(\)"),
        (
            lambda h: -2 * exercise("mean_cosine").right(h),
            "your results are -2 times as large",
        ),
        (lambda h: 0.5, "not yet: for .* it should give 0.*, yours gives 0.5"),
        (lambda h: None, "not yet: .* yours gives nan"),
    ],
)
def test_an_unknown_mistake_is_told_from_outside(function, message, capsys):
    assert re.search(message, answer(capsys, "mean_cosine", function).replace("\n", " "))


def test_a_function_that_spoils_its_arguments_spoils_nothing_else(capsys):
    def careless(sigma):
        sigma /= sigma.sum()
        sigma = sigma[sigma > 0]
        return np.log(4) + sigma @ np.log(sigma)

    assert [answer(capsys, "singular_entropy", careless) for _ in range(2)] == ["correct"] * 2


def test_an_exercise_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match="exercise = 'entropy': must be one of correlation_of_changes, "
    ):
        exercises.check("entropy", len)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_the_unbiased_gram_of_the_exercise_is_the_package_s(stream):
    tokens, counts = np.array(stream, np.int32), np.zeros((5, 5))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    package = ngrams.gram(tokens, 2, 5, "contexts", unbiased=True)
    np.testing.assert_allclose(exercise("unbiased_gram").right(counts), package, atol=1e-12)


def test_the_papermill_commands_of_the_book_fit_the_notebooks():
    text = "\n".join([*PROSE.values(), *map(exercises_cell, NOTEBOOKS)])
    lines = re.findall(r"^papermill .*", text.replace("\\\n", " "), re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    assert len(commands) > 5
    for _, notebook, output, *options in commands:
        assert output.endswith(".ipynb")
        assert set(options[::3]) <= {"-p"}
        values = [json.loads(v) if re.fullmatch(r"[\d.]+", v) else v for v in options[2::3]]
        execute.check_parameters(ROOT / notebook, dict(zip(options[1::3], values, strict=True)))


def glossary() -> list[str]:
    blocks = re.findall(
        r"```\{glossary\}\n(.*?)```", (ROOT / "book" / "glossary.md").read_text(), re.DOTALL
    )
    return [line for block in blocks for line in block.splitlines() if line and line[0] != " "]


def test_every_term_is_linked_from_its_first_use():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    files = [chapter["file"] for part in parts for chapter in part["chapters"]]
    paths = [
        ROOT / "notebooks" / f"{Path(file).name}.ipynb"
        for file in files
        if file.startswith("chapters/")
    ]
    cells = [
        cell for path in paths if path.exists() for cell in json.loads(path.read_text())["cells"]
    ]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    text = "\n".join(
        NO_PROSE.sub(lambda found: found[0] if found[1] == "{term}" else " ", part)
        for part in prose
    )
    unlinked = re.sub(r"\{term\}`[^`]*`", lambda found: " " * len(found[0]), text)
    for term in glossary():
        loose = re.escape(term).replace(r"\ ", r"[\s-]+").replace(r"\-", r"[\s-]")
        link = re.search(rf"\{{term\}}`(?:[^`]*<)?{re.escape(term)}>?`", text)
        assert link, f"{term}: in the glossary, and linked from no chapter"
        use = re.search(rf"\b{loose}(?:s|es)?\b", unlinked, re.IGNORECASE)
        assert not use or use.start() > link.start(), (
            f"{term}: used before its link: …{text[use.start() - 60 : use.end() + 40]}…"
        )


def test_the_deck_names_figures_and_chapters_that_exist():
    sources = "".join(
        "".join(c["source"]) for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"]
    )
    places = PLACE.findall(PROSE[ROOT / "book" / "slides.md.j2"])
    assert len(places) > 10
    for kind, name in places:
        assert f'"{name}"' in sources if kind == "figure" else name in {p.stem for p in NOTEBOOKS}


def test_no_prose_counts_chapters_that_a_new_one_would_shift():
    counted = re.compile(r"(?<!--)(?<!headbound )\bchapters? \d", re.IGNORECASE)
    for path, text in PROSE.items():
        assert not counted.search(text), f"{path.name}: name the chapter, with a link"
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
            assert not counted.search(text), f"{path.name}: name the chapter, with a link"
