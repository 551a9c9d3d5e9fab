"""What the theme adds and no book of this kind has a use for; and where the site will live."""

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from sphinx.application import Sphinx

KEPT = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")  # of MathJax, 24 MB otherwise
LOCAL = "http://localhost:8000/"  # where `make serve` shows the book
CITATIONS = 'role="list" class="citation-list"'
DOWNLOAD = {"icon": "fas fa-download", "tooltip": "Download this chapter's notebook"}
LOST = Path(__file__).with_name("templates") / "lost.html"


def set_up_site(app: Sphinx, config: Any) -> None:
    """What every book's site has; where it will live, its builder may say in HEADBOUND_URL."""
    address = os.environ.get("HEADBOUND_URL") or config.html_baseurl or LOCAL
    config.html_baseurl = config.ogp_site_url = address.rstrip("/") + "/"
    home = config.notfound_urls_prefix = urlparse(config.html_baseurl).path
    body = LOST.read_text("utf-8").format(home=home)
    config.notfound_context = {"title": "Not found", "body": body}
    config.sitemap_url_scheme = "{link}"
    config.sitemap_excludes = ["404.html", "genindex.html", "search.html", "prf-prf.html"]
    config.ogp_site_name = config.html_title
    config.ogp_custom_meta_tags = ['<meta name="twitter:card" content="summary_large_image">']
    config.smartquotes = False  # a token is shown as it is
    config.html_context.setdefault("default_mode", "auto")
    config.html_static_path.append(str(Path(__file__).parent / "static"))
    extra = Path(app.srcdir, "generated", "extra")
    if extra.exists():
        config.html_extra_path.append(str(extra))
    if (extra / "front.png").exists():
        config.ogp_image = "front.png"


def trim_page(app: Sphinx, page: str, template: str, context: dict, doctree: Any) -> None:
    """What the theme puts on a page, corrected."""
    # No page runs code on another host; the theme adds thebe's scripts twice, which is an error.
    kept = []
    for script in context.get("script_files", []):
        told = f"{script} {getattr(script, 'attributes', '')}"
        if "thebe" not in told.lower():
            kept.append(script)
    context["script_files"] = kept
    # docutils calls the bibliography a list, yet not its entries items: screen readers stumble.
    context["body"] = context.get("body", "").replace(CITATIONS, 'class="citation-list"')
    if app.config.html_baseurl == LOCAL:
        context["pageurl"] = None  # no canonical address
    # One button downloads a chapter's notebook; no other source is offered.
    buttons = []
    for button in context.get("header_buttons", []):
        entries = [button]
        if button.get("label") == "download-buttons":
            notebooks = [e for e in button["buttons"] if e.get("url", "").endswith(".ipynb")]
            entries = [entry | DOWNLOAD for entry in notebooks]
        buttons += entries
    context["header_buttons"] = buttons


def prune_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Keep the parts of MathJax that the pages load."""
    folder = Path(app.outdir) / "_static" / "mathjax"
    if exception or not folder.exists():
        return
    spare = folder.with_name("mathjax-kept")
    for part in KEPT:
        (spare / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).rename(spare / part)
    shutil.rmtree(folder)
    spare.rename(folder)


def write_one_page_alike(app: Sphinx) -> None:
    """Give the builder of one long page, which the PDF is printed from, what the pages have.

    Once an extension registers a node for it by name, Sphinx forgets the others' for `html`.
    """
    handlers = app.registry.translation_handlers
    handlers["singlehtml"] = handlers.get("html", {}) | handlers.get("singlehtml", {})


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect, after the extensions whose work this corrects."""
    for extension in ("sphinx_sitemap", "notfound.extension", "sphinxext.opengraph"):
        app.setup_extension(extension)
    app.add_css_file("companion.css", priority=100)
    app.add_js_file("companion.js")
    app.connect("config-inited", set_up_site, priority=1)
    app.connect("builder-inited", write_one_page_alike)
    app.connect("html-page-context", trim_page, priority=999)
    app.connect("build-finished", prune_mathjax, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
