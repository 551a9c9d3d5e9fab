"""What a browser finds wrong with a built page, with the network cut."""

import functools
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageChops, ImageFilter
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
VIEWS = ((1280, "light"), (390, "dark"))
IN_PAGE = """() => {
  const found = [];
  for (const image of document.images) {
    if (!(image.complete && image.naturalWidth)) found.push(`broken image ${image.getAttribute('src')}`);
    const alt = (image.getAttribute('alt') || '').trim();
    const file = (image.getAttribute('src') || '').split('/').pop();
    if (image.closest('figure, .cell_output') && (!alt || alt.includes(file))) {
      found.push(`image without alt text ${file}`);
    }
  }
  const alts = [...document.images].map(image => image.alt).filter(alt => alt.length > 20);
  if (new Set(alts).size < alts.length) found.push('two images with the same alt text');
  for (const math of document.querySelectorAll('.math')) {
    if (!math.querySelector('mjx-container')) found.push(`formula not rendered: ${math.textContent.slice(0, 40)}`);
  }
  for (const error of document.querySelectorAll('mjx-merror')) {
    found.push(`formula with an error: ${error.textContent}`);
  }
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) found.push(`wider than the page by ${wide} pixels`);
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    const target = decodeURIComponent(link.getAttribute('href').slice(1));
    if (target && !document.getElementById(target)) found.push(`link to a missing place #${target}`);
  }
  return found;
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
    page.evaluate(
        "async () => { if (window.MathJax) await MathJax.startup.promise; await document.fonts.ready; }"
    )
    # Pictures below the fold load lazily.
    page.evaluate(
        "() => Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); }))"
    )


def heavy(site: Path, whole: float = 30e6, page: float = 1.5e6) -> list[str]:
    """What makes a site too large, in bytes: all files together, or one page."""
    files = [p for p in site.rglob("*") if p.is_file()]
    total = sum(p.stat().st_size for p in files)
    found = [f"the site has {total / 1e6:.1f} MB"] if total > whole else []
    large = [p for p in files if p.suffix == ".html" and p.stat().st_size > page]
    return found + [f"{p.relative_to(site)} has {p.stat().st_size / 1e6:.1f} MB" for p in large]


def picture(chromium: Browser, address: str, hide: str = "") -> Image.Image:
    """The first screen of a page as a small grey picture, in which layout shows and letters do not, nor the list of
    chapters, which grows."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(120_000)
    settle(page, address)
    page.add_style_tag(content=".bd-sidebar-primary nav { visibility: hidden; } " + hide)
    shot = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    return shot.convert("L").resize((320, 225), Image.Resampling.BOX)


def cut_formulas(chromium: Browser, address: str, without: str = "") -> int:
    """Formulas in lines of text that a phone shows only a part of, with no way to scroll; `without` a file."""
    context = chromium.new_context(viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    if without:
        page.route(f"**/{without}*", lambda route: route.abort())
    settle(page, address)
    page.wait_for_timeout(500)
    found = page.evaluate(
        """() => [...document.querySelectorAll(".bd-article span.math > mjx-container")].filter(formula => {
            const line = formula.closest("p, li, td, dd, figcaption, caption");
            const width = formula.getBoundingClientRect().width;
            return line?.clientWidth && width > line.clientWidth + 1 && formula.parentElement.tabIndex < 0;
        }).length"""
    )
    context.close()
    return found


def difference(one: Image.Image, other: Image.Image) -> float:
    """Share of the picture where two of them differ in ink, blurred so that another font does not count."""

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

    page.route("**/*", watch)
    page.on(
        "console",
        lambda message: message.type == "error" and found.append(f"console error: {message.text}"),
    )
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    page.on(
        "response",
        lambda r: r.status >= 400 and found.append(f"{r.status} for {r.url.removeprefix(address)}"),
    )
    settle(page, f"{address}/{page_name}")
    found += page.evaluate(IN_PAGE)
    links = page.eval_on_selector_all(
        "a[href]", "links => links.map(a => a.href.split('#')[0].split('?')[0])"
    )
    for link in sorted({link for link in links if link.startswith(address)}):
        if context.request.head(link).status >= 400:
            found.append(f"broken link {link.removeprefix(address)}")
    if axe:
        for violation in Axe().run(page, options={"preload": False}).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                where = ", ".join(
                    node["target"][0] for node in violation["nodes"][:3] if node["target"]
                )
                found.append(
                    f"{violation['impact']} accessibility violation {violation['id']} at {where}"
                )
    context.close()
    return [f"{page_name} at {width}, {theme}: {problem}" for problem in dict.fromkeys(found)]
