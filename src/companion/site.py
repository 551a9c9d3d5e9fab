"""The pages: gate the executed chapters, stage them with what is computed from all of them, build with jupyter-book."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from companion import pages, results, slides
from companion.gates import faults

STAGED, GENERATED, STAGING, SITE = map(
    Path, ("book/chapters", "book/generated", "_build/staging", "_build/html")
)


def stage(preset: str) -> list[str]:
    """Put the executed chapters and the computed pages into the book; what stands against it, if anything."""
    toc = Path("_toc.yml").read_text()
    names = sorted(
        yaml.safe_load(Path(f"presets/{preset}.yaml").read_text()),
        key=lambda name: toc.find(f"/{name}"),
    )
    executed = [Path("_build/executed") / preset / f"{name}.ipynb" for name in names]
    found = [fault for path in executed for fault in faults(path, Path("notebooks") / path.name)]
    chapters = [results.read(path) for path in executed]
    found += results.faults(preset, chapters)
    if not found:
        for folder in (STAGED, GENERATED):
            shutil.rmtree(folder, ignore_errors=True)
        STAGED.mkdir(parents=True)
        for path in executed:
            shutil.copy(path, STAGED)
        pages.write(chapters, preset, GENERATED)
        slides.write(chapters, GENERATED)
    return found


def sphinx(builder: str) -> int:
    """Build the staged book into the staging folder, every warning an error; its messages where there were any."""
    shutil.rmtree(STAGING, ignore_errors=True)
    # Absolute, since sphinx-external-toc takes relative paths as relative to the book's folder.
    files = ["--config", Path("_config.yml").resolve(), "--toc", Path("_toc.yml").resolve()]
    how = [] if builder == "html" else ["--builder", "custom", "--custom-builder", builder]
    command = ["jupyter-book", "build", "book", *files, "-n", "-W", "--keep-going", *how]
    log = Path("_build/sphinx.log")
    with log.open("w") as file:
        built = subprocess.run(
            [*command, "--path-output", STAGING], stdout=file, stderr=subprocess.STDOUT
        )
    if built.returncode:
        said = ("WARNING", "ERROR", "broken ")
        lines = [
            line for line in log.read_text().splitlines() if any(word in line for word in said)
        ]
        print(f"headbound: Sphinx refused the book ({log}):", *lines, sep="\n  ", file=sys.stderr)
    return built.returncode


def main() -> int:
    """Build the site beside the old one and put it in place only when Sphinx had nothing to warn of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True)
    parser.add_argument(
        "--links", action="store_true", help="check the links to other hosts instead"
    )
    arguments = parser.parse_args()
    found = stage(arguments.preset)
    if found:
        print("headbound: not published:", *found, sep="\n  ", file=sys.stderr)
        return 1
    status = sphinx("linkcheck" if arguments.links else "html")
    if not status and not arguments.links:
        shutil.rmtree(SITE, ignore_errors=True)
        (STAGING / "_build" / "html").replace(SITE)
    if not status:
        shutil.rmtree(STAGING)
    return status


if __name__ == "__main__":
    sys.exit(main())
