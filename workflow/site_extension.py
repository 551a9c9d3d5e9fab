"""What the theme brings along and this book has no use for is left out of the pages."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

KEPT = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")  # of MathJax, 24 MB otherwise


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """No page runs code on another host, so thebe's scripts (which the theme adds twice, an error) are dropped."""
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s} {getattr(s, 'attributes', '')}".lower()]


def mend_citations(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """docutils calls the bibliography a list, yet not its entries list items: screen readers stumble over that."""
    if "body" in context:
        context["body"] = context["body"].replace('role="list" class="citation-list"', 'class="citation-list"')


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
    app.connect("html-page-context", drop_thebe, priority=999)
    app.connect("html-page-context", mend_citations, priority=999)
    app.connect("build-finished", prune_mathjax, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
