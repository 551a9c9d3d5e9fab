"""The book as a PDF: all pages as one, by Sphinx, printed by a headless Chromium."""

import shutil
from pathlib import Path

from companion.site import SITE, STAGING, sphinx

OUTPUT = Path("_build/book.pdf")
NAMES = ("chromium", "chromium-browser", "google-chrome")
UNFOLD = Path(__file__).with_name("templates") / "unfold.js"
PAGE = '<span class="pageNumber"></span>'
FOOTER = f'<div style="font-size: 8px; width: 100%; text-align: center">{PAGE}</div>'


def print_book() -> int:
    """Print the staged book; without a Chromium say so and leave it. Returns the exit status.

    **Raises:** `ValueError` where no book was built.
    """
    if not SITE.exists():
        raise ValueError(f"{SITE}: no built book here; run `headbound book` first")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if not chromium:
        print(f"headbound: no Chromium on this machine ({', '.join(NAMES)}), so no PDF is made")
        return 0
    from playwright.sync_api import sync_playwright  # of use here alone

    if status := sphinx("singlehtml"):
        return status
    (whole,) = STAGING.rglob("singlehtml/index.html")
    margin = {"top": "16mm", "bottom": "18mm", "left": "14mm", "right": "14mm"}
    look = {"format": "A4", "margin": margin, "print_background": True, "outline": True}
    look |= {"tagged": True, "display_header_footer": True, "header_template": "<i></i>"}
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(whole.resolve().as_uri(), wait_until="load")
        page.evaluate(UNFOLD.read_text("utf-8"))
        page.pdf(path=OUTPUT.with_suffix(".tmp"), footer_template=FOOTER, **look)
        browser.close()
    OUTPUT.with_suffix(".tmp").replace(OUTPUT)
    shutil.rmtree(STAGING)
    print(f"The book as a PDF: {OUTPUT.resolve()}")
    return 0
