"""`make pdf`: the site's pages in their order, as one document with working links, printed by a headless Chromium."""

import mimetypes
import shutil
import sys
from pathlib import Path
from posixpath import dirname, join, normpath

import yaml
from bs4 import BeautifulSoup

SITE, OUTPUT, ADDRESS = Path("_build/html"), Path("_build/head-bound.pdf"), "http://book.invalid/"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
UNPRINTED = (
    ".headerlink, .copybtn, .prev-next-footer, script:not([type='math/tex']), .onlyprint, .sd-btn"
)
STYLE = """<style>
.bd-article { padding: 0; margin: 0 auto; break-before: page; } body { overflow: visible; }
article:first-of-type { break-before: avoid; }
</style>"""
FOOTER = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'


def order(toc: dict) -> list[str]:
    """The pages' names as the table of contents has them."""
    names = [toc[key] for key in ("root", "file") if key in toc]
    for key in ("parts", "chapters", "sections"):
        names += [name for entry in toc.get(key, []) for name in order(entry)]
    return names


def article(site: Path, name: str, names: list[str]) -> str:
    """One page's text, its places renamed and its links turned to the places of the whole document."""
    soup = BeautifulSoup((site / f"{name}.html").read_text(), "html.parser")
    part = soup.select_one("article.bd-article")
    here = {entry: f"{entry.replace('/', '-')}--" for entry in names}
    for spare in part.select(UNPRINTED):
        spare.decompose()
    for folded in part.select(".dropdown, .toggle"):
        folded["class"] = [word for word in folded["class"] if word not in ("dropdown", "toggle")]
    for details in part.select("details"):
        details["open"] = ""
    for place in part.select("[id]"):
        place["id"] = here[name] + place["id"]
    for link in part.select("a[href]"):
        target, _, place = link["href"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        page = normpath(join(dirname(name), target)).removesuffix(".html") if target else name
        if page in here:
            link["href"] = f"#{here[page]}{place}"
        else:
            del link["href"]
    for image in part.select("img[src]"):
        image["src"] = normpath(join(dirname(name), image["src"]))
        image["loading"] = "eager"
    part["id"] = here[name]
    return str(part)


def document(site: Path, names: list[str]) -> str:
    """All pages as one, with the site's own style sheets and its mathematics."""
    soup = BeautifulSoup((site / f"{names[0]}.html").read_text(), "html.parser")
    head = [str(tag) for tag in soup.head.select("title, meta[charset], link[rel=stylesheet]")]
    head += [str(tag) for tag in soup.select("script") if "mathjax" in str(tag).lower()]
    bodies = "\n".join(article(site, name, names) for name in names)
    page = f"<body><main class='bd-content'>{bodies}</main></body>"
    return f'<!doctype html><html lang="en" data-theme="light"><head>{"".join(head)}{STYLE}</head>{page}</html>'


def main() -> int:
    """Print the built site; without a Chromium say so and leave it."""
    if not CHROMIUM:
        print(
            "headbound: no Chromium on this machine (chromium, chromium-browser, google-chrome), so no PDF is made"
        )
        return 0
    from playwright.sync_api import sync_playwright

    names = order(yaml.safe_load(Path("_toc.yml").read_text()))
    whole = document(SITE, names)

    def serve(route):
        path = route.request.url.removeprefix(ADDRESS).split("?")[0]
        if path == "":
            route.fulfill(body=whole, content_type="text/html")
        elif (SITE / path).is_file():
            route.fulfill(
                path=SITE / path,
                content_type=mimetypes.guess_type(path)[0] or "application/octet-stream",
            )
        else:
            route.abort()

    unfinished = OUTPUT.with_suffix(".tmp")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.route("**/*", serve)
        page.goto(ADDRESS, wait_until="load")
        page.evaluate(
            "async () => { if (window.MathJax) await MathJax.startup.promise; await document.fonts.ready; }"
        )
        margin = {"top": "16mm", "bottom": "18mm", "left": "14mm", "right": "14mm"}
        look = {
            "format": "A4",
            "margin": margin,
            "print_background": True,
            "tagged": True,
            "outline": True,
        }
        page.pdf(
            path=unfinished,
            display_header_footer=True,
            header_template="<i></i>",
            footer_template=FOOTER,
            **look,
        )
        browser.close()
    unfinished.replace(OUTPUT)
    print(f"The book as a PDF: {OUTPUT.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
