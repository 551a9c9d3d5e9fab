"""The book itself: built from a clean copy under smoke, its pages opened with the network cut."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import nbformat
import pages
import pytest
import yaml
from filelock import FileLock
from PIL import Image

from companion import execute, results

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "screenshots"

needs_chromium = pytest.mark.skipif(
    not pages.CHROMIUM, reason="no Chromium on this machine: pages are not opened"
)


PRINT = [sys.executable, "-c", "from companion import pdf; raise SystemExit(pdf.print_book())"]


def build(copy: Path) -> None:
    """The smoke book, built by the README's own path from what git would commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "companion.cli", "book", "--preset", "smoke"]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="session")
def clone(tmp_path_factory, worker_id):
    """A copy of the repository with the smoke book in it, built once for all workers.

    The variable HEADBOUND_BOOK may name a copy whose book is built already.
    """
    if built := os.environ.get("HEADBOUND_BOOK"):
        return Path(built)
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "book-clone"
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").exists():
            assert not folder.exists(), "another worker could not build the book"
            build(folder)
            (folder / "built").touch()
    return folder


@pytest.fixture(scope="session")
def site(clone):
    return clone / "_build" / "html"


# Closed with this module's last test: one process drives one browser at a time.
@pytest.fixture(scope="module")
def chromium():
    with pages.browser() as chromium:
        yield chromium


def html_pages(site: Path) -> list[str]:
    return sorted(
        str(p.relative_to(site)) for p in site.rglob("*.html") if "_static" not in p.parts
    )


def test_every_chapter_is_a_page(site):
    chapters = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    assert set(html_pages(site)) >= {"index.html", *(f"chapters/{name}.html" for name in chapters)}


def test_the_site_is_small(site):
    assert pages.heavy(site) == []


def test_a_heavy_page_and_a_heavy_site_are_found(tmp_path):
    (tmp_path / "page.html").write_bytes(b" " * 1_600_000)
    (tmp_path / "picture.png").write_bytes(b" " * 29_000_000)
    assert pages.heavy(tmp_path) == ["the site has 30.6 MB", "page.html has 1.6 MB"]


def test_figures_can_be_seen(clone):
    executed = sorted((clone / "_build" / "executed" / "smoke").glob("*.ipynb"))
    assert [fault for path in executed for fault in pages.unseen(path)] == []


def test_a_pale_line_and_panels_side_by_side_are_found(tmp_path):
    kept = {"companion": {"name": "fig-x", "contrast": 1.7, "columns": 3}}
    output = nbformat.v4.new_output("display_data", metadata=kept)
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "01_pale.ipynb")
    assert pages.unseen(tmp_path / "01_pale.ipynb") == [
        "01_pale: fig-x: a line has a contrast of 1.7 : 1 on white",
        "01_pale: fig-x: 3 panels side by side",
    ]


def test_what_hosts_and_other_sites_look_for_is_there(site):
    named = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9"}
    listed = [e.text for e in ET.parse(site / "sitemap.xml").findall("s:url/s:loc", named)]
    kept = {
        name for name in html_pages(site) if not re.match(r"(404|genindex|search|prf-prf)", name)
    }
    assert {address.removeprefix("http://localhost:8000/") for address in listed} == kept
    assert "There is no such page" in (site / "404.html").read_text()
    index = (site / "index.html").read_text()
    for tag in ("og:title", "og:description", "og:image"):
        assert f'property="{tag}"' in index
    assert 'name="twitter:card"' in index
    with Image.open(site / "front.png") as picture:
        assert picture.width > 600
    data = json.loads((site / "claims.json").read_text("utf-8"))
    jsonschema.validate(data, json.loads((site / "claims.schema.json").read_text("utf-8")))
    assert len(data["claims"]) > 20


def test_only_notebooks_are_offered_and_they_are_what_ran(site):
    chapters = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    for name in html_pages(site):
        offered = re.findall(r'href="([^"]*_sources/[^"]*)"', (site / name).read_text())
        assert all(link.endswith(".ipynb") for link in offered), name
        if Path(name).stem in chapters:
            (link,) = set(offered)
            assert (site / name).parent.joinpath(link).is_file()


def test_previous_and_next_follow_the_table_of_contents(site):
    index, seen = "index.html", []
    while index:
        seen.append(index)
        following = re.search(r'class="right-next"\s+href="([^"]+)"', (site / index).read_text())
        index = os.path.relpath((site / index).parent / following[1], site) if following else None
    listed = re.findall(r"file: (\S+)", (ROOT / "_toc.yml").read_text())
    assert seen == ["index.html", *(f"{name}.html" for name in listed)]


@needs_chromium
@pytest.mark.parametrize(("width", "theme"), pages.VIEWS)
def test_every_page_opens_whole_with_the_network_cut(site, chromium, width, theme):
    with pages.served(site) as address:
        found = [
            problem
            for name in html_pages(site)
            for problem in pages.problems(chromium, address, name, width, theme)
        ]
    assert not found, "\n".join(found)


@needs_chromium
def test_the_search_finds_words_offline(site, chromium):
    with pages.served(site) as address:
        page = chromium.new_page()
        page.set_default_timeout(120_000)
        page.route(re.compile(rf"^(?!{address})"), lambda route: route.abort())
        page.goto(f"{address}/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("anisotropy")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")
        found = page.eval_on_selector_all(
            "#search-results li a", "links => links.map(a => a.getAttribute('href'))"
        )
        page.close()
    assert any("anisotropy" in link for link in found)


@needs_chromium
def test_the_start_page_is_usable_within_a_second(site, chromium):
    with pages.served(site) as address:
        page = chromium.new_page()
        page.goto(f"{address}/index.html")  # the browser itself warms up here
        best = min(_seconds_to_load(page, address) for _ in range(3))
        page.close()
    assert best < 1


def _seconds_to_load(page, address):
    started = time.perf_counter()
    page.goto(f"{address}/index.html", wait_until="domcontentloaded")
    page.locator(".bd-article h1").wait_for()
    return time.perf_counter() - started


@needs_chromium
@pytest.mark.parametrize("name", ["index", "chapters/03_head_spectrum"])
def test_pictures_of_two_pages_are_like_the_stored_ones(site, chromium, name):
    stored = STORED / f"{Path(name).name}.png"
    with pages.served(site) as address:
        now = pages.picture(chromium, f"{address}/{name}.html")
        if os.environ.get("HEADBOUND_RENEW_SCREENSHOTS"):
            STORED.mkdir(exist_ok=True)
            now.save(stored, optimize=True)
        faults = (
            "* { all: revert !important; }",
            ".bd-sidebar-primary { display: none !important; }",
        )
        faulty = [pages.picture(chromium, f"{address}/{name}.html", css) for css in faults]
        font = pages.picture(
            chromium, f"{address}/{name}.html", "* { font-family: serif !important; }"
        )
    with Image.open(stored) as known:
        apart = pages.difference(known, now)
        planted = [pages.difference(known, picture) for picture in faulty]
        harmless = pages.difference(known, font)
    assert apart < 0.08, (
        f"{name} does not look as it did ({apart:.2f}): look at the page, then `make screenshots`"
    )
    assert min(planted) > 0.12, f"planted faults are not seen: {planted}"
    assert harmless < 0.08, f"another machine's font would be taken for a fault: {harmless}"


@needs_chromium
def test_no_formula_in_a_line_is_cut_on_a_phone(site, chromium):
    with pages.served(site) as address:
        for name in ("chapters/06_head_bound.html", "chapters/07_gradient_bottleneck.html"):
            assert pages.cut_formulas(chromium, f"{address}/{name}") == 0
        assert pages.cut_formulas(chromium, f"{address}/{name}", without="companion.js") > 0


@needs_chromium
def test_the_quiz_is_worked_by_the_keyboard_and_its_reasons_lead_to_their_sections(site, chromium):
    with pages.served(site) as address:
        page = chromium.new_page()
        pages.settle(page, f"{address}/generated/quiz.html")
        chapters = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
        forms = page.locator("form.quiz")
        assert forms.count() == 3 * len(chapters)
        for number in range(forms.count()):
            form = forms.nth(number)
            right = int(form.get_attribute("data-right"))
            told, why = form.locator("[role=status]"), form.locator(".why")
            form.locator("input").first.focus()
            page.keyboard.press("Space")
            for _ in range(right):  # past the right one, or round to the first
                page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
            assert told.text_content() == "Not this one. Try again."
            assert not why.is_visible()
            page.keyboard.press("ArrowUp")
            page.keyboard.press("Enter")
            assert told.text_content() == "Right."
            page.keyboard.press("Tab")
            page.keyboard.press("Tab")
            target = page.evaluate(
                "document.activeElement.closest('.why') && document.activeElement.href"
            )
            file, place = target.removeprefix(f"{address}/").split("#")
            assert f'id="{place}"' in (site / file).read_text("utf-8"), target
        page.close()


def printed(chromium, address: str, **look: object) -> tuple[int, bytes]:
    """How many pages a page of the book makes on paper, and the PDF."""
    page = chromium.new_page()
    page.set_default_timeout(120_000)
    pages.settle(page, address)
    pdf = page.pdf(print_background=True, **look)
    page.close()
    return pdf.count(b"/Type /Page\n"), pdf


WORDS_ON_SLIDES = """() => [...document.querySelectorAll("article section section")].map(slide => {
  const copy = slide.cloneNode(true);
  for (const part of copy.querySelectorAll("h2, figcaption, .math")) part.remove();
  return copy.textContent.trim().split(/\\s+/).length;
})"""


@needs_chromium
def test_slides_have_few_words_and_print_one_a_page(site, chromium):
    with pages.served(site) as address:
        slides = f"{address}/generated/slides.html"
        page = chromium.new_page()
        pages.settle(page, slides)
        words = page.evaluate(WORDS_ON_SLIDES)
        page.close()
        count, pdf = printed(chromium, slides, prefer_css_page_size=True)
    assert len(words) > 15
    assert max(words) <= 25, words
    assert count == len(words)
    assert b"/MediaBox [0 0 906.95996 510]" in pdf, "wider than high, as a screen is"


@needs_chromium
def test_the_lab_sheet_prints_on_two_pages(site, chromium):
    margin = dict.fromkeys(("top", "bottom", "left", "right"), "14mm")
    with pages.served(site) as address:
        count, _ = printed(chromium, f"{address}/lab/lab_sheet.html", format="A4", margin=margin)
    assert count == 2


def test_the_site_has_solutions_only_on_their_pages(site):
    kept = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb") if "{solution}" in p.read_text()}
    for name in html_pages(site):
        folded = (site / name).read_text("utf-8").count('class="solution')
        assert bool(folded) == (Path(name).stem in {"solutions", "project_solutions"} | kept), name


EXPLORABLES = {
    "hb-long-run": "chapters/01_wind_tunnel.html",
    "hb-spectrum": "chapters/03_head_spectrum.html",
    "hb-w-error": "chapters/04_target_rank.html",
    "hb-head-bound": "chapters/06_head_bound.html",
}


@needs_chromium
@pytest.mark.parametrize("name", EXPLORABLES)
def test_an_explorable_answers_to_keys_touch_and_choices_with_the_network_cut(site, chromium, name):
    with pages.served(site) as address:
        found = pages.explored(chromium, address, EXPLORABLES[name], name)
    assert found.errors == []
    assert len({found.first, found.last, found.before_last}) == 3, "keys move the slider"
    assert found.touched not in (found.first, found.last), "a finger moves it"
    assert len(set(found.chosen)) == len(found.chosen), "each choice says something else"
    assert found.said == found.value, "a screen reader hears what is shown"
    assert found.target >= 44, "large enough for a finger"
    assert found.drawn > 0


@needs_chromium
def test_an_explorable_without_its_script_fails_its_test(chromium, tmp_path):
    inside = "<output data-part='value'>1</output><input type='range' max='9'><p data-part='live'>1"
    (tmp_path / "x.html").write_text(PAGE.format(f"<div id='hb-x'>{inside}</p></div>"))
    with pages.served(tmp_path) as address:
        found = pages.explored(chromium, address, "x.html", "hb-x")
    assert len({found.first, found.last, found.before_last}) == 1
    assert found.drawn == 0


def unsourced(decisions: dict, cited: set[str], findings: set[str]) -> list[str]:
    """Cells of the page for builders whose source is not there."""
    found = []
    for decision in decisions["decisions"]:
        cells = [
            (cell, cell.get("cite") in cited) for cell in decision["for"] + decision["against"]
        ]
        cells += [(cell, cell.get("finding") in findings) for cell in decision["here"]]
        found += [f"{decision['id']}: {cell['says']}" for cell, there in cells if not there]
        if decision["strength"] not in decisions["strengths"] or not decision["unknown"]:
            found.append(f"{decision['id']}: no strength, or nothing is unknown")
    return found


BUILDERS = ROOT / "book" / "decisions.yaml"
ENTRY = re.compile(r"^@\w+\{(\S+),", re.MULTILINE)


def test_every_cell_for_builders_has_a_source(clone):
    decisions = yaml.safe_load(BUILDERS.read_text("utf-8"))
    cited = set(ENTRY.findall((ROOT / "book" / "references.bib").read_text("utf-8")))
    executed = sorted((clone / "_build" / "executed" / "smoke").glob("*.ipynb"))
    findings = {f["key"] for path in executed for f in results.read(path).findings}
    assert len(decisions["decisions"]) == 10
    assert unsourced(decisions, cited, findings) == []
    page = (clone / "book" / "generated" / "what_to_do.md").read_text("utf-8")
    assert "not in this edition" not in page
    for decision in decisions["decisions"]:
        assert f"## {decision['title']}" in page


@pytest.mark.parametrize(
    ("side", "cell"),
    [
        ("for", {"says": "It helps."}),
        ("against", {"says": "It hurts.", "cite": "nobody1999"}),
        ("here", {"says": "It was measured.", "finding": "tunnel.nothing"}),
    ],
)
def test_a_cell_for_builders_without_a_source_is_found(side, cell):
    decisions = yaml.safe_load(BUILDERS.read_text("utf-8"))
    sides = [decision[key] for decision in decisions["decisions"] for key in ("for", "against")]
    cited = {cell["cite"] for side in sides for cell in side}
    findings = {cell["finding"] for decision in decisions["decisions"] for cell in decision["here"]}
    assert unsourced(decisions, cited, findings) == []
    decisions["decisions"][3][side].append(cell)
    assert unsourced(decisions, cited, findings) == [f"cap: {cell['says']}"]


GIF = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
PIXEL = f'<img alt="A line that rises." src="{GIF}">'
PLANTED = {
    "outside request": '<script src="http://127.0.0.2:9/x.js"></script>',
    "broken image": '<img src="missing.png" alt="A picture that is not there">',
    "image without alt text": f'<figure><img src="{GIF}" alt=""></figure>',
    "broken link": '<a href="nowhere.html">a link</a>',
    "link to a missing place": '<a href="#nowhere">a link</a>',
    "wider than the page": '<table><tr><td style="min-width: 3000px">wide</td></tr></table>',
    "formula not rendered": '<span class="math">\\(x</span>',
    "script error": '<script>throw new Error("planted")</script>',
    "accessibility violation button-name": "<button></button>",
    "code that scrolls sideways": '<div class="highlight"><pre style="overflow: auto" tabindex="0">'
    f"{'x' * 90}</pre></div>",
    "caption of 3 sentences": f"<figure>{PIXEL}<figcaption>A line. It rises. It falls.</figcaption>"
    "</figure>",
    "repeats the caption": f"<figure>{PIXEL}<figcaption>A line that rises.</figcaption></figure>",
}
PAGE = """<!doctype html><html lang="en"><head><title>T</title></head>
<body><main><h1>T</h1>{}</main></body></html>"""


def problems(chromium, folder: Path, content: str) -> list[str]:
    (folder / "page.html").write_text(PAGE.format(content))
    with pages.served(folder) as address:
        return pages.problems(chromium, address, "page.html", 390)


@needs_chromium
def test_a_sound_page_has_no_fault(chromium, tmp_path):
    assert problems(chromium, tmp_path, "<p>Sound.</p>") == []


@needs_chromium
@pytest.mark.parametrize("message", PLANTED)
def test_each_planted_fault_is_found(chromium, tmp_path, message):
    found = problems(chromium, tmp_path, PLANTED[message])
    assert any(message in problem for problem in found), found


@pytest.fixture
def small_book(tmp_path):
    """A book of one chapter, rendered in seconds."""
    for name in ("workflow", "book/_static"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "book/references.bib"):
        shutil.copy(ROOT / name, tmp_path / name)
    chapter = nbformat.v4.new_notebook()
    chapter.cells = [
        nbformat.v4.new_markdown_cell("# A chapter: small?\n\nBack to [the start](../index.md)."),
        nbformat.v4.new_code_cell(""),
    ]
    chapter.metadata = {
        "language_info": {"name": "python"},
        "companion": {"source": execute.source_hash(chapter)},
    }
    for folder in ("notebooks", "_build/executed/smoke"):
        (tmp_path / folder).mkdir(parents=True)
        nbformat.write(chapter, tmp_path / folder / "01_small.ipynb")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "smoke.yaml").write_text("01_small: {}\n")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: chapters/01_small\n"
    )
    cited = "{cite}`godey2024saturation`\n\n```{bibliography}\n```\n"
    (tmp_path / "book" / "index.md").write_text(f"# A start\n\nWords.\n\n{cited}")
    return tmp_path


def render(folder: Path, *options: str) -> subprocess.CompletedProcess:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PATH": programs}
    command = [sys.executable, "-m", "companion.site", "publish", "smoke", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@needs_chromium
def test_title_and_colour_are_one_line_each_and_a_host_one_variable(
    small_book, chromium, monkeypatch
):
    config, style = small_book / "_config.yml", small_book / "book" / "_static" / "headbound.css"
    config.write_text(re.sub(r"^title: .*$", "title: Another Name", config.read_text(), flags=re.M))
    style.write_text(
        style.read_text().replace("--companion-colour: #0b4f99", "--companion-colour: #7a1f1f")
    )
    monkeypatch.setenv("HEADBOUND_URL", "https://example.org/book")
    done = render(small_book)
    assert done.returncode == 0, done.stderr
    site = small_book / "_build" / "html"
    for page in ("index.html", "404.html", "chapters/01_small.html"):
        assert "Another Name" in (site / page).read_text()
    assert 'href="https://example.org/book/index.html"' in (site / "index.html").read_text()
    assert '"/book/_static/' in (site / "404.html").read_text()
    assert "<loc>https://example.org/book/index.html</loc>" in (site / "sitemap.xml").read_text()
    with pages.served(site) as address:
        page = chromium.new_page(color_scheme="light")
        page.goto(f"{address}/chapters/01_small.html")
        colour = page.eval_on_selector(
            ".bd-article a.reference", "link => getComputedStyle(link).color"
        )
        page.close()
    assert colour == "rgb(122, 31, 31)"


@pytest.mark.slow
def test_a_broken_link_to_another_host_is_found(small_book):
    (small_book / "book" / "index.md").write_text("# A start\n\n[gone](http://127.0.0.1:9/gone)\n")
    (small_book / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    done = render(small_book, "linkcheck")
    assert done.returncode != 0
    assert "127.0.0.1:9/gone" in done.stderr


@needs_chromium
def test_the_whole_book_prints_as_one_document(clone):
    done = subprocess.run(PRINT, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = (clone / "_build" / "book.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") > 30
    assert b"/Outlines" in printed


def test_without_chromium_no_pdf_and_one_sentence(clone):
    alone = {**os.environ, "PATH": ""}
    done = subprocess.run(
        PRINT,
        cwd=clone,
        capture_output=True,
        text=True,
        env=alone,
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "no Chromium on this machine" in done.stdout


def test_a_misspelt_word_is_found(tmp_path):
    (tmp_path / "page.md").write_text("Teh spectrum.\n")
    check = [
        str(Path(sys.executable).with_name("codespell")),
        "--toml",
        str(ROOT / "pyproject.toml"),
    ]
    assert (
        subprocess.run([*check, str(tmp_path)], capture_output=True, text=True).stdout.count("Teh")
        == 1
    )
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
