"""A report: one executed notebook as one self-contained HTML page, its summary first."""

import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from companion import execute

FORMAT = "companion report, 1"
ROLE = re.compile(r"\{\w+\}`([^`<]*?)(?: <[^`]*>)?`")  # a cross-reference of the book
HEADING = re.compile(r"^##? +(.+)$", re.M)
STYLE = Path(__file__).with_name("templates").joinpath("report.css").read_text("utf-8")


def report(
    notebook: Path, output: Path, parameters: dict[str, Any], data: Path | None = None
) -> None:
    """Execute a notebook, and write it as a page, as a notebook beside it, and its facts as JSON.

    **Arguments:** `output`: the page; the executed notebook gets its name with the suffix `.ipynb`.
    `data`: where the JSON goes, see `facts`; None leaves it out.

    **Raises:** `ValueError` for bad parameters or a place that can't be written, before the run;
    `PapermillExecutionError` for what the notebook can't do.
    """
    output = output.expanduser()
    data = data and data.expanduser()
    executed = output.with_suffix(".ipynb")
    if output == executed:
        raise ValueError(f"output = {output}: the executed notebook goes there; end it with .html")
    real = os.path.realpath
    if data is not None and real(data) in (real(output), real(executed)):
        raise ValueError(f"output = {output}, json = {data}: one place for both; name another")
    for place in (output, executed, data):
        if place is not None:
            execute.check_place(place)
    execute.execute(notebook, executed, "laptop", parameters)
    made = nbformat.read(executed, as_version=4)
    write_whole(output, page(made))
    if data is not None:
        write_whole(data, json.dumps(facts(made), indent=1, ensure_ascii=False) + "\n")


def page(notebook: NotebookNode) -> str:
    """The notebook as a page without scripts, links or code, that asks nothing of the network.

    Cells tagged `summary` come first; the others follow folded, a fold for each heading. Cells
    tagged `book` are left out.
    """
    cells = [cell for cell in notebook.cells if "book" not in _tags(cell)]
    first = [cell for cell in cells if "summary" in _tags(cell)]
    (title, opening), *parts = _parts([cell for cell in cells if "summary" not in _tags(cell)])
    folds = [("The question", opening), *parts]
    body = f'<h1>{title}</h1><section class="first">{_html(first)}</section>' + "".join(
        f"<details><summary><h2>{heading}</h2></summary>{_html(part)}</details>"
        for heading, part in folds
    )
    head = f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    head = f'<meta charset="utf-8">{head}<title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>'
    )


def facts(notebook: NotebookNode) -> dict[str, Any]:
    """What a report says, for a program.

    - `format`: the name and version of this form.
    - `parameters`: the notebook's, with the values that it had.
    - `answer`: its computed answer, in Markdown.
    - `findings`: a list of key, quantity, paper, measured (value, low, high, n; null for what is
      not finite), verdict and comment.
    - `figures`: a list of name, caption and alt text.
    - `provenance`: versions, device, run time, sample sizes.
    """
    said = [output.metadata["companion"] for output in _outputs(notebook.cells, "companion")]
    merged = {key: value for about in said for key, value in about.items()}
    parameters: dict[str, Any] = {}
    for cell in notebook.cells:
        if {"parameters", "injected-parameters"} & _tags(cell):
            parameters |= execute.literals(cell.source)
    return {
        "format": FORMAT,
        "parameters": parameters,
        "answer": merged.get("answer"),
        "findings": merged.get("findings", []),
        "figures": [about for about in said if "alt" in about],
        "provenance": merged.get("provenance", {}),
    }


def _parts(cells: Sequence[NotebookNode]) -> list[tuple[str, list[NotebookNode]]]:
    """The cells under each heading of the first two levels, in order; the first is the title."""
    parts: list[tuple[str, list[NotebookNode]]] = [("Report", [])]
    for cell in cells:
        if cell.cell_type != "markdown":
            parts[-1][1].append(cell)
            continue
        before, *sections = HEADING.split(cell.source)
        parts[-1][1].append(nbformat.v4.new_markdown_cell(before))
        for heading, text in zip(sections[::2], sections[1::2], strict=True):
            parts.append((html.escape(heading), [nbformat.v4.new_markdown_cell(text)]))
    return parts[1:] if len(parts) > 1 else parts


def _html(cells: Sequence[NotebookNode]) -> str:
    shown = [_shown(cell) for cell in cells]
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=shown))
    return body


def _shown(cell: NotebookNode) -> NotebookNode:
    cell = nbformat.from_dict(cell)
    if cell.cell_type == "markdown":
        cell.source = ROLE.sub(r"\1", cell.source)
        return cell
    cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
    for output in _outputs([cell], "companion"):
        about = output.metadata["companion"]
        if "alt" in about:
            alt, caption = (html.escape(about[key]) for key in ("alt", "caption"))
            picture = output.data["image/png"].strip()
            image = f'<img src="data:image/png;base64,{picture}" alt="{alt}">'
            inside = f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
            output.data = {"text/html": inside}
    return cell


def _outputs(cells: Sequence[NotebookNode], key: str) -> Iterator[NotebookNode]:
    for cell in cells:
        for output in cell.get("outputs", []):
            if key in output.get("metadata", {}):
                yield output


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def write_whole(place: Path, content: str) -> None:
    """Write a file that appears only when it is whole."""
    with execute.beside(place, "writing") as scratch:
        written = scratch / place.name
        written.write_text(content, encoding="utf-8")
        written.replace(place)
