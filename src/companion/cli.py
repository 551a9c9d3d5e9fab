"""`make book`: check the preset, run the workflow, say where the book is."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path.cwd()


def main() -> int:
    """Run Snakemake for one preset; a lock of the operating system keeps two runs apart and dies with its owner."""
    presets = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--cores", default="2")
    parser.add_argument("targets", nargs="*", help="files of the workflow; the whole book if none")
    arguments = parser.parse_args()
    if arguments.preset not in presets:
        print(
            f"headbound: PRESET = {arguments.preset}: must be one of {', '.join(presets)}",
            file=sys.stderr,
        )
        return 2
    snakemake = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        "workflow/Snakefile",
        "--cores",
        arguments.cores,
    ]
    # One chapter or checkpoint that fails keeps no other from being finished.
    # Snakemake's own lock survives a kill -9 and would have to be removed by hand; ours does not.
    options = ["--nolock", "--keep-going", "--rerun-incomplete", "--quiet", "rules"]
    options += ["--config", f"preset={arguments.preset}"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": programs}
    (ROOT / "_build").mkdir(exist_ok=True)
    try:
        with FileLock(ROOT / "_build" / ".lock", timeout=0):
            done = subprocess.run(
                [*snakemake, *options, "--", *arguments.targets], cwd=ROOT, env=environment
            )
    except Timeout:
        print("headbound: another `make book` is at work here; wait for it to end", file=sys.stderr)
        return 1
    if done.returncode:
        print(
            "headbound: the book was not built (reasons above); what was finished is kept",
            file=sys.stderr,
        )
    elif not arguments.targets:
        print(
            f"The book ({arguments.preset}) is ready: open {ROOT / '_build' / 'html' / 'index.html'}"
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
