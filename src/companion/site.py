"""The site: gate the executed chapters, stage them with the computed pages, and build."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import yaml

from companion import gates, pages, results
from companion.build import names
from companion.execute import outputs
from companion.results import Change, Chapter
from companion.words import markdown

STAGED, GENERATED = Path("book/chapters"), Path("book/generated")
STAGING, SITE = Path("_build/staging"), Path("_build/html")
BESIDE = ("glossary", "references", "generated/rest")  # pages that a chapter alone comes with


def executed(preset: str) -> list[Path]:
    """The executed notebooks of a preset, in the order of the contents.

    **Raises:** `ValueError` for a preset that is not there.
    """
    contents = Path("_toc.yml").read_text("utf-8")
    ordered = sorted(names(preset), key=contents.find)
    return [Path("_build/executed", preset, f"{name}.ipynb") for name in ordered]


def publish(preset: str, builder: str = "html") -> int:
    """Build the site beside the old one, and put it in place when Sphinx had nothing to warn of.

    A verdict that is not the signed one is told and marked, and stops nothing. The builder
    `linkcheck` asks the other hosts that the book links to instead. Returns the exit status.
    """
    paths = executed(preset)
    broken = [fault for path in paths for fault in gates.faults(path, Path("notebooks", path.name))]
    if broken:
        print("headbound: not published:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    found = chapters(preset)
    changes = results.changes(preset, found)
    stage(paths, changes)
    pages.write(found, preset, GENERATED)
    status = sphinx(builder)
    if status == 0:
        if builder == "html":
            shutil.rmtree(SITE, ignore_errors=True)
            (STAGING / "_build" / "html").replace(SITE)
        shutil.rmtree(STAGING)
    if changes:
        print("Verdicts that differ from the signed ones:", *changes, sep="\n  ")
    return status


def chapters(preset: str) -> list[Chapter]:
    """What the executed chapters of a preset say.

    **Raises:** `ValueError` where one is not executed yet; as `executed`.
    """
    paths = executed(preset)
    missing = [path.stem for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"PRESET={preset}: chapters are not executed yet ({', '.join(missing)})")
    return [results.read(path) for path in paths]


def sign(preset: str) -> None:
    """Sign the verdicts of a preset's executed chapters.

    **Raises:** `ValueError` for a preset whose numbers mean nothing; as `chapters`.
    """
    if preset in results.EXEMPT:
        raise ValueError(f"PRESET={preset} is not signed: its numbers mean nothing")
    changed = results.sign(preset, chapters(preset))
    told = f"{results.SIGNED}: {changed} verdicts of PRESET={preset} changed"
    print(f"{told}; read `git diff {results.SIGNED}`, then commit it")


def stage(paths: Sequence[Path], changes: Sequence[Change]) -> None:
    """Put the executed chapters into the book, each changed verdict marked below its findings."""
    for folder in (STAGED, GENERATED):
        shutil.rmtree(folder, ignore_errors=True)
    STAGED.mkdir(parents=True)
    told = {change.key: f"- {markdown(change)}" for change in changes}
    for path in paths:
        content = nbformat.read(path, as_version=4)
        cells = []
        for cell in content.cells:
            cells.append(cell)
            found = [f for _, _, about in outputs([cell]) for f in about.get("findings", [])]
            lines = [told[finding["key"]] for finding in found if finding["key"] in told]
            if lines:
                lines = ["```{warning}", "A verdict above is not the signed one:\n", *lines, "```"]
                cells.append(nbformat.v4.new_markdown_cell("\n".join(lines)))
        content.cells = cells
        nbformat.write(content, STAGED / path.name)


def page(executed: str, output: str) -> int:
    """Render one executed chapter by itself, with glossary and references; the exit status.

    Links to what is not there become plain text.
    """
    folder = Path(output).parent
    for place in (STAGED, GENERATED, folder):
        place.mkdir(parents=True, exist_ok=True)
    shutil.copy(executed, STAGED)
    rest = "# The rest of the book\n\n`make book` builds it.\n"
    (GENERATED / "rest.md").write_text(rest, "utf-8")
    beside = [{"file": name} for name in BESIDE if Path("book", f"{name}.md").exists()]
    contents = {"format": "jb-book", "root": f"chapters/{Path(executed).stem}", "chapters": beside}
    toc = folder.with_suffix(".yml")
    toc.write_text(yaml.safe_dump(contents), "utf-8")
    status = _render(folder, "--toc", toc.resolve())
    if status == 0:
        shutil.copytree(folder / "_build" / "html", folder, dirs_exist_ok=True)
    return status


def sphinx(builder: str) -> int:
    """Build the staged book into the staging folder, every warning an error. Returns the status."""
    how = [] if builder == "html" else ["--builder", "custom", "--custom-builder", builder]
    toc = ["--toc", Path("_toc.yml").resolve()]
    status = _render(STAGING, *toc, "-n", "-W", "--keep-going", *how)
    if status:
        said = ("WARNING", "ERROR", "broken ")
        log = STAGING.with_suffix(".log")
        lines = log.read_text("utf-8", errors="replace").splitlines()
        told = [line for line in lines if any(word in line for word in said)]
        print(f"headbound: Sphinx refused the book ({log}):", *told, sep="\n  ", file=sys.stderr)
    return status


def _render(folder: Path, *options: str | Path) -> int:
    """Run jupyter-book into a folder, which is emptied; its talk is in a file beside."""
    shutil.rmtree(folder, ignore_errors=True)
    # Not the script of that name: its first line names a Python by a path, and folders move.
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    # Absolute, since sphinx-external-toc takes relative paths as relative to the book's folder.
    command += ["build", "book", "--config", Path("_config.yml").resolve(), *options]
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        told = {"stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.run([*command, "--path-output", folder], **told).returncode


if __name__ == "__main__":
    task = {"publish": publish, "page": page}[sys.argv[1]]
    sys.exit(task(*sys.argv[2:]))
