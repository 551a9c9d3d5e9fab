"""The gate between the executed chapters and the book: nothing broken or stale is published."""

from pathlib import Path

import nbformat

from companion.execute import source_hash


def faults(executed: Path, notebook: Path) -> list[str]:
    """Everything that keeps an executed chapter out of the book, each as one line."""
    content = nbformat.read(executed, as_version=4)
    found = []
    if content.metadata.get("papermill", {}).get("exception"):
        found.append("papermill recorded an exception")
    source = source_hash(nbformat.read(notebook, as_version=4))
    if content.metadata.get("companion", {}).get("source") != source:
        found.append("stale: the notebook has changed since it was executed")
    for number, cell in enumerate(content.cells):
        outputs = cell.get("outputs", [])
        told = [_fault(output) for output in outputs]
        if len(outputs) > 1 and any("image/png" in output.get("data", {}) for output in outputs):
            told.append("more than one figure, or output beside it; give each its own cell")
        found += [f"cell {number}: {fault}" for fault in told if fault]
    return [f"{executed.stem}: {fault}" for fault in found]


def _fault(output: nbformat.NotebookNode) -> str:
    if output.output_type == "error":
        return f"error output {output.ename}: {output.evalue}"
    if output.output_type == "stream" and output.name == "stderr":
        return f"text on standard error: {output.text.strip().partition(chr(10))[0]}"
    pictures = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    if pictures and not output.metadata.get("companion", {}).get("alt", "").strip():
        return "a figure without alt text; show it with companion.chapter.figure"
    return ""
