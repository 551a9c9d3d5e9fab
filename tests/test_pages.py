"""The book itself: built from a clean copy under smoke, then every page opened in a browser with the network cut."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("book")
needs_chromium = pytest.mark.skipif(not pages.CHROMIUM, reason="no Chromium on this machine: pages are not opened")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The smoke book, built by the README's own path from what git would commit."""
    copy = tmp_path_factory.mktemp("clone")
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
    command = [sys.executable, "workflow/build.py", "--preset", "smoke"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return copy / "_build" / "html"


@pytest.fixture(scope="session")
def chromium():
    with pages.browser() as chromium:
        yield chromium


def html_pages(site: Path) -> list[str]:
    return sorted(str(p.relative_to(site)) for p in site.rglob("*.html") if "_static" not in p.parts)


def test_every_chapter_is_a_page(site):
    chapters = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    assert set(html_pages(site)) >= {"index.html", *(f"chapters/{name}.html" for name in chapters)}


def test_the_site_is_small(site):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 30e6
    large = {p: (site / p).stat().st_size for p in html_pages(site) if (site / p).stat().st_size > 1.5e6}
    assert not large


@needs_chromium
def test_every_page_opens_whole_with_the_network_cut(site, chromium):
    with pages.served(site) as address:
        found = [
            problem
            for name in html_pages(site)
            for width in pages.WIDTHS
            for problem in pages.problems(chromium, address, name, width)
        ]
    assert not found, "\n".join(found)


PLANTED = {
    '<script src="http://127.0.0.2:9/x.js"></script>': "outside request",
    '<img src="missing.png" alt="A picture that is not there">': "broken image",
    '<figure><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" alt=""></figure>': "image without alt text",
    '<a href="nowhere.html">a link</a>': "broken link",
    '<a href="#nowhere">a link</a>': "link to a missing place",
    '<div style="width: 3000px">wide</div>': "wider than the page",
    '<span class="math">\\(x</span>': "formula not rendered",
    '<script>throw new Error("planted")</script>': "script error",
    "<button></button>": "accessibility violation button-name",
}


@needs_chromium
@pytest.mark.parametrize(("fault", "message"), PLANTED.items(), ids=PLANTED.values())
def test_each_planted_fault_is_found(chromium, tmp_path, fault, message):
    page = '<!doctype html><html lang="en"><head><title>T</title></head><body><main><h1>T</h1>{}</main></body></html>'
    (tmp_path / "index.html").write_text(page.format("<p>Sound.</p>"))
    (tmp_path / "faulty.html").write_text(page.format(fault))
    with pages.served(tmp_path) as address:
        assert pages.problems(chromium, address, "index.html", 390) == []
        assert any(message in problem for problem in pages.problems(chromium, address, "faulty.html", 390))
