"""What learners are handed: exercises in three grades, solutions that run, hints that fit."""

import ast
import contextlib
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import jsonschema
import numpy as np
import pace
import pytest
import yaml
from docutils.nodes import make_id
from hypothesis import given
from hypothesis import strategies as st

import exercises
from companion import execute
from companion.exercises import mistakes
from headbound.measure import ngrams
from headbound.train import changes

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
SOLUTIONS = ("solutions", "project_solutions")  # pages that an instructor can leave out
GRADES = ("Warm-up", "Standard", "Project")
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
PAGES += sorted([*(ROOT / "book").glob("*.md.j2"), *(ROOT / "book").glob("lab/*.md")])
PROSE = {path: path.read_text("utf-8") for path in PAGES}
PLACE = re.compile(r"\{\{ figure\(\"([\w-]+)\"\) \}\}")


def exercise(name: str):
    return import_module(f"exercises.{name}")


def exercises_cell(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    assert cells[-2]["id"] == "exercises", (
        f"{path.name}: the cell before the last, with the id 'exercises', has them"
    )
    return "".join(cells[-2]["source"])


def answer(capsys, name: str, function) -> str:
    exercises.check(name, function)
    return capsys.readouterr().out.strip().removeprefix(f"{name}: ")


def exercises_of(path: Path) -> dict[str, tuple[str, str]]:
    """Label → title and text of a chapter's exercises."""
    found = {}
    for _, kind, title, body in DIRECTIVE.findall(exercises_cell(path)):
        if kind == "exercise":
            found[re.search(r":label: (\S+)", body)[1]] = (title, body)
    return found


def solved(text: str) -> dict[str, str]:
    """Label → text of the solutions on a page."""
    return {label: body for _, kind, label, body in DIRECTIVE.findall(text) if kind == "solution"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_has_exercises_in_three_grades_each_with_its_time_and_a_hint(path):
    titles = [title for title, _ in exercises_of(path).values()]
    grades = [title.split(":")[0] for title in titles]
    assert set(grades) == set(GRADES)
    assert grades == sorted(grades, key=GRADES.index)
    for title in titles:
        assert re.search(r", (\d+ min|half a day|a day)$", title), title
    assert exercises_cell(path).count("```{admonition} Hint\n:class: tip dropdown") == len(titles)


def test_solutions_are_on_pages_of_their_own_that_the_contents_can_leave_out():
    pages = {name: solved(PROSE[ROOT / "book" / f"{name}.md"]) for name in SOLUTIONS}
    asked = {label: title for path in NOTEBOOKS for label, (title, _) in exercises_of(path).items()}
    projects = [label for label, title in asked.items() if title.startswith("Project")]
    assert sorted(pages["project_solutions"]) == sorted(projects)
    assert sorted(pages["solutions"]) == sorted(set(asked) - set(projects))
    assert all(":class: dropdown" in body for page in pages.values() for body in page.values())
    for path in NOTEBOOKS:
        assert not solved(exercises_cell(path)), f"{path.name}: a solution stands in the chapter"
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    everything = "\n".join([*PROSE.values(), *map(exercises_cell, NOTEBOOKS)])
    for name in SOLUTIONS:
        assert len(re.findall(rf"^ *- file: {name}$", contents, re.MULTILINE)) == 1
        # A link to a page that is left out would stop the build.
        assert not re.search(rf"(?:\{{doc\}}`[^`]*|\]\()/?{name}\b", everything), name


SOLVED = {
    label: body
    for name in SOLUTIONS
    for label, body in solved(PROSE[ROOT / "book" / f"{name}.md"]).items()
}


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in SOLVED if CODE.search(SOLVED[label])])
@pytest.mark.usefixtures("one_thread")
def test_the_solutions_run_and_pass_their_checks(label, monkeypatch):
    monkeypatch.setattr(changes, "ARMS", dict(changes.ARMS))  # one of them adds an arm
    for code in CODE.findall(SOLVED[label]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, label, "exec"), {})
        for name in re.findall(r'exercises\.check\("(\w+)"', code):
            assert f"{name}: correct\n" in printed.getvalue()


def test_every_check_that_is_asked_for_is_solved():
    for path in NOTEBOOKS:
        for label, (_, body) in exercises_of(path).items():
            asked = re.findall(r'exercises\.check\("(\w+)"', body)
            assert all(f'exercises.check("{name}"' in SOLVED[label] for name in asked), label


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


def test_the_deck_names_figures_that_exist():
    sources = "".join(
        "".join(c["source"]) for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"]
    )
    places = PLACE.findall(PROSE[ROOT / "book" / "slides.md.j2"])
    assert len(places) > 10
    for name in places:
        assert f'"{name}"' in sources


def test_no_prose_counts_chapters_that_a_new_one_would_shift():
    counted = re.compile(r"(?<!--)(?<!headbound )\bchapters? \d", re.IGNORECASE)
    for path, text in PROSE.items():
        assert not counted.search(text), f"{path.name}: name the chapter, with a link"
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
            assert not counted.search(text), f"{path.name}: name the chapter, with a link"


def headings(path: Path) -> set[str]:
    """The places of a chapter that a link can name: its headings, as Sphinx names them."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    titles = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    return {make_id(re.sub(r"[$`*’']", "", title)) for title in titles}


QUIZ_SCHEMA = {
    "type": "object",
    "additionalProperties": {
        "type": "array",
        "minItems": 3,
        "maxItems": 3,
        "items": {
            "type": "object",
            "required": ["ask", "choices", "right", "why", "section"],
            "additionalProperties": False,
            "properties": {
                "ask": {"type": "string", "pattern": r"\?$"},
                "choices": {
                    "type": "array",
                    "minItems": 3,
                    "uniqueItems": True,
                    "items": {"type": "string", "pattern": r"\.$"},
                },
                "right": {"type": "integer", "minimum": 1},
                "why": {"type": "string", "pattern": r"^[^.]*\.$"},
                "section": {"type": "string"},
            },
        },
    },
}
QUIZ = yaml.safe_load((ROOT / "book" / "quiz.yaml").read_text("utf-8"))


def test_every_chapter_has_three_questions_with_a_reason_and_its_section():
    jsonschema.validate(QUIZ, QUIZ_SCHEMA)
    assert set(QUIZ) == {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        for question in QUIZ[path.stem]:
            assert question["right"] <= len(question["choices"]), question
            assert question["section"] in headings(path), (path.stem, question["section"])


def test_the_right_answers_of_the_quiz_have_no_habit():
    questions = [question for asked in QUIZ.values() for question in asked]
    places = [question["right"] for question in questions]
    assert max(places.count(place) for place in (1, 2, 3)) <= 0.4 * len(places)
    longest = [
        max(range(len(q["choices"])), key=lambda i: len(q["choices"][i])) + 1 == q["right"]
        for q in questions
    ]
    assert sum(longest) <= 0.5 * len(questions), "the longest choice gives the answer away"


def test_a_question_that_lacks_a_reason_or_asks_nothing_is_found():
    sound = {"ask": "Why?", "choices": ["A.", "B.", "C."], "right": 1, "why": "So.", "section": "a"}
    jsonschema.validate({"01_a": [sound] * 3}, QUIZ_SCHEMA)
    for fault in ({"why": "Two. Sentences."}, {"ask": "Because."}, {"choices": ["A."]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"01_a": [sound, sound, sound | fault]}, QUIZ_SCHEMA)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_chapter_leads_to_its_questions(path):
    assert f"<quiz-{path.stem}>`" in exercises_cell(path)


SLOT = re.compile(r"^\| (\d+)–(\d+) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
SYLLABUS = ROOT / "book" / "syllabus.md"


def always_drawn() -> dict[str, str]:
    """Figure → chapter, of the figures that a chapter draws whatever data it has."""
    found = {}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            for statement in ast.parse("".join(cell["source"])).body:
                if isinstance(statement, ast.Expr):
                    names = re.findall(r"'(fig-[\w-]+)'", ast.unparse(statement))
                    found |= dict.fromkeys(names, path.stem)
    return found


def test_every_slot_of_a_lecture_has_its_goal_and_its_figure():
    drawn = always_drawn()
    assert "fig-pythia-curves" not in drawn, "drawn with a sweep only"
    lectures = PROSE[SYLLABUS].split("\n## Lecture ")[1:]
    assert len(lectures) == 3
    for lecture in lectures:
        part = lecture.split("\n## ")[0]
        slots = SLOT.findall(part)
        times = [(int(start), int(end)) for start, end, *_ in slots]
        assert [start for start, _ in times] == [0, *(end for _, end in times[:-1])]
        assert times[-1][1] == 90
        linked = set(re.findall(r"chapters/(\w+)", part))
        for _, _, goal, _, figure in slots:
            assert len(goal.split()) > 4
            (name,) = re.findall(r"\{numref\}`(fig-[\w-]+)`", figure)
            assert drawn[name] in linked, name


def slides() -> dict[str, str]:
    parts = PROSE[ROOT / "book" / "slides.md.j2"].split("\n## ")[1:]
    return {title: body for title, _, body in (part.partition("\n") for part in parts)}


def test_a_slide_has_at_most_one_figure_and_few_words():
    deck = slides()
    assert len(deck) > 15
    for title, body in deck.items():
        assert body.count("figure(") <= 1, title
        words = re.sub(
            r"\$\$.*?\$\$|\{%.*?%\}|\{\{.*?\}\}|\{[\w:]+\}`.*?`", " ", body, flags=re.DOTALL
        )
        assert len(re.findall(r"[\w$\\]+(?:['’-]\w+)*", words)) <= 25, title


def test_every_slot_of_a_lecture_is_on_a_slide():
    shown = PROSE[ROOT / "book" / "slides.md.j2"]
    for *_, figure in SLOT.findall(PROSE[SYLLABUS]):
        (name,) = re.findall(r"`(fig-[\w-]+)`", figure)
        assert f'figure("{name}")' in shown, name


FASTEST, SLOWEST = 8, 28  # words of prose a visible line of code; the aim is 10 to 20
BEFORE = {"cells": 5, "lines": 22, "prose": 390}  # at most, before the first result


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_keeps_its_pace(path):
    found = pace.pace(path)
    assert FASTEST <= found.ratio <= SLOWEST, found
    assert found.longest < 30, found
    assert all(getattr(found, name) <= most for name, most in BEFORE.items()), found


def test_the_pace_counts_what_a_page_shows(tmp_path):
    texts = [
        ("markdown", "# A title\n\nFour words of prose: $x^2$ and `code`.", []),
        ("code", "seed = 0", ["parameters"]),
        ("code", "a = 1\n\n# why\nb = 2", []),
        ("code", "chapter.figure(run, frame)", ["hide-input"]),
        ("markdown", "Exercises are not counted.", []),
    ]
    cells = [
        {"id": str(i), "cell_type": kind, "source": [text], "metadata": {"tags": tags}}
        for i, (kind, text, tags) in enumerate(texts)
    ]
    cells[-1]["id"] = "exercises"
    (tmp_path / "01_small.ipynb").write_text(json.dumps({"cells": cells}))
    # "A title" and "Four words of prose and code".
    assert pace.pace(tmp_path / "01_small.ipynb") == (8, 2, 4.0, 3, 2, 8, 2)
