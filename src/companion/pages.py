"""The pages that are computed from all chapters together: the templates here, and the book's own.

A book's own template is `book/NAME.md.j2`; it becomes `book/generated/NAME.md`. It may use
`figure("fig-…")`, `findings("01_name")` and the names that `context` gives.

Whatever a template puts into a page is shown as it is: a text that holds Markdown or HTML does
nothing. Only `| safe` lets it through.
"""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader
from markupsafe import Markup

from companion import results
from companion.execute import commit
from companion.results import WORDS, Chapter, Row
from companion.words import markdown, number

BOOK = Path("book")
COMPUTED = ("measured", "status", "figure", "answer", "map")
ABSENT = Markup("*This edition had no data for this.*")
CERTAINTY = {
    "checked": "checked against a published source",
    "recalled": "recalled",
    "ours": "not the paper's",
}
NO_CLAIM = {"", "–", "-", "not given", "no level given"}


def write(chapters: Sequence[Chapter], preset: str, folder: Path) -> None:
    """Write every computed page and the claims as data into a folder of the book."""
    extra = folder / "extra"  # goes to the root of the site
    extra.mkdir(parents=True, exist_ok=True)
    data = results.published(preset, chapters, commit())
    (extra / "claims.json").write_text(json.dumps(data, ensure_ascii=False, indent=1), "utf-8")
    schema = files("companion").joinpath("claims.schema.json").read_text("utf-8")
    (extra / "claims.schema.json").write_text(schema, "utf-8")
    about = context(chapters, preset)
    if about["front"]:
        (extra / "front.png").write_bytes(about["front"][1]["png"])
    templates = environment(chapters, folder)
    names = [f"{name}.md" for name in COMPUTED]
    names += [path.stem for path in sorted(BOOK.glob("*.md.j2"))]
    for name in names:
        page = templates.get_template(f"{name}.j2").render(about)
        (folder / name).write_text(page, "utf-8")


def context(chapters: Sequence[Chapter], preset: str) -> dict[str, Any]:
    """The names that templates have."""
    claims = results.load_claims()
    sections = results.join(claims, chapters)
    changes = results.changes(preset, chapters)
    answered = {f["key"] for _, rows in sections for row in rows for _, f in row.pairs}
    figures = {name: (c, figure) for c in chapters for name, figure in c.figures.items()}
    return {
        "answered": {chapter.name: chapter.answer for chapter in chapters},
        "beyond": [(c, f) for c in chapters for f in c.findings if f["key"] not in answered],
        "certainty": CERTAINTY,
        "changes": changes,
        "chapters": chapters,
        "commit": commit(),
        "exempt": results.EXEMPT,
        "found": {f["key"]: f for chapter in chapters for f in chapter.findings},
        "front": next((figures[name] for name in claims["front"] if name in figures), None),
        "preset": preset,
        "sections": sections,
        "signed": {change.key: change.signed for change in changes},
        "words": WORDS,
    }


def environment(chapters: Sequence[Chapter], folder: Path) -> Environment:
    """Templates whose every expression becomes text that shows as it is."""
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(BOOK), PackageLoader("companion")]),
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for verb in (badge, cited, counts, figure_link, having, judged, last_sentence, link):
        made.filters[verb.__name__] = verb
    for verb in (number, of_the_paper, quoted, scale, tested, versions):
        made.filters[verb.__name__] = verb
    figures = {name: figure for chapter in chapters for name, figure in chapter.figures.items()}
    by_name = {chapter.name: chapter for chapter in chapters}

    def figure(name: str) -> Markup:
        if name not in figures:
            return ABSENT
        (folder / f"{name}.png").write_bytes(figures[name]["png"])
        page = made.get_template("figure_on_slide.md.j2")
        return Markup(page.render(name=name, figure=figures[name]))

    def findings(name: str) -> Markup:
        every = by_name[name].findings if name in by_name else []
        told = [finding for finding in every if finding["verdict"] != "not testable here"]
        page = made.get_template("findings_on_slide.md.j2")
        return Markup(
            page.render(tested=told, untested=len(every) - len(told)) if every else ABSENT
        )

    made.globals |= {"figure": figure, "findings": findings}
    return made


def badge(word: str) -> Markup:
    """A verdict, readable without its colour."""
    return Markup(f"[{word}]{{.verdict .{word.replace(' ', '-')}}}")


def link(chapter: Chapter) -> Markup:
    """A link to a chapter's page."""
    return Markup(f"{{doc}}`{chapter.short} </chapters/{chapter.name}>`")


def figure_link(name: str) -> Markup:
    """A link to a figure that a chapter made."""
    return Markup(f"{{ref}}`figure <{name}>`")


def quoted(text: str) -> Markup:
    """A text as the value of a directive's option."""
    return Markup(json.dumps(text, ensure_ascii=False))


def last_sentence(caption: str) -> str:
    """What is to be seen, without what is drawn."""
    return caption.rsplit(". ", 1)[-1]


def scale(chapter: Chapter) -> str:
    """On what a chapter's numbers rest: preset, model, sample sizes."""
    samples = [f"{k[8:]} {v}" for k, v in chapter.provenance.items() if k.startswith("sample: ")]
    model = [str(chapter.parameters["model"])] if chapter.parameters.get("model") else []
    return ", ".join([chapter.provenance.get("preset", "unknown"), *model, *samples[:2]])


def versions(chapters: Sequence[Chapter]) -> dict[str, list[str]]:
    """Each package with the versions that the chapters ran with."""
    used: dict[str, set[str]] = {}
    for chapter in chapters:
        for name, version in chapter.packages.items():
            used.setdefault(name, set()).add(version)
    return {name: sorted(used[name]) for name in sorted(used)}


def having(rows: Sequence[Row], word: str) -> list[Row]:
    """The rows with this verdict."""
    return [row for row in rows if row.verdict == word]


def counts(rows: Sequence[Row]) -> str:
    """How many claims have which verdict, in words."""
    count = Counter(row.verdict for row in rows)
    return ", ".join(f"{count[word]} {word}" for word in WORDS if count[word])


def cited(rows: Sequence[Row]) -> list[Row]:
    """The rows that are a paper's, not numbers of the book's own."""
    return [row for row in rows if row.claim["certainty"] != "ours"]


def of_the_paper(sections: Sequence[tuple[dict[str, Any], list[Row]]]) -> list[Row]:
    """The claims of the paper itself, without those of later papers."""
    return [row for section, rows in sections if not section.get("after") for row in cited(rows)]


def tested(rows: Sequence[Row]) -> list[Row]:
    """The rows that something here answers."""
    return [row for row in rows if row.verdict != "not testable here"]


def judged(finding: dict[str, Any]) -> bool:
    """Whether a finding stands beside something that the paper says."""
    return finding["verdict"] != "not testable here" or finding["paper"] not in NO_CLAIM
