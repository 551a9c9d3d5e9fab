"""The pages that are computed from all chapters together: the templates here, and the book's own.

A book's own template is `book/NAME.md.j2`; it becomes `book/generated/NAME.md`. It may use
`figure("fig-…")`, the data of each `book/NAME.yaml` by its name, and the names that `write` gives.

Whatever a template puts into a page is shown as it is: a text that holds Markdown or HTML does
nothing. Only `| safe` lets it through.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
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


def write(chapters: Sequence[Chapter], preset: str, folder: Path) -> None:
    """Write every computed page, and the claims as data, into a folder of the book."""
    claims = results.load(results.CLAIMS)
    sections = results.join(claims, chapters)
    changes = results.changes(preset, chapters)
    every = [(chapter, finding) for chapter in chapters for finding in chapter.findings]
    answered = {f["key"] for _, rows in sections for row in rows for _, f in row.pairs}
    figures = {name: (c, figure) for c in chapters for name, figure in c.figures.items()}
    about = {path.stem: results.load(path) for path in BOOK.glob("*.yaml")} | {
        "answered": {chapter.name: chapter.answer for chapter in chapters},
        "beyond": [(c, finding) for c, finding in every if finding["key"] not in answered],
        "changes": changes,
        "chapters": chapters,
        "cite": claims.get("cite"),
        "commit": commit(),
        "exempt": results.EXEMPT,
        "found": {finding["key"]: finding for _, finding in every},
        "front": next((figures[f] for f in claims.get("front", []) if f in figures), None),
        "home": {finding["key"]: chapter for chapter, finding in every},
        "preset": preset,
        "sections": sections,
        "signed": {change.key: change.signed for change in changes},
        "words": WORDS,
    }
    extra = folder / "extra"  # goes to the root of the site
    extra.mkdir(parents=True, exist_ok=True)
    data = json.dumps(published(about), ensure_ascii=False, indent=1)
    (extra / "claims.json").write_text(data, "utf-8")
    shutil.copy(Path(__file__).with_name("claims.schema.json"), extra)
    if about["front"]:
        (extra / "front.png").write_bytes(about["front"][1]["png"])
    templates = environment(figures, folder)
    own = [path.stem for path in sorted(BOOK.glob("*.md.j2"))]
    for name in [*(f"{name}.md" for name in COMPUTED), *own]:
        page = templates.get_template(f"{name}.j2").render(about)
        (folder / name).write_text(page, "utf-8")


def published(about: dict[str, Any]) -> dict[str, Any]:
    """Claims joined with findings as one JSON object: `claims.json` beside the book."""
    signed = about["signed"]

    def told(chapter: Chapter, finding: dict[str, Any]) -> dict[str, Any]:
        before = {"signed": signed[finding["key"]]} if finding["key"] in signed else {}
        return {**finding, "chapter": chapter.name, **before}

    claims = []
    for section, rows in about["sections"]:
        for claim, pairs, verdict in rows:
            findings = [told(*pair) for pair in pairs]
            answer = {"section": section["title"], "verdict": verdict, "findings": findings}
            claims.append(claim | answer)
    return {
        "$schema": "claims.schema.json",
        "version": 1,
        "preset": about["preset"],
        "commit": about["commit"],
        "verdicts": WORDS,
        "claims": claims,
        "beyond": [told(*pair) for pair in about["beyond"]],
    }


def environment(figures: Mapping[str, tuple[Chapter, dict]], folder: Path) -> Environment:
    """Templates whose every expression becomes text that shows as it is."""
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(BOOK), PackageLoader("companion")]),
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    verbs = (badge, counts, link, number, scale, versions)
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    made.filters |= {verb.__name__: verb for verb in verbs}

    def figure(name: str) -> Markup:
        about = figures[name][1]
        (folder / f"{name}.png").write_bytes(about["png"])
        page = made.get_template("figure_on_slide.md.j2")
        return Markup(page.render(name=name, figure=about))

    made.globals["figure"] = figure
    return made


def badge(word: str) -> Markup:
    """A verdict, readable without its colour."""
    return Markup(f"[{word}]{{.verdict .{word.replace(' ', '-')}}}")


def link(chapter: Chapter) -> Markup:
    """A link to a chapter's page."""
    return Markup(f"{{doc}}`{chapter.title.split(':')[0]} </chapters/{chapter.name}>`")


def scale(chapter: Chapter) -> str:
    """On what a chapter's numbers rest: preset, model, sample sizes."""
    samples = [f"{k[8:]} {v}" for k, v in chapter.provenance.items() if k.startswith("sample: ")]
    model = [str(chapter.parameters["model"])] if chapter.parameters.get("model") else []
    return ", ".join([chapter.provenance.get("preset", "unknown"), *model, *samples[:2]])


def versions(chapters: Sequence[Chapter]) -> dict[str, list[str]]:
    """Each package with the versions that the chapters ran with."""
    pairs = sorted({pair for chapter in chapters for pair in chapter.packages.items()})
    return {name: [version for other, version in pairs if other == name] for name, _ in pairs}


def counts(rows: Sequence[Row]) -> str:
    """How many claims have which verdict, in words."""
    count = Counter(row.verdict for row in rows)
    return ", ".join(f"{count[word]} {word}" for word in WORDS if count[word])
