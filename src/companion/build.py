"""The book, or a chapter of it, through Snakemake: a line a chapter, all other talk in a log."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from filelock import FileLock, Timeout
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

BUILD, LOG, TIMES = Path("_build"), Path("_build/book.log"), Path("_build/times.json")
SILENCE = 8  # seconds after which a dot is printed, where no terminal shows a table
BAR = 20  # characters
CHANGED = "Verdicts that differ"  # how the publishing step begins what a reader must see


@dataclass
class Step:
    """A job of a build.

    It makes `output`; while it runs, `running` matches something below `_build`. Times in seconds:
    how long it took `before`, when it `started`, how long it `took`. `done` is a share.
    """

    name: str
    output: Path
    running: str
    before: float | None
    started: float | None = None
    took: float | None = None
    done: float = 0.0

    def look(self, begin: float) -> bool:
        """Look at the files of a build that began then: has this step ended since the last look?"""
        now = time.time()
        for found in BUILD.glob(self.running):
            self.started = self.started or now
            self.done = _done(found)
        made = self.output.exists() and self.output.stat().st_mtime >= begin
        if not made or self.took is not None:
            return False
        self.took = now - (self.started or begin)
        return True

    def state(self) -> str | ProgressBar:
        """In words, or a bar while it runs."""
        if self.took is not None:
            return f"done in {self.took:.0f} s"
        if self.started is None:
            return "waiting"
        return ProgressBar(total=1, completed=self.done, width=BAR)


def _done(running: Path) -> float:
    """The share of a running notebook's cells that are completed."""
    try:
        cells = json.loads(running.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # no notebook, or one that is being written
        return 0.0
    states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
    return states.count("completed") / max(1, len(states))


def _left(steps: Sequence[Step]) -> str:
    """The time left, from what the steps took last, two at a time."""
    now = time.time()
    waited_for = [step for step in steps if step.took is None]
    if any(step.before is None for step in waited_for):
        return "time left unknown until it was built once"
    seconds = 0.0
    for step in waited_for:
        begun = step.started or now
        seconds += max(0.0, begun + step.before - now)
    return f"about {max(1, round(seconds / 120))} min left"


def read_preset(path: Path) -> dict[str, dict]:
    """What a preset changes, by chapter; `ValueError` naming a file that says anything else."""
    try:
        chapters = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(name): dict(changes or {}) for name, changes in chapters.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        form = f"{path}: it must give the parameters of each chapter by name, as YAML in UTF-8"
        raise ValueError(f"{form} ({error})") from error


def names(preset: str, asked: Sequence[str] = ()) -> list[str]:
    """The chapters of a preset, or those that `asked` names by a beginning such as `02`.

    **Raises:** `ValueError` for a preset or a chapter that is not there.
    """
    presets = sorted(path.stem for path in Path("presets").glob("*.yaml"))
    if not presets:
        raise ValueError(f"{Path.cwd()}: no presets/ in it; go to the book's folder")
    if preset not in presets:
        raise ValueError(f"PRESET = {preset}: must be one of {', '.join(presets)}")
    file = Path(f"presets/{preset}.yaml")
    chapters = read_preset(file)
    unknown = [name for name in chapters if not Path(f"notebooks/{name}.ipynb").exists()]
    if unknown or not chapters:
        raise ValueError(f"{file}: no such chapter ({', '.join(unknown) or 'it names none'})")
    for beginning in asked:
        if not any(name.startswith(beginning) for name in chapters):
            known = ", ".join(chapters)
            raise ValueError(f"chapter = {beginning}: must begin one of {known}")
    return [name for name in chapters if not asked or name.startswith(tuple(asked))]


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
        lines = _said("headbound: ") or _log().splitlines()[-5:]
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
        plan = _log()
        if planned.returncode or "Nothing to be done" in plan:
            return planned.returncode
        work = subprocess.Popen([*command, "--quiet", "rules", "--", *targets], **told)
        steps = _steps(preset, plan)
        try:
            show = _show_table if sys.stdout.isatty() else _show_lines
            show(work, steps)
        finally:  # a signal too ends this process by an exception, see `cli.main`
            if work.poll() is None:
                work.terminate()
                work.wait()
    took = {step.name: step.took for step in steps if step.took is not None}
    TIMES.write_text(json.dumps(_times() | took, indent=1), encoding="utf-8")
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


def _show_table(work: subprocess.Popen, steps: Sequence[Step]) -> None:
    begin = time.time()
    with Live() as live:
        while work.poll() is None:
            table = Table(caption=_left(steps), show_header=False, box=None)
            for step in steps:
                step.look(begin)
                table.add_row(step.name, step.state())
            live.update(table, refresh=True)
            time.sleep(1)


def _show_lines(work: subprocess.Popen, steps: Sequence[Step]) -> None:
    begin = heard = time.time()
    print(f"{len(steps)} to do: {', '.join(step.name for step in steps)}", end="", flush=True)
    while work.poll() is None:
        for step in steps:
            if step.look(begin):
                count = sum(step.took is not None for step in steps)
                told = f"{count} of {len(steps)}; {_left(steps)}"
                print(f"\n{step.name}: {step.state()} ({told})", end="", flush=True)
                heard = time.time()
        if time.time() - heard > SILENCE:
            print(".", end="", flush=True)
            heard = time.time()
        time.sleep(0.5)
    print(flush=True)


def _times() -> dict[str, float]:
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


def _log() -> str:
    return LOG.read_text(encoding="utf-8", errors="replace")


def _said(beginning: str) -> list[str]:
    """The lines of the log that begin so, and what is set in below them."""
    return re.findall(rf"^{beginning}.*(?:\n  .*)*", _log(), re.MULTILINE)
