"""The pages: gate the executed chapters, stage them in book/chapters, build with jupyter-book, swap the site in."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from gates import faults


def main() -> int:
    """Build the site beside the old one and put it in place only when Sphinx had nothing to warn of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True)
    preset = parser.parse_args().preset
    chapters = yaml.safe_load(Path(f"presets/{preset}.yaml").read_text())
    executed = {name: Path("_build/executed") / preset / f"{name}.ipynb" for name in chapters}
    found = [fault for name, path in executed.items() for fault in faults(path, Path("notebooks") / f"{name}.ipynb")]
    if found:
        print("headbound: not published:", *found, sep="\n  ", file=sys.stderr)
        return 1
    staged, staging, site = Path("book/chapters"), Path("_build/staging"), Path("_build/html")
    for folder in (staged, staging):
        shutil.rmtree(folder, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in executed.values():
        shutil.copy(path, staged)
    # Absolute, since sphinx-external-toc takes relative paths as relative to the book's folder.
    files = ["--config", Path("_config.yml").resolve(), "--toc", Path("_toc.yml").resolve()]
    command = ["jupyter-book", "build", "book", *files, "-n", "-W", "--keep-going"]
    log = Path("_build/sphinx.log")
    with log.open("w") as file:
        built = subprocess.run([*command, "--path-output", staging], stdout=file, stderr=subprocess.STDOUT)
    if built.returncode:
        lines = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
        print(f"headbound: Sphinx refused the book ({log}):", *lines, sep="\n  ", file=sys.stderr)
        return built.returncode
    shutil.rmtree(site, ignore_errors=True)
    (staging / "_build" / "html").replace(site)
    shutil.rmtree(staging)
    return 0


if __name__ == "__main__":
    sys.exit(main())
