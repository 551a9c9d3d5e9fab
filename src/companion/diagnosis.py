"""Diagnose a model: the report of chapter 9 as one self-contained HTML page, and the notebook it was made from."""

import argparse
import html
import re
import sys
from functools import partial
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from companion.execute import execute, report_failure

ROOT = Path.cwd()
NOTEBOOK = ROOT / "notebooks" / "09_diagnose.ipynb"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 0 1rem; overflow-wrap: anywhere }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; margin: 1rem 0 }
td, th { border-bottom: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: left }
caption, figcaption { color: #444; font-size: 0.9rem; text-align: left }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto } .anchor-link { display: none }
"""


def page(report: nbformat.NotebookNode) -> str:
    """An executed diagnosis as a page that asks nothing of the network: no scripts, figures inside, captions below.

    Code, and cells tagged `book`, are left out.
    """
    report.cells = [cell for cell in report.cells if "book" not in cell.metadata.get("tags", [])]
    for cell in report.cells:
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("headbound", {})
            if "alt" in about:
                alt, caption = (html.escape(about[key]) for key in ("alt", "caption"))
                image = f'<img src="data:image/png;base64,{output.data["image/png"].strip()}" alt="{alt}">'
                output.data = {
                    "text/html": f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
                }
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(report)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}<title>Diagnosis</title></head><body>{body}</body></html>'


def diagnose(model: str, text: str, revision: str, others: list[str], output: Path) -> None:
    """Execute the notebook on a model and a text, and write the page beside it.

    **Raises:** `ValueError` for bad parameters, `PapermillExecutionError` for what the notebook can't do.
    """
    if odd := [pair for pair in others if not re.fullmatch(r"\w+=-?[\d.]+", pair)]:
        raise ValueError(f"--set {odd[0]}: must be NAME=NUMBER, such as passages=288")
    numbers = {
        name: float(value) if "." in value else int(value)
        for name, value in (x.split("=") for x in others)
    }
    executed = output.with_suffix(".ipynb")
    execute(
        NOTEBOOK,
        executed,
        "laptop",
        {"model": model, "text": text, "revision": revision, **numbers},
    )
    output.write_text(page(nbformat.read(executed, 4)), encoding="utf-8")
    print(f"The report is ready: open {output}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, a .gguf file, a Hub id, or smollm2-135m")
    parser.add_argument("--text", default="docstrings", help="a UTF-8 file, docstrings, or hf:NAME")
    parser.add_argument("--revision", default="", help="of a Hub id")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other parameters, passages=288"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    asked = parser.parse_args()
    work = partial(diagnose, asked.model, asked.text, asked.revision, asked.set, asked.output)
    return report_failure(NOTEBOOK, work)


if __name__ == "__main__":
    sys.exit(main())
