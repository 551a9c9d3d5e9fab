"""The pages that are computed from all chapters together: paper against measured, status, the start page's story."""

import io
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from companion import results
from companion.execute import commit
from companion.results import Chapter

CERTAINTY = {
    "checked": "checked against a published source",
    "recalled": "recalled",
    "ours": "not the paper's",
}
NO_CLAIM = {"", "–", "-", "not given", "no level given"}
WORDS = ["reproduced", "not reproduced", "divided", "not testable here"]
MEANINGLESS = (
    "```{{warning}}\nThis book was built with the preset `{}`, which only runs every cell: "
    "its numbers mean nothing.\n```\n"
)


def escaped(text: str) -> str:
    """Text as Markdown that says the same."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~^])", r"\\\1", " ".join(text.split()))


def badge(word: str) -> str:
    """A verdict, readable without its colour."""
    return f"[{word}]{{.verdict .{word.replace(' ', '-')}}}"


def scale(chapter: Chapter) -> str:
    """On what a chapter's numbers rest: preset, model, sample sizes."""
    samples = [f"{k[8:]} {v}" for k, v in chapter.provenance.items() if k.startswith("sample: ")]
    model = [str(chapter.parameters["model"])] if chapter.parameters.get("model") else []
    return ", ".join([chapter.provenance.get("preset", "unknown"), *model, *samples[:2]])


def line(chapter: Chapter, finding: dict[str, Any], figure: str | None) -> str:
    """One finding, with its verdict, number, scale and where to read on."""
    parts = [
        f"{escaped(finding['quantity'])}: **{escaped(results.measured(finding['measured']))}**"
    ]
    if finding["comment"]:
        parts.append(escaped(finding["comment"]))
    links = [f"{{doc}}`{chapter.title.split(':')[0]} </chapters/{chapter.name}>`"]
    if figure in chapter.figures:
        links.append(f"{{ref}}`figure <{figure}>`")
    return f"{'; '.join(parts)} ({escaped(scale(chapter))}; {', '.join(links)})"


def joined(
    claims: dict[str, Any], chapters: list[Chapter]
) -> list[tuple[str, list[tuple[dict, list, str]]]]:
    """Sections of (claim, its (chapter, finding) pairs, the word for all of them)."""
    by_key = {f["key"]: (chapter, f) for chapter in chapters for f in chapter.findings}
    sections = []
    for section in claims["sections"]:
        rows = []
        for claim in section["claims"]:
            pairs = [by_key[key] for key in claim.get("findings", []) if key in by_key]
            rows.append((claim, pairs, results.overall([results.verdict(f) for _, f in pairs])))
        sections.append((section["title"], rows))
    return sections


def counts(rows: list[tuple[dict, list, str]]) -> str:
    """How many of these claims have which verdict, in words."""
    count = Counter(word for _, _, word in rows)
    return ", ".join(f"{count[word]} {word}" for word in WORDS if count[word])


def measured_page(claims: dict[str, Any], chapters: list[Chapter], preset: str) -> str:
    """Paper against measured: a row for each claim, then the findings that answer none."""
    sections = joined(claims, chapters)
    page = [
        "# Paper against measured",
        MEANINGLESS.format(preset) if preset in results.EXEMPT else "",
    ]
    page.append(
        "Each row is a claim or a number of the paper {cite}`godey2024saturation` (in the last sections, of later\n"
        "papers), in our words, beside what this\n"
        f"book computed under the preset `{preset}`: the number, its 95 % interval and sample size where it has them,\n"
        "on what it rests, and the verdict, which the chapter computed by the tolerance given here. Rows marked as\n"
        "not the paper's are numbers of our own that a chapter must find again. A claim that several measurements\n"
        "answer is *divided* where some reproduce it and others do not. Nothing on this page is typed but the first\n"
        "two columns; a verdict that differs from the signed one stops the build.\n"
    )
    table = [
        "```{list-table} Claims by section",
        ":header-rows: 1",
        ":class: measured",
        "* - section",
    ]
    table += [f"  - {word}" for word in WORDS]
    for title, rows in sections:
        count = Counter(word for _, _, word in rows)
        table += [f"* - {title}", *(f"  - {count[word]}" for word in WORDS)]
    page += ["\n".join([*table, "```\n"])]
    for title, rows in sections:
        page.append(f"## {title}\n")
        table = [
            f"```{{list-table}} {title}: {counts(rows)}",
            ":header-rows: 1",
            ":class: measured claims",
            ":widths: 34 18 48",
        ]
        table += ["* - the paper", "  - tolerance", "  - measured here"]
        for claim, pairs, word in rows:
            said = f"{escaped(claim['claim'])} **{escaped(claim['paper'])}** ({CERTAINTY[claim['certainty']]})"
            table += [f"* - {said}", f"  - {escaped(claim['tolerance'])}"]
            told = [
                f"{badge(results.verdict(f))} {line(c, f, claim.get('figure'))}" for c, f in pairs
            ]
            why = claim.get("why") or "This finding needs data that were not at hand."
            told = told or [f"{badge(word)} {why}"]
            table.append(
                "  - " + "\n\n    ".join([*([badge(word)] if word == "divided" else []), *told])
            )
        page.append("\n".join([*table, "```\n"]))
    answered = {
        key
        for section in claims["sections"]
        for claim in section["claims"]
        for key in claim.get("findings", [])
    }
    page.append(
        "## Findings beyond the paper\n\nWhat the chapters found and no row above asks for.\n"
    )
    table = [
        "```{list-table} Findings that answer no row",
        ":header-rows: 1",
        ":class: measured claims",
        ":widths: 30 70",
    ]
    table += ["* - chapter", "  - finding"]
    for chapter in chapters:
        rest = [f for f in chapter.findings if f["key"] not in answered]
        for finding in rest:
            judged = finding["agrees"] is not None or finding["paper"] not in NO_CLAIM
            label = (
                f"{badge(results.verdict(finding))} *{escaped(finding['paper'])}*: "
                if judged
                else ""
            )
            table += [f"* - {{doc}}`{chapter.title.split(':')[0]} </chapters/{chapter.name}>`"]
            table += [f"  - {label}{line(chapter, finding, None)}"]
    page.append("\n".join([*table, "```\n"]) if len(table) > 6 else "None.\n")
    return "\n".join(page)


def status_page(chapters: list[Chapter], preset: str) -> str:
    """What ran, when, with which versions, on what, for how long."""
    page = [
        "# Status of this build\n",
        f"Preset `{preset}`, pages rendered from commit {escaped(commit())}.\n",
    ]
    table = [
        "```{list-table} The chapters as they were executed",
        ":header-rows: 1",
        ":class: measured",
    ]
    columns = [
        "chapter",
        "finished (UTC)",
        "commit",
        "device",
        "seed",
        "run time",
        "memory",
        "figures",
        "findings",
    ]
    table += ["* - " + "\n  - ".join(columns)]
    for c in chapters:
        finished = c.run.get("end_time") or ""
        when = f"{datetime.fromisoformat(finished):%Y-%m-%d %H:%M}" if finished else "unknown"
        known = c.provenance.get
        device = f"{known('device', 'unknown')}, {known('CPU cores', '?')} cores"
        memory = known("peak memory") or known("memory at the end") or "unknown"
        cells = [
            c.run.get("commit", "unknown"),
            device,
            known("seed", "?"),
            known("run time", "unknown"),
            memory,
        ]
        cells = [escaped(str(cell)) for cell in [when, *cells, len(c.figures), len(c.findings)]]
        table += [f"* - {{doc}}`/chapters/{c.name}`", *(f"  - {cell}" for cell in cells)]
    page.append("\n".join([*table, "```\n"]))
    versions = ["headbound", "Python", "torch", "transformers", "numpy", "scipy"]
    table = [
        "```{list-table} Versions",
        ":header-rows: 1",
        ":class: measured",
        "* - package\n  - version",
    ]
    for name in versions:
        used = sorted({c.provenance[name] for c in chapters if name in c.provenance})
        mixed = " (the chapters differ: execute them again)" if len(used) > 1 else ""
        table += [f"* - {name}", f"  - {escaped(', '.join(used) or 'unknown')}{mixed}"]
    page.append("\n".join([*table, "```\n"]))
    page.append(
        "Memory is the most that the chapter's process held. Each chapter's parameters are on its own page; all other\n"
        "versions are pinned in the file `requirements.lock`.\n"
    )
    return "\n".join(page)


def front_figure(
    claims: dict[str, Any], chapters: list[Chapter]
) -> tuple[Chapter, dict[str, Any]] | None:
    """The figure that tells the story: the first on the list that a chapter made."""
    figures = {
        name: (chapter, figure) for chapter in chapters for name, figure in chapter.figures.items()
    }
    return next((figures[name] for name in claims["front"] if name in figures), None)


def story(claims: dict[str, Any], chapters: list[Chapter], preset: str) -> tuple[str, str]:
    """The start page's figure and its answer so far, as Markdown."""
    chosen, figure = front_figure(claims, chapters), ""
    if chosen:
        chapter, shown = chosen
        about = {"alt": escaped(shown["alt"]), "class": "front"}
        options = "\n".join(f":{k}: {v}" for k, v in about.items())
        where = f"Computed in {{doc}}`{chapter.title.split(':')[0]} </chapters/{chapter.name}>`."
        figure = f"```{{figure}} /generated/front.png\n{options}\n\n{escaped(shown['caption'])} {where}\n```\n"
    answer = [MEANINGLESS.format(preset)] if preset in results.EXEMPT else []
    sections = [
        (title, [row for row in rows if row[0]["certainty"] != "ours"])
        for title, rows in joined(claims, chapters)
    ]
    later = {section["title"] for section in claims["sections"] if section.get("after")}
    rows = [row for title, rows in sections if title not in later for row in rows]
    tested = [row for _, rows in sections for row in rows if row[2] != results.VERDICTS[None]]
    own = sum(row[2] != results.VERDICTS[None] for row in rows)
    answer.append(
        f"This build (preset `{preset}`) tests {own} of {len(rows)} claims and numbers of the paper: {counts(rows)}. "
        "Claims of later papers stand apart.\n"
    )
    for title, rows in sections:
        answer.append(f"- **{title}**: {counts(rows)}.")
    against = [row for row in tested if row[2] != results.VERDICTS[True]]
    if against:
        answer.append("\nThese did not reproduce, or not by every measurement:\n")
    for claim, pairs, word in against:
        told = "; ".join(line(c, f, None) for c, f in pairs if f["agrees"] is False)
        answer.append(
            f"- {badge(word)} {escaped(claim['claim'])} *The paper:* {escaped(claim['paper'])}. *Here:* {told}"
        )
    return figure, "\n".join(answer) + "\n"


def chapter_map(chapters: list[Chapter]) -> str:
    """The chapters by question: the one in the notebook's metadata, else the first that it asks."""
    table = ["```{list-table}", ":header-rows: 1", ":widths: 65 35", "* - question\n  - chapter"]
    table += [
        f"* - {c.question}\n  - {{doc}}`{c.title.split(':')[0]} </chapters/{c.name}>`"
        for c in chapters
    ]
    return "\n".join([*table, "```\n"])


def social_picture(png: bytes | None, title: str, tagline: str) -> bytes:
    """The 1200 by 630 picture that link previews show: title, tagline and the start page's figure."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    card = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(card)
    bold, plain = (
        font_manager.findfont(f"DejaVu Sans:{w}", fallback_to_default=True)
        for w in ("bold", "regular")
    )
    draw.text((40, 22), title, fill="#111111", font=ImageFont.truetype(bold, 52))
    draw.text((40, 90), tagline, fill="#333333", font=ImageFont.truetype(plain, 26))
    if png:
        figure = Image.open(io.BytesIO(png)).convert("RGB")
        figure.thumbnail((1120, 480))
        card.paste(figure, ((1200 - figure.width) // 2, 138))
    out = io.BytesIO()
    card.quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(chapters: list[Chapter], preset: str, folder: Path) -> None:
    """All of it into a folder of the book."""
    claims, config = results.load_claims(), yaml.safe_load(Path("_config.yml").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    chosen = front_figure(claims, chapters)
    figure, answer = story(claims, chapters, preset)
    if chosen:
        (folder / "front.png").write_bytes(chosen[1]["png"])
    tagline = config.get("sphinx", {}).get("config", {}).get("html_context", {}).get("tagline", "")
    (folder / "social.png").write_bytes(
        social_picture(chosen and chosen[1]["png"], config["title"], tagline)
    )
    for name, text in {
        "measured": measured_page(claims, chapters, preset),
        "status": status_page(chapters, preset),
        "figure": figure,
        "answer": answer,
        "map": chapter_map(chapters),
    }.items():
        (folder / f"{name}.md").write_text(text)
