"""The whole book, or a chapter of it, through Snakemake: one line a chapter while it works, all other talk in a log."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
import yaml
from filelock import FileLock, Timeout
from rich.live import Live
from rich.table import Table

BUILD, LOG, TIMES = Path("_build"), Path("_build/book.log"), Path("_build/times.json")
SILENCE = 8  # seconds after which something is printed, where no terminal shows a table
BAR = 20  # characters
# Not the script of that name: its first line names a Python by a path, and the folder may have moved.
BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
BESIDE = ("glossary", "references", "rest")  # pages that a chapter alone comes with
CHANGED = "Verdicts that differ"  # how the publishing step begins what a reader must see


class Step(NamedTuple):
    """A job that a reader sees: its name, its result, what is there while it runs, seconds it took last."""

    name: str
    output: Path
    running: str  # below `_build`
    before: float | None

    def share(self) -> float | None:
        """How much of a running step is done; None where it does not run."""
        found = next(BUILD.glob(self.running), None)
        if found is None:
            return None
        try:
            cells = nbformat.read(found, as_version=4).cells
        except (OSError, ValueError):  # not a notebook, or one that is being written
            return 0.0
        done = [c.metadata.get("papermill", {}).get("status") == "completed" for c in cells]
        return sum(done) / max(1, len(done))


def names(preset: str, asked: Sequence[str] = ()) -> list[str]:
    """The chapters of a preset, those alone that `asked` names by a beginning such as `02`.

    **Raises:** `ValueError` for a preset or a chapter that is not there.
    """
    presets = sorted(path.stem for path in Path("presets").glob("*.yaml"))
    if preset not in presets:
        raise ValueError(f"PRESET = {preset}: must be one of {', '.join(presets) or 'none here'}")
    chapters = yaml.safe_load(Path(f"presets/{preset}.yaml").read_text(encoding="utf-8"))
    for beginning in asked:
        if not any(name.startswith(beginning) for name in chapters):
            raise ValueError(f"chapter = {beginning}: must begin one of {', '.join(chapters)}")
    return [name for name in chapters if not asked or name.startswith(tuple(asked))]


def build(preset: str, asked: Sequence[str], cores: int) -> int:
    """Execute what is stale and render it; the exit status.

    A lock of the operating system keeps two builds apart and dies with its owner.

    **Raises:** `ValueError` as `names`.
    """
    chapters = names(preset, asked)
    pages = [BUILD / "html" / "index.html"]
    if asked:
        pages = [BUILD / "page" / preset / name / "index.html" for name in chapters]
    BUILD.mkdir(exist_ok=True)
    try:
        with FileLock(BUILD / ".lock", timeout=0):
            status = _run(preset, [str(page) for page in pages], cores)
    except Timeout:
        raise ValueError("another build is at work here; wait for it to end") from None
    if status:
        _tell_failure()
    else:
        where = ", ".join(str(page.resolve()) for page in pages)
        print(*_said(CHANGED), sep="\n", end="")
        print(f"The book ({preset}) is ready: open {where}", flush=True)
    return status


def _run(preset: str, targets: list[str], cores: int) -> int:
    options = ["--snakefile", "workflow/Snakefile", "--cores", str(cores)]
    # One chapter or checkpoint that fails keeps no other from being finished.
    # Snakemake's own lock survives a kill -9 and would have to be removed by hand; ours does not.
    options += ["--nolock", "--keep-going", "--rerun-incomplete"]
    memory = int(0.8 * psutil.virtual_memory().total / 2**30)
    options += ["--resources", f"memory_gb={max(4, memory)}", "--config", f"preset={preset}"]
    command = [sys.executable, "-m", "snakemake", *options]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": programs, "PYTHONUTF8": "1"}
    with LOG.open("w", encoding="utf-8") as log:
        told = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        planned = subprocess.run([*command, "--dry-run", "--", *targets], **told)
        plan = LOG.read_text(encoding="utf-8")
        if planned.returncode or "Nothing to be done" in plan:
            return planned.returncode
        log.seek(0)
        log.truncate()
        steps = _steps(preset, plan)
        work = subprocess.Popen([*command, "--quiet", "rules", "--", *targets], **told)
        try:
            _watch(work, steps)
        finally:
            if work.poll() is None:
                work.terminate()
                work.wait()
    return work.returncode


def _steps(preset: str, plan: str) -> list[Step]:
    """What a dry run says will be done."""
    folder = f"executed/{preset}"
    times = _times()
    found = []
    for file in re.findall(rf"output: {BUILD}/{folder}/(\S+)", plan):
        name = Path(file).stem
        running = f"{folder}/.running-*/{file}" if file != name else f"{folder}/{name}.running"
        found.append(Step(name, BUILD / folder / file, running, times.get(name)))
    if f"output: {BUILD}/html/" in plan:
        found.append(Step("pages", BUILD / "html/index.html", "staging", times.get("pages")))
    return found


def _times() -> dict[str, float]:
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


class _Clock:
    """What is known of a build's steps as it goes on."""

    def __init__(self, steps: list[Step]) -> None:
        self.begin = time.time()
        self.started: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.steps = steps

    def look(self) -> list[Step]:
        """Look once at the files; the steps that have ended since the last look."""
        ended = []
        for step in self.steps:
            share = step.share()
            if share is not None:
                self.started.setdefault(step.name, time.time())
                self.shares[step.name] = share
            made = step.output.exists() and step.output.stat().st_mtime >= self.begin
            if made and step.name not in self.took:
                self.took[step.name] = time.time() - self.started.get(step.name, self.begin)
                ended.append(step)
        return ended

    def left(self) -> str:
        """The time left, from what the steps took last."""
        waiting = [step for step in self.steps if step.name not in self.took]
        if any(step.before is None for step in waiting):
            return "time left unknown until it was built once"
        now = time.time()
        each = [step.before - (now - self.started.get(step.name, now)) for step in waiting]
        seconds = sum(max(0.0, rest) for rest in each) / 2
        return f"about {max(1, round(seconds / 60))} min left"

    def line(self, step: Step) -> tuple[str, str]:
        """A step's state in words."""
        if step.name in self.took:
            return step.name, f"done in {self.took[step.name]:.0f} s"
        if step.name in self.started:
            full = round(BAR * self.shares[step.name])
            return step.name, f"running {'█' * full}{'░' * (BAR - full)}"
        return step.name, "waiting"


def _watch(work: subprocess.Popen, steps: list[Step]) -> None:
    clock = _Clock(steps)
    show = _show_table if sys.stdout.isatty() else _show_lines
    show(work, clock)
    TIMES.write_text(json.dumps(_times() | clock.took, indent=1), encoding="utf-8")


def _show_table(work: subprocess.Popen, clock: _Clock) -> None:
    with Live(refresh_per_second=2) as live:
        while work.poll() is None:
            clock.look()
            table = Table(caption=clock.left(), show_header=False, box=None)
            for step in clock.steps:
                table.add_row(*clock.line(step))
            live.update(table)
            time.sleep(1)
        clock.look()


def _show_lines(work: subprocess.Popen, clock: _Clock) -> None:
    total = len(clock.steps)
    print(f"{total} steps to do: {', '.join(step.name for step in clock.steps)}", flush=True)
    quiet = time.time()
    dotted = False
    while work.poll() is None:
        for step in clock.look():
            name, state = clock.line(step)
            start = "\n" if dotted else ""
            print(
                f"{start}{name}: {state} ({len(clock.took)} of {total}; {clock.left()})", flush=True
            )
            dotted, quiet = False, time.time()
        if time.time() - quiet > SILENCE:
            print(".", end="", flush=True)
            dotted, quiet = True, time.time()
        time.sleep(0.5)
    clock.look()
    if dotted:
        print(flush=True)


def _tell_failure() -> None:
    said = (
        _said("headbound: ") or LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    )
    print(*said, sep="\n", file=sys.stderr)
    told = f"not built; what was finished is kept; all that was said is in {LOG.resolve()}"
    print(f"headbound: the book was {told}", file=sys.stderr)


def _said(beginning: str) -> list[str]:
    """The lines of the log that begin so, and what is set in below them."""
    said = []
    ours = False
    for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines():
        ours = line.startswith(beginning) or (ours and line.startswith("  "))
        said += [line] if ours else []
    return said


def page(executed: Path, output: Path) -> int:
    """Render one executed chapter by itself, with the glossary and the references; the exit status.

    Links to what is not there become plain text.
    """
    source = output.parent / "source"
    shutil.rmtree(output.parent, ignore_errors=True)
    shutil.copytree("book", source, ignore=shutil.ignore_patterns("chapters", "generated"))
    shutil.copy(executed, source)
    (source / "rest.md").write_text("# The rest of the book\n\n`make book` builds it.\n")
    kept = [path.stem for path in source.glob("*.md") if path.stem in BESIDE]
    toc = {
        "format": "jb-book",
        "root": executed.stem,
        "chapters": [{"file": name} for name in sorted(kept)],
    }
    contents = output.parent / "_toc.yml"
    contents.write_text(yaml.safe_dump(toc), encoding="utf-8")
    command = [*BOOK, "build", source, "--toc", contents.resolve()]
    command += ["--config", Path("_config.yml").resolve(), "--path-output", output.parent / "built"]
    built = subprocess.run(command, stdout=subprocess.DEVNULL)
    if built.returncode == 0:
        for file in (output.parent / "built" / "_build" / "html").iterdir():
            file.replace(output.parent / file.name)
    return built.returncode


if __name__ == "__main__":
    sys.exit(page(Path(sys.argv[1]), Path(sys.argv[2])))
