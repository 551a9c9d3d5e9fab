"""The companion knows no paper: a book of two pages about another one is made with it alone."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import pages
import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"

CONFIG = """\
title: Apples
only_build_toc_files: true
execute: {execute_notebooks: "off"}
bibtex_bibfiles: [references.bib]
parse: {myst_enable_extensions: [attrs_inline, colon_fence, dollarmath]}
sphinx:
  extra_extensions: [companion.site_extension]
  config:
    language: en
    html_theme_options: {use_download_button: true}
"""
CONTENTS = """\
format: jb-book
root: index
chapters: [{file: chapters/01_fall}, {file: chapters/02_orbit}, {file: generated/measured}]
"""
CLAIMS = """\
cite: newton1687
front: [fig-fall]
sections:
  - title: Falling
    claims:
      - {id: together, claim: All apples fall alike., paper: the same time, certainty: checked,
         tolerance: interval, findings: [fall.time, orbit.moon], figure: fig-fall}
      - {id: inverse, claim: The pull falls with the square., paper: "2", certainty: recalled,
         tolerance: a tenth, findings: [orbit.power]}
"""
TEXTS = {
    "01_fall": """\
fall.time: {quantity: "{name}", paper: "{name}"}
fig-fall: {x: height (m), y: time (s), by: apple}
fig-all: {x: height (m), y: time (s), panels: where}
""",
    "02_orbit": """\
orbit.power: {quantity: "{name}", paper: "{name}"}
orbit.moon: {quantity: "{name}", paper: "{name}", comment: "{name}"}
""",
}
REFERENCES = "@misc{newton1687, title={Principia}, author={Newton, Isaac}, year={1687}}\n"
FOREIGN = [
    "<script>window.hit = 1</script>",
    "<!--",
    "</table>",
    "$x^2$ and $y$",
    "\\(z\\)",
    "a|b",
    "`code`",
    "{{x}} {doc}`y`",
    "[a](b) **c**",
    "\u202eright to left",
    "\u05d0\u05d1",
    "1. one",
    "# a title",
    "&lt;",
    "_final",
]
LONG = "NAMES.append(10_000 * 'x')\nNAME = ' and '.join(NAMES)\n"
FALL = """\
import pandas as pd
heights = {"height (m)": [1, 2], "time (s)": [0.45, 0.64]}
frame = pd.concat(pd.DataFrame(heights).assign(apple=name) for name in NAMES[:6])
chapter.figure(run, frame, "fig-fall", see=NAME)"""
PANELS = """\
frame = pd.concat(frame.assign(where=name) for name in NAMES[6:])
chapter.figure(run, frame, "fig-all", see=NAME)"""
TOLD = """\
chapter.table(pd.DataFrame({name: NAMES for name in NAMES[:4]}), NAME)
for name in NAMES:
    safe = chapter.markdown(name)
    chapter.say(f"An apple called {safe} fell.\\n\\n{safe}")"""
FOUND = """\
chapter.findings(run, {told}, name=NAME)
chapter.answer("They *fall*, computed.")"""


def notebook(name: str, title: str, *cells: str) -> nbformat.NotebookNode:
    """A chapter of the other paper."""
    made = nbformat.v4.new_notebook()
    opening = nbformat.v4.new_markdown_cell(f"# {title}\n\nDo apples fall?")
    lines = "".join(f"    {foreign!r},\n" for foreign in FOREIGN)
    parameters = nbformat.v4.new_code_cell(f"preset = 'smoke'\nseed = 0\nNAMES = [\n{lines}]")
    parameters.metadata["tags"] = ["parameters"]
    begin = f"{LONG}from pathlib import Path\nfrom companion import chapter"
    begin += f"\nrun = chapter.begin(globals(), Path('book/words/{name}.yaml'))"
    code = [begin, *cells, "chapter.end(run, {'apples': 2})"]
    made.cells = [opening, parameters, *map(nbformat.v4.new_code_cell, code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return made


@pytest.fixture(scope="module")
def other_book(tmp_path_factory):
    """Executed and built in another process, in which the measuring package can't be imported."""
    folder = tmp_path_factory.mktemp("other book")
    for place in ("notebooks", "presets", "book/words", "_build"):
        (folder / place).mkdir(parents=True)
    texts = {"_config.yml": CONFIG, "_toc.yml": CONTENTS, "book/claims.yaml": CLAIMS}
    texts |= {"book/references.bib": REFERENCES, "presets/laptop.yaml": "{01_fall: , 02_orbit: }"}
    texts["book/index.md"] = "# Apples\n\n```{include} generated/answer.md\n```\n"
    texts["book/index.md"] += "\n```{include} generated/map.md\n```\n\n```{bibliography}\n```\n"
    texts |= {f"book/words/{name}.yaml": text for name, text in TEXTS.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    fall = FOUND.format(told="{'fall.time': (0.45, True, NAME)}")
    orbit = FOUND.format(told="{'orbit.power': (2.04, True, NAME), 'orbit.moon': (1.0, None)}")
    chapters = {
        "01_fall": notebook("01_fall", "A fall: how long?", FALL, PANELS, TOLD, fall),
        "02_orbit": notebook("02_orbit", "An orbit", orbit),
    }
    for name, content in chapters.items():
        nbformat.write(content, folder / f"notebooks/{name}.ipynb")
    program = """
import sys
sys.modules["headbound"] = sys.modules["exercises"] = None
from pathlib import Path
from companion import execute, site
for name in ("01_fall", "02_orbit"):
    notebook = Path("notebooks", f"{name}.ipynb")
    execute.execute(notebook, Path("_build/executed/laptop", notebook.name), "laptop", {})
sys.exit(site.publish("laptop"))
"""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(SOURCE), *sys.path]), "PATH": programs},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_the_companion_imports_nothing_of_the_book():
    for path in (SOURCE / "companion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("headbound", "exercises", "sweep"), path


def test_claims_findings_and_verdicts_of_another_paper_come_together(other_book):
    site = other_book / "_build" / "html"
    data = json.loads((site / "claims.json").read_text("utf-8"))
    schema = json.loads((site / "claims.schema.json").read_text("utf-8"))
    jsonschema.validate(data, schema)
    assert [claim["verdict"] for claim in data["claims"]] == ["in part", "reproduced"]
    page = (site / "generated" / "measured.html").read_text("utf-8")
    assert "All apples fall alike." in page
    assert "in part" in page
    start = (site / "index.html").read_text("utf-8")
    assert "Do apples fall?" in start
    assert "They <em>fall</em>, computed." in start


@pytest.mark.skipif(not pages.CHROMIUM, reason="no Chromium on this machine")
def test_the_pages_of_another_paper_are_sound_whatever_its_texts_hold(other_book):
    site = other_book / "_build" / "html"
    names = ["index.html", "chapters/01_fall.html", "generated/measured.html", "404.html"]
    with pages.served(site) as address, pages.browser() as chromium:
        for name in names:
            for width, theme in pages.VIEWS:
                assert pages.problems(chromium, address, name, width, theme) == []
        page = chromium.new_page()
        pages.settle(page, f"{address}/{names[1]}")
        told = page.inner_text("article.bd-article")
        kept = page.evaluate("[window.hit, document.querySelectorAll('mjx-container').length]")
        page.close()
    assert kept == [None, 0]
    for text in FOREIGN:
        shown = text.replace("\u202e", "")
        assert told.count(f"called {shown} fell") == 1, text
        assert told.count(shown) >= 8, text
