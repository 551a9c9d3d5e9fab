"""What learners are handed: exercises in three grades, solutions that run, checks whose hints fit the mistake."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headbound import exercises, ngrams

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow"))

import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DIRECTIVE = re.compile(r"^(`{3,})\{(exercise|solution)\} *(.*?)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = {p: p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]}


@pytest.fixture
def one_thread():
    """Matrices this small are slow where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exercises_cell(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    assert cells[-2]["id"] == "exercises", f"{path.name}: the cell before the last, with the id 'exercises', has them"
    return "".join(cells[-2]["source"])


def answer(capsys, name: str, function) -> str:
    exercises.check(name, function)
    return capsys.readouterr().out.strip().removeprefix(f"{name}: ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_has_exercises_in_three_grades_each_with_a_folded_solution(path):
    found = DIRECTIVE.findall(exercises_cell(path))
    titles = [title for _, kind, title, _ in found if kind == "exercise"]
    labels = [re.search(r":label: (\S+)", body)[1] for _, kind, _, body in found if kind == "exercise"]
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
    assert asked == set(re.findall(r'^exercises\.check\("(\w+)"', text, re.MULTILINE)), "asked for and not solved"


def test_every_check_belongs_to_an_exercise():
    asked = {name for path in NOTEBOOKS for name in re.findall(r'exercises\.check\("(\w+)"', exercises_cell(path))}
    assert asked == set(exercises.EXERCISES)


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_what_is_right_is_correct_and_each_known_mistake_gets_its_own_hint(name, capsys):
    right, _, wrong = exercises.EXERCISES[name]
    assert answer(capsys, name, right) == "correct"
    for hint, mistaken in wrong.items():
        assert answer(capsys, name, mistaken) == hint


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: 1 / 0, "your function stopped with ZeroDivisionError: division by zero"),
        (lambda h, i: 0.0, "your function stopped with TypeError"),
        (lambda h: h, r"your result has the shape \(9, 4\), it should have \(\)"),
        (lambda h: -2 * exercises.EXERCISES["mean_cosine"][0](h), "your results are -2 times as large"),
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
    with pytest.raises(ValueError, match="exercise = 'entropy': must be one of late_drop, "):
        exercises.check("entropy", len)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_the_unbiased_gram_of_the_exercise_is_the_package_s(stream):
    tokens, counts = np.array(stream, np.int32), np.zeros((5, 5))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    package = ngrams.gram(tokens, 2, 5, "contexts", unbiased=True).matrix
    np.testing.assert_allclose(exercises.EXERCISES["unbiased_gram"][0](counts) + np.zeros((5, 5)), package, atol=1e-12)


def test_the_papermill_commands_of_the_book_fit_the_notebooks():
    text = "\n".join([*PROSE.values(), *map(exercises_cell, NOTEBOOKS)])
    commands = re.findall(r"^papermill (notebooks/\S+) \S+\.ipynb((?: -p \S+ \S+)*)$", text, re.MULTILINE)
    assert len(commands) == len(re.findall(r"^papermill ", text, re.MULTILINE)) >= 5
    for notebook, options in commands:
        given = re.findall(r"-p (\S+) (\S+)", options)
        numbers = {k: json.loads(v) if re.fullmatch(r"[\d.]+", v) else v for k, v in given}
        execute.check_parameters(ROOT / notebook, numbers)
