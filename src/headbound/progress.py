"""Long work: progress bars that stay out of published notebooks, and worker processes that end with it."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

from joblib.externals.loky import ProcessPoolExecutor
from tqdm import tqdm

T = TypeVar("T")
# One thread a process: as many processes as cores already. glibc would give the memory of each step's logits back to
# the system and fetch it again, which takes as long as the step.
WORKER = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}

# A notebook's kernel publishes what reaches file descriptor 2, its worker processes' included, and keeps the real
# standard error aside: put it back. Python's own sys.stderr, with its warnings, stays published.
if (kept := getattr(sys.stderr, "_original_stdstream_copy", None)) is not None:
    os.dup2(kept, 2)


def bar(items: Iterable[T] | None, description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on standard error once 2 s have passed: redrawn on a terminal, a line every 30 s elsewhere."""
    stream = sys.__stderr__
    return tqdm(
        items,
        desc=description,
        total=total,
        file=stream,
        mininterval=0.2 if stream.isatty() else 30,
        delay=2,
    )


@contextmanager
def aside() -> Iterator[None]:
    """What a library prints and draws inside goes to the real standard error, and not into a published notebook."""
    with redirect_stdout(sys.__stderr__), redirect_stderr(sys.__stderr__):
        yield


def parallel(jobs: Iterable[Any], workers: int | None = None, description: str = "") -> list[Any]:
    """The results of `joblib.delayed` calls, in order, each in one of `workers` processes (None: one a core).

    With a `description`, a bar counts the results.

    The processes end here: a kernel that is shut down under them leaves a trace of each in the log.
    """
    if workers == 1:
        return [function(*arguments, **options) for function, arguments, options in jobs]
    with ProcessPoolExecutor(workers, env=WORKER) as pool:
        waiting = [
            pool.submit(function, *arguments, **options) for function, arguments, options in jobs
        ]
        return [
            future.result() for future in (bar(waiting, description) if description else waiting)
        ]
