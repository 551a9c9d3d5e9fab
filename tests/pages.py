"""What a browser finds wrong with a built page, with the network cut."""

import functools
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageChops, ImageFilter
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
VIEWS = ((1280, "light"), (390, "dark"))
# What passes is counted and not described, which takes half of the time.
AXE = {"preload": False, "resultTypes": ["violations"]}
IN_PAGE = Path(__file__).with_name("in_page.js").read_text("utf-8")
READY = """async () => {
  if (window.MathJax) await MathJax.startup.promise;
  await document.fonts.ready;
  // Pictures below the fold load lazily.
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => 0);
  }
}"""
CUT = """() => {
  const cut = (formula) => {
    const line = formula.closest("p, li, td, dd, figcaption, caption");
    const width = formula.getBoundingClientRect().width;
    return line?.clientWidth && width > line.clientWidth + 1 && formula.parentElement.tabIndex < 0;
  };
  return [...document.querySelectorAll(".bd-article span.math > mjx-container")].filter(cut).length;
}"""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site on a loopback port, while the block lasts."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless."""
    with sync_playwright() as playwright:
        options = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


def settle(page: Page, address: str) -> None:
    """Open a page and wait until formulas, fonts and pictures are there."""
    page.goto(address, wait_until="load")
    page.wait_for_function("() => !window.MathJax || (MathJax.startup && MathJax.startup.promise)")
    page.evaluate(READY)


def unseen(notebook: Path, contrast: float = 3, columns: int = 1) -> list[str]:
    """Figures of an executed notebook that are hard to see: pale lines, panels side by side."""
    found = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("companion", {})
            place = f"{notebook.stem}: {about.get('name')}"
            if about.get("contrast", 21) < contrast:
                found.append(f"{place}: a line has a contrast of {about['contrast']} : 1 on white")
            if about.get("columns", 1) > columns:
                found.append(f"{place}: {about['columns']} panels side by side")
    return found


def heavy(site: Path, whole: float = 30e6, page: float = 1.5e6) -> list[str]:
    """What makes a site too large, in bytes: all files together, or one page."""
    files = [p for p in site.rglob("*") if p.is_file()]
    total = sum(p.stat().st_size for p in files)
    found = [f"the site has {total / 1e6:.1f} MB"] if total > whole else []
    large = [p for p in files if p.suffix == ".html" and p.stat().st_size > page]
    return found + [f"{p.relative_to(site)} has {p.stat().st_size / 1e6:.1f} MB" for p in large]


def picture(chromium: Browser, address: str, hide: str = "") -> Image.Image:
    """The first screen of a page as a small grey picture.

    Layout shows in it and letters do not, nor the list of chapters, which grows.
    """
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(120_000)
    settle(page, address)
    page.add_style_tag(content=".bd-sidebar-primary nav { visibility: hidden; } " + hide)
    shot = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    return shot.convert("L").resize((320, 225), Image.Resampling.BOX)


class Explored(NamedTuple):
    """What an explorable said to keys, a finger and its choices."""

    errors: list[str]
    first: str
    last: str
    before_last: str
    touched: str
    chosen: list[str]
    value: str
    said: str
    target: float
    drawn: int


def explored(chromium: Browser, address: str, page_name: str, name: str) -> Explored:
    """Use an explorable on a phone with the network cut; what it said each time."""
    errors: list[str] = []
    size = {"width": 390, "height": 900}
    context = chromium.new_context(viewport=size, has_touch=True, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(120_000)

    def watch(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            errors.append(f"outside request {route.request.url}")
            route.abort()

    page.route("**/*", watch)
    page.on("pageerror", lambda error: errors.append(f"script error: {error}"))
    settle(page, f"{address}/{page_name}")
    place = page.locator(f"#{name}")
    slider = place.locator("input[type=range]")

    def live() -> str:
        return place.locator("[data-part=live]").inner_text()

    def press(key: str) -> str:
        slider.press(key)
        return live()

    first, last, before_last = (press(key) for key in ("Home", "End", "ArrowLeft"))
    slider.press("Home")
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    touched = live()
    chosen = [live()]
    for choice in place.locator("select").all():
        for index in range(1, min(3, choice.locator("option").count())):
            choice.select_option(index=index)
            chosen.append(place.inner_text())
    found = Explored(
        errors,
        first,
        last,
        before_last,
        touched,
        chosen,
        value=place.locator("[data-part=value]").inner_text(),
        said=slider.get_attribute("aria-valuetext") or "",
        target=box["height"],
        drawn=place.locator("svg polyline").count(),
    )
    context.close()
    return found


def cut_formulas(chromium: Browser, address: str, without: str = "") -> int:
    """Formulas in lines of text that a phone cuts, with no way to scroll; `without` a file."""
    context = chromium.new_context(viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    if without:
        page.route(f"**/{without}*", lambda route: route.abort())
    settle(page, address)
    page.wait_for_timeout(500)
    found = page.evaluate(CUT)
    context.close()
    return found


def difference(one: Image.Image, other: Image.Image) -> float:
    """Share of the picture where two differ in ink, blurred so that a font does not count."""

    def ink(picture: Image.Image) -> Image.Image:
        strong = picture.point(lambda tone: max(0, 255 - 6 * (255 - tone)))
        return strong.resize((24, 17), Image.Resampling.BOX).filter(ImageFilter.BoxBlur(1))

    return sum(ImageChops.difference(ink(one), ink(other)).histogram()[24:]) / (24 * 17)


def problems(
    chromium: Browser,
    address: str,
    page_name: str,
    width: int,
    theme: str = "light",
    axe: bool = True,
) -> list[str]:
    """Everything wrong with one page at one width and in one theme, each as one line."""
    found: list[str] = []
    size = {"width": width, "height": 900}
    context = chromium.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(120_000)  # a loaded machine is slow; no time is measured here

    def watch(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            found.append(f"outside request {route.request.url}")
            route.abort()

    def listen(message):
        if message.type == "error":
            found.append(f"console error: {message.text}")

    def receive(response):
        if response.status >= 400:
            found.append(f"{response.status} for {response.url.removeprefix(address)}")

    page.route("**/*", watch)
    page.on("console", listen)
    page.on("response", receive)
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    settle(page, f"{address}/{page_name}")
    found += page.evaluate(IN_PAGE)
    links = page.eval_on_selector_all(
        "a[href]", "links => links.map(a => a.href.split('#')[0].split('?')[0])"
    )
    for link in sorted({link for link in links if link.startswith(address)}):
        if broken(link):
            found.append(f"broken link {link.removeprefix(address)}")
    if axe:
        found += accessibility(page)
    context.close()
    return [f"{page_name} at {width}, {theme}: {problem}" for problem in dict.fromkeys(found)]


@functools.cache
def broken(link: str) -> bool:
    """Whether a link of a served site leads nowhere. Pages share most: each is asked once."""
    return requests.head(link, timeout=120).status_code >= 400


def accessibility(page: Page) -> list[str]:
    """What axe calls serious or critical."""
    found = []
    for violation in Axe().run(page, options=AXE).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            nodes = [node["target"][0] for node in violation["nodes"][:3] if node["target"]]
            told = f"accessibility violation {violation['id']} at {', '.join(nodes)}"
            found.append(f"{violation['impact']} {told}")
    return found
