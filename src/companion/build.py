"""The book, or a chapter of it, through Snakemake: a line a chapter, all other talk in a log."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from filelock import FileLock, Timeout
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

BUILD, LOG, TIMES = Path("_build"), Path("_build/book.log"), Path("_build/times.json")
SILENCE = 8  # seconds after which a dot is printed, where no terminal shows a table
BAR = 20  # characters
BESIDE = ("glossary", "references", "rest")  # pages that a chapter alone comes with
CHANGED = "Verdicts that differ"  # how the publishing step begins what a reader must see
# Not the script of that name: its first line names a Python by a path, and folders move.
BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]


class Step(NamedTuple):
    """A job: name, result, what is below `_build` while it runs, seconds that it took last."""

    name: str
    output: Path
    running: str
    before: float | None

    def share(self) -> float | None:
        """How much of a running step is done; None where it does not run."""
        found = next(BUILD.glob(self.running), None)
        if found is None:
            return None
        try:
            cells = json.loads(found.read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError):  # no notebook, or one that is being written
            return 0.0
        states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
        return states.count("completed") / max(1, len(states))


@dataclass
class Clock:
    """What is known of a build's steps as it goes on; times in seconds."""

    steps: list[Step]
    begin: float = field(default_factory=time.time)
    started: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def look(self) -> list[Step]:
        """Look at the files; the steps that have ended since the last look."""
        now = time.time()
        ended = []
        for step in self.steps:
            share = step.share()
            if share is not None:
                self.started.setdefault(step.name, now)
                self.shares[step.name] = share
            made = step.output.exists() and step.output.stat().st_mtime >= self.begin
            if made and step.name not in self.took:
                self.took[step.name] = now - self.started.get(step.name, self.begin)
                ended.append(step)
        return ended

    def left(self) -> str:
        """The time left, from what the steps took last, two at a time."""
        now = time.time()
        seconds = 0.0
        for step in self.steps:
            if step.name in self.took:
                continue
            if step.before is None:
                return "time left unknown until it was built once"
            seconds += max(0.0, step.before - now + self.started.get(step.name, now))
        return f"about {max(1, round(seconds / 120))} min left"

    def state(self, step: Step) -> str | ProgressBar:
        """A step's state: in words, or a bar while it runs."""
        if step.name in self.took:
            return f"done in {self.took[step.name]:.0f} s"
        if step.name not in self.started:
            return "waiting"
        return ProgressBar(total=1, completed=self.shares[step.name], width=BAR)


def names(preset: str, asked: Sequence[str] = ()) -> list[str]:
    """The chapters of a preset, or those that `asked` names by a beginning such as `02`.

    **Raises:** `ValueError` for a preset or a chapter that is not there.
    """
    presets = sorted(path.stem for path in Path("presets").glob("*.yaml"))
    if not presets:
        raise ValueError(f"{Path.cwd()}: no presets/ in it; go to the book's folder")
    if preset not in presets:
        raise ValueError(f"PRESET = {preset}: must be one of {', '.join(presets)}")
    chapters = yaml.safe_load(Path(f"presets/{preset}.yaml").read_text(encoding="utf-8"))
    if not asked:
        return list(chapters)
    found = []
    for beginning in asked:
        fitting = [name for name in chapters if name.startswith(beginning)]
        if not fitting:
            known = ", ".join(chapters)
            raise ValueError(f"chapter = {beginning}: must begin one of {known}")
        found += fitting
    return found


def build(preset: str, asked: Sequence[str], cores: int) -> int:
    """Execute what is stale and render it; the exit status.

    A lock of the operating system keeps two builds apart and dies with its owner.

    **Raises:** `ValueError` as `names`, or if another build is at work.
    """
    pages = [BUILD / "html" / "index.html"]
    chapters = names(preset, asked)
    if asked:
        pages = [BUILD / "page" / preset / name / "index.html" for name in chapters]
    BUILD.mkdir(exist_ok=True)
    try:
        with FileLock(BUILD / ".lock", timeout=0):
            status = _run(preset, [str(page) for page in pages], cores)
    except Timeout:
        raise ValueError("another build is at work here; wait for it to end") from None
    if status:
        lines = _said("headbound: ") or _log()[-5:]
        kept = f"what was finished is kept; all that was said is in {LOG.resolve()}"
        print(*lines, f"headbound: the book was not built; {kept}", sep="\n", file=sys.stderr)
    else:
        where = ", ".join(str(page.resolve()) for page in pages)
        print(*_said(CHANGED), f"The book ({preset}) is ready: open {where}", sep="\n", flush=True)
    return status


def _run(preset: str, targets: list[str], cores: int) -> int:
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile"]
    command += ["--cores", str(cores), "--config", f"preset={preset}"]
    # One chapter or checkpoint that fails keeps no other from being finished.
    # Snakemake's own lock survives a kill -9 and would have to be removed by hand; ours does not.
    command += ["--nolock", "--keep-going", "--rerun-incomplete"]
    memory = int(0.8 * psutil.virtual_memory().total / 2**30)
    command += ["--resources", f"memory_gb={max(4, memory)}"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": programs, "PYTHONUTF8": "1"}
    with LOG.open("w", encoding="utf-8") as log:
        told = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        planned = subprocess.run([*command, "--dry-run", "--", *targets], **told)
        plan = "\n".join(_log())
        if planned.returncode or "Nothing to be done" in plan:
            return planned.returncode
        work = subprocess.Popen([*command, "--quiet", "rules", "--", *targets], **told)
        try:
            _watch(work, Clock(_steps(preset, plan)))
        finally:  # a signal too ends this process by an exception, see `cli.main`
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


def _watch(work: subprocess.Popen, clock: Clock) -> None:
    show = _show_table if sys.stdout.isatty() else _show_lines
    show(work, clock)
    TIMES.write_text(json.dumps(_times() | clock.took, indent=1), encoding="utf-8")


def _show_table(work: subprocess.Popen, clock: Clock) -> None:
    with Live() as live:
        while work.poll() is None:
            clock.look()
            table = Table(caption=clock.left(), show_header=False, box=None)
            for step in clock.steps:
                table.add_row(step.name, clock.state(step))
            live.update(table, refresh=True)
            time.sleep(1)


def _show_lines(work: subprocess.Popen, clock: Clock) -> None:
    total = len(clock.steps)
    print(f"{total} to do: {', '.join(step.name for step in clock.steps)}", end="", flush=True)
    heard = time.time()
    while work.poll() is None:
        for step in clock.look():
            count = f"{len(clock.took)} of {total}; {clock.left()}"
            print(f"\n{step.name}: {clock.state(step)} ({count})", end="", flush=True)
            heard = time.time()
        if time.time() - heard > SILENCE:
            print(".", end="", flush=True)
            heard = time.time()
        time.sleep(0.5)
    print(flush=True)


def _times() -> dict[str, float]:
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


def _log() -> list[str]:
    return LOG.read_text(encoding="utf-8", errors="replace").splitlines()


def _said(beginning: str) -> list[str]:
    """The lines of the log that begin so, and what is set in below them."""
    said = []
    ours = False
    for line in _log():
        ours = line.startswith(beginning) or (ours and line.startswith("  "))
        said += [line] if ours else []
    return said


def page(executed: Path, output: Path) -> int:
    """Render one executed chapter by itself, with glossary and references; the exit status.

    Links to what is not there become plain text.
    """
    folder = output.parent
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    shutil.copytree("book", source, ignore=shutil.ignore_patterns("chapters", "generated"))
    shutil.copy(executed, source)
    (source / "rest.md").write_text(
        "# The rest of the book\n\n`make book` builds it.\n", encoding="utf-8"
    )
    beside = sorted(path.stem for path in source.glob("*.md") if path.stem in BESIDE)
    toc = {"format": "jb-book", "root": executed.stem, "chapters": [{"file": n} for n in beside]}
    contents = folder / "_toc.yml"
    contents.write_text(yaml.safe_dump(toc), encoding="utf-8")
    files = ["--toc", contents.resolve(), "--config", Path("_config.yml").resolve()]
    command = [*BOOK, "build", source, *files, "--path-output", folder / "built"]
    built = subprocess.run(command, stdout=subprocess.DEVNULL)
    if built.returncode == 0:
        shutil.copytree(folder / "built" / "_build" / "html", folder, dirs_exist_ok=True)
    return built.returncode


if __name__ == "__main__":
    sys.exit(page(Path(sys.argv[1]), Path(sys.argv[2])))
