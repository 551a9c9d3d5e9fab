"""What the theme adds and this book has no use for is left out; what hosts and readers expect is put in."""

import html
import os
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

KEPT = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")  # of MathJax, 24 MB otherwise
LOCAL = "http://localhost:8000/"  # where `make serve` shows the book
NOT_FOUND = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Not found: {title}</title>
<style>:root {{ color-scheme: light dark; }}
body {{ background: light-dark(#fff, #121212); color: light-dark(#111, #eee);
font: 1.1rem/1.6 sans-serif; max-width: 40rem; margin: 15vh auto; padding: 0 1rem; }}
a {{ color: light-dark(#0b4f99, #a9cdf5); }}</style></head>
<body><main><h1>There is no such page</h1><p>It may have moved with a new edition of {title}.
<a href="{home}">The start page</a> has a map of the chapters,
and <a href="{home}search.html">the search</a> finds words.</p></main></body></html>
"""


def drop_thebe(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object
) -> None:
    """No page runs code on another host, so thebe's scripts (which the theme adds twice, an error) are dropped."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        s for s in scripts if "thebe" not in f"{s} {getattr(s, 'attributes', '')}".lower()
    ]


def mend_citations(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object
) -> None:
    """docutils calls the bibliography a list, yet not its entries list items: screen readers stumble over that."""
    if "body" in context:
        context["body"] = context["body"].replace(
            'role="list" class="citation-list"', 'class="citation-list"'
        )


def offer_notebooks(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object
) -> None:
    """One button downloads a chapter's notebook; no other source is offered."""
    buttons = []
    for button in context.get("header_buttons", []):
        if button.get("label") == "download-buttons":
            for entry in button["buttons"]:
                if entry.get("url", "").endswith(".ipynb"):
                    buttons.append(
                        entry
                        | {"icon": "fas fa-download", "tooltip": "Download this chapter's notebook"}
                    )
        else:
            buttons.append(button)
    context["header_buttons"] = buttons


def describe_page(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object
) -> None:
    """What a link to this page looks like elsewhere: title, tagline and the start page's figure."""
    tagline = app.config.html_context.get("tagline", "")
    base = app.config.html_baseurl
    picture = f"{base}_static/social.png" if base else context["pathto"]("_static/social.png", 1)
    title = context.get("title") or app.config.html_title
    about = {"og:title": title, "og:type": "article", "og:site_name": app.config.html_title}
    about |= {"og:description": tagline, "og:image": picture, "og:image:alt": tagline}
    if base:
        about["og:url"] = f"{base}{pagename}.html"
    named = {
        "description": tagline,
        "twitter:card": "summary_large_image",
        "twitter:title": title,
        "twitter:image": picture,
    }
    tags = [
        f'<meta property="{k}" content="{html.escape(str(v), quote=True)}">'
        for k, v in about.items()
    ]
    tags += [
        f'<meta name="{k}" content="{html.escape(str(v), quote=True)}">' for k, v in named.items()
    ]
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])


def take_address(app: Sphinx, config: object) -> None:
    """Where the site will live, if whoever builds it says so."""
    address = os.environ.get("HEADBOUND_URL") or app.config.html_baseurl
    app.config.html_baseurl = address.rstrip("/") + "/" if address else ""


def excuse_missing_figures(
    app: Sphinx, env: object, node: nodes.Element, content: nodes.Element
) -> nodes.Node | None:
    """A figure that a chapter can make and did not, for want of data, is named where others refer to it; a figure
    that no chapter knows stays an error."""
    name = node.get("reftarget", "")
    if node.get("reftype") not in ("numref", "ref") or not name.startswith("fig-"):
        return None
    chapters = (Path(app.srcdir) / "chapters").glob("*.ipynb")
    if any(f'\\"{name}\\"' in chapter.read_text() for chapter in chapters):
        return nodes.inline("", "a figure that this build could not make")
    return None


def write_site_files(app: Sphinx, exception: Exception | None) -> None:
    """A sitemap, a page for wrong addresses and the picture of link previews."""
    if exception or app.builder.name != "html":
        return
    out, base = Path(app.outdir), app.config.html_baseurl or LOCAL
    picture = Path(app.srcdir) / "generated" / "social.png"
    if picture.exists():
        shutil.copy(picture, out / "_static")
    pages = [name for name in sorted(app.env.found_docs) if (out / f"{name}.html").exists()]
    entries = "".join(f"<url><loc>{html.escape(base)}{name}.html</loc></url>\n" for name in pages)
    schema = "http://www.sitemaps.org/schemas/sitemap/0.9"
    sitemap = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{schema}">\n{entries}</urlset>\n'
    )
    (out / "sitemap.xml").write_text(sitemap)
    home = app.config.html_baseurl or "/"
    (out / "404.html").write_text(
        NOT_FOUND.format(title=html.escape(app.config.html_title), home=home)
    )


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


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect, after the extensions whose work this corrects."""
    app.connect("config-inited", take_address)
    for change in (drop_thebe, mend_citations, offer_notebooks, describe_page):
        app.connect("html-page-context", change, priority=999)
    app.connect("missing-reference", excuse_missing_figures)
    app.connect("build-finished", write_site_files)
    app.connect("build-finished", prune_mathjax, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
