"""Long work: progress bars that stay out of published notebooks, and processes that end with it."""

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

from joblib import cpu_count, wrap_non_picklable_objects
from tqdm import tqdm

T = TypeVar("T")
# One thread a process: as many processes as cores already. glibc would give the memory of each
# step's logits back to the system and fetch it again, which takes as long as the step.
WORKER = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def _begin() -> None:
    """Send what reaches file descriptor 2 to the real standard error, in a notebook's kernel too.

    A kernel publishes what comes there, its worker processes' too, and keeps the real one aside.
    Python's own `sys.stderr`, with its warnings, stays published.
    """
    kept = getattr(sys.stderr, "_original_stdstream_copy", None)
    if kept is not None:
        os.dup2(kept, 2)


def bar(items: Iterable[T], description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on standard error once 2 s have passed.

    It is redrawn on a terminal, and a line every 30 s elsewhere.
    """
    _begin()
    stream = sys.__stderr__
    pause = 0.2 if stream.isatty() else 30
    return tqdm(items, desc=description, total=total, file=stream, mininterval=pause, delay=2)


@contextmanager
def aside() -> Iterator[None]:
    """What a library prints inside goes to the real standard error, not into a notebook."""
    _begin()
    with redirect_stdout(sys.__stderr__), redirect_stderr(sys.__stderr__):
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector rests: what makes many small objects, all kept, need not wait."""
    worked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if worked:
            gc.enable()
        gc.collect()


def parallel(jobs: Iterable[Any], workers: int | None = None, description: str = "") -> list[Any]:
    """The results of `joblib.delayed` calls, in order, each in one of `workers` processes.

    `workers` None is one a core, of which `LOKY_MAX_CPU_COUNT` may allow fewer. One alone works
    here. With a `description`, a bar counts the results. The processes end here.
    """
    jobs = list(jobs)
    workers = min(len(jobs), workers or cpu_count())
    if workers < 2:
        shown = bar(jobs, description) if description else jobs
        return [function(*arguments, **options) for function, arguments, options in shown]
    _begin()
    # Fresh processes: a copy of this one would share its threads' locks.
    context = get_context("spawn")
    with patch.dict(os.environ, WORKER), ProcessPoolExecutor(workers, context) as pool:
        waiting = []
        for function, arguments, options in jobs:
            # A function of a notebook's own can only go to another process in this wrapping.
            call = wrap_non_picklable_objects(function)
            waiting.append(pool.submit(call, *arguments, **options))
        shown = bar(waiting, description) if description else waiting
        return [future.result() for future in shown]
