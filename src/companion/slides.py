"""The slides: the deck in book/slides.md, with figures and findings of the executed chapters put in their places."""

import json
import re
from pathlib import Path

from companion import results
from companion.pages import badge, escaped

DECK = Path("book/slides.md")
PLACE = re.compile(r"^<!-- (figure|findings): (\S+) -->$", re.MULTILINE)
ABSENT = "*This edition had no data for this slide.*"
FIGURE = "```{{figure}} {name}.png\n:alt: {alt}\n\n{caption}\n```"


def write(chapters: list[results.Chapter], folder: Path) -> None:
    """Write slides.md and its pictures into a folder of the book; without a deck, nothing."""
    if not DECK.exists():
        return
    shown = {
        f"findings {chapter.name}": _list(chapter.findings)
        for chapter in chapters
        if chapter.findings
    }
    deck = DECK.read_text()
    wanted = {name for kind, name in PLACE.findall(deck) if kind == "figure"}
    for name, figure in (
        (name, figure) for chapter in chapters for name, figure in chapter.figures.items()
    ):
        if name in wanted:
            (folder / f"{name}.png").write_bytes(figure["png"])
            about = {
                "name": name,
                "alt": json.dumps(figure["alt"]),
                "caption": escaped(figure["caption"]),
            }
            shown[f"figure {name}"] = FIGURE.format(**about)
    (folder / DECK.name).write_text(
        PLACE.sub(lambda place: shown.get(f"{place[1]} {place[2]}", ABSENT), deck)
    )


def _list(findings: list[dict]) -> str:
    """The findings with a verdict, an item each: a table would be wider than a phone."""
    tested = [row for row in findings if row["agrees"] is not None]
    lines = [
        f"- {badge(results.verdict(row))} {escaped(row['quantity'])}: "
        f"**{escaped(results.measured(row['measured']))}**; the paper: {escaped(row['paper'])}"
        for row in tested
    ]
    return "\n".join([*lines, f"- Not tested here: {len(findings) - len(tested)}."])
