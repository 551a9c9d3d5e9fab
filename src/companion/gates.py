"""The gates between the executed chapters and the book: nothing broken, stale or undescribed is published."""

from pathlib import Path

import nbformat

from companion.execute import source_hash


def faults(executed: Path, notebook: Path) -> list[str]:
    """Everything that keeps an executed chapter out of the book, each as one line."""
    content = nbformat.read(executed, as_version=4)
    found = []
    if content.metadata.get("papermill", {}).get("exception"):
        found.append("papermill recorded an exception")
    if content.metadata.get("companion", {}).get("source") != source_hash(
        nbformat.read(notebook, as_version=4)
    ):
        found.append("stale: the notebook has changed since it was executed")
    for number, cell in enumerate(content.cells):
        for output in cell.get("outputs", []):
            found += [f"cell {number}: {fault}" for fault in _output_faults(output)]
        if sum("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) > 1:
            found.append(f"cell {number}: more than one figure; give each its own cell")
    return [f"{executed.stem}: {fault}" for fault in found]


def _output_faults(output: nbformat.NotebookNode) -> list[str]:
    if output.output_type == "error":
        return [f"error output {output.ename}: {output.evalue}"]
    if output.output_type == "stream" and output.name == "stderr":
        return [
            f"text on standard error: {output.text.strip().splitlines()[0] if output.text.strip() else ''}"
        ]
    if any(kind.startswith("image/") for kind in output.get("data", {})):
        alt = output.metadata.get("companion", {}).get("alt", "")
        return (
            [] if alt.strip() else ["a figure without alt text; show it with companion.chapter.show"]
        )
    return []
