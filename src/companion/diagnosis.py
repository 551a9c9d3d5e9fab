"""A report: one executed notebook as one self-contained HTML page, its summary first."""

import copy
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from companion import execute, results
from companion.execute import write_whole

FORMAT = "companion report, 1"
ROLE = re.compile(r"\{\w+\}`([^`<]*?)(?: <[^`]*>)?`")  # a cross-reference of the book
TEMPLATES = PackageLoader("companion")
HEADING = re.compile(r"^##? +(.+)$", re.M)


def report(
    notebook: Path, output: Path, parameters: dict[str, Any], data: Path | None = None
) -> None:
    """Execute a notebook, and write it as a page, as a notebook beside it, and its facts as JSON.

    **Arguments:** `output`: the page; the executed notebook gets its name with the suffix `.ipynb`.
    `data`: where the JSON goes, see `facts`; None leaves it out.

    **Raises:** `ValueError` for bad parameters or a place that can't be written, before the run;
    `execute.ChapterError` for what the notebook can't do.
    """
    executed = output.with_suffix(".ipynb")
    places = [place.expanduser() for place in (output, executed, data) if place]
    if len({os.path.realpath(place) for place in places}) < len(places):
        why = "page, executed notebook (.ipynb) and JSON need a place each; name another"
        raise ValueError(f"output = {output}, json = {data}: {why}")
    for place in places:
        execute.check_place(place)
    execute.execute(notebook, executed, "laptop", parameters)
    made = nbformat.read(places[1], as_version=4)
    write_whole(places[0], page(made))
    if data:
        write_whole(places[2], json.dumps(facts(made), indent=1, ensure_ascii=False) + "\n")


def page(notebook: NotebookNode) -> str:
    """The notebook as a page without scripts, links or code, that asks nothing of the network.

    Cells tagged `summary` come first; the others follow folded, a fold for each heading. Cells
    tagged `book` are left out.
    """
    first = []
    folded = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "summary" in tags:
            first.append(cell)
        elif "book" not in tags:
            folded.append(cell)
    (title, opening), *parts = _parts(folded)
    templates = Environment(loader=TEMPLATES, autoescape=True)
    templates.filters["shown"] = _html
    report = templates.get_template("report.html.j2")
    return report.render(title=title, first=first, folds=[("The question", opening), *parts])


def facts(notebook: NotebookNode) -> dict[str, Any]:
    """What a report says, for a program.

    - `answer`: the computed one, in Markdown.
    - `findings`: a list of key, quantity, paper, measured (value, low, high, n; null for what is
      not finite), verdict and comment.
    - `figures`: a list of name, caption and alt text.
    - `provenance`: versions, device, run time, sample sizes.
    """
    told = results.collect(notebook, "report")
    figures = [
        {"name": name, "caption": about["caption"], "alt": about["alt"]}
        for name, about in told.figures.items()
    ]
    return {
        "format": FORMAT,
        "parameters": told.parameters,
        "answer": told.answer,
        "findings": told.findings,
        "figures": figures,
        "provenance": told.provenance,
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
            inside = nbformat.v4.new_markdown_cell(text)
            parts.append((heading, [inside]))
    return parts[1:] if len(parts) > 1 else parts


def _html(cells: Sequence[NotebookNode]) -> Markup:
    shown = nbformat.v4.new_notebook(cells=copy.deepcopy(cells))
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = ROLE.sub(r"\1", cell.source)
    look = {"template_name": "basic", "template_file": "cells.html.j2"}
    look |= {"exclude_input": True, "exclude_output_prompt": True}
    return Markup(HTMLExporter(extra_loaders=[TEMPLATES], **look).from_notebook_node(shown)[0])
