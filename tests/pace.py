"""How fast a chapter goes: words of prose a visible line of code, what comes before a result."""

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("chapter.figure(", "chapter.say(", "chapter.table(")
RESULTS += ("print(", "display(")
FENCED = re.compile(r"^(`{3,})\{prf:proof\}.*?^\1$|^\$\$.*?\$\$$", re.MULTILINE | re.DOTALL)
MARKUP = re.compile(r"^`{3,}.*$|^:\w+:.*$|^\(\S+\)=$|\$[^$]*\$|\{[\w:]+\}|[`*#|]", re.MULTILINE)
WORD = re.compile(r"[^\W\d_]{2,}(?:['’-]\w+)*|\b[aAI]\b")


class Pace(NamedTuple):
    """A chapter in numbers; code is what the page shows, without parameters and exercises."""

    words: int
    code: int  # lines
    ratio: float  # words a line of code
    cells: int  # before the first that shows a result
    lines: int  # of code in these
    prose: int  # words in these
    longest: int  # lines of the longest visible cell


def words(text: str) -> int:
    """Words of prose: no proofs, formulas, fences or markup."""
    return len(WORD.findall(MARKUP.sub(" ", FENCED.sub(" ", text))))


def code_lines(text: str) -> int:
    """Lines that are neither empty nor a comment."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.split("\n"))


def pace(path: Path) -> Pace:
    """Measure one chapter's notebook."""
    prose, code, longest, first = 0, 0, 0, None
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["id"] == "exercises":
            continue
        if cell["cell_type"] == "markdown":
            prose += words(text)
            continue
        if first is None and any(verb in text for verb in RESULTS):
            first = (number, code, prose)
        if not {"hide-input", "hide-cell", "parameters"} & set(tags):
            code += code_lines(text)
            longest = max(longest, code_lines(text))
    return Pace(prose, code, prose / code, *first, longest)


def table() -> str:
    """All chapters, a line each, in the order of the contents."""
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    lines = ["chapter | words | code | words a line | before the first result | longest cell"]
    for name in re.findall(r"file: chapters/(\w+)", contents):
        found = pace(ROOT / "notebooks" / f"{name}.ipynb")
        first = f"{found.cells} cells, {found.lines} code lines, {found.prose} words"
        numbers = f"{found.words} | {found.code} | {found.ratio:.1f} | {first} | {found.longest}"
        lines.append(f"{name} | {numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
