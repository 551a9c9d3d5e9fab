"""Long work: progress bars that stay out of published notebooks, and worker processes that end with it."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from joblib.externals.loky import ProcessPoolExecutor
from tqdm import tqdm

T = TypeVar("T")

# A notebook's kernel publishes what reaches file descriptor 2, its worker processes' included, and keeps the real
# standard error aside: put it back. Python's own sys.stderr, with its warnings, stays published.
if (kept := getattr(sys.stderr, "_original_stdstream_copy", None)) is not None:
    os.dup2(kept, 2)


def bar(items: Iterable[T] | None, description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on standard error once 2 s have passed: redrawn on a terminal, a line every 30 s elsewhere."""
    stream = sys.__stderr__
    return tqdm(items, desc=description, total=total, file=stream, mininterval=0.2 if stream.isatty() else 30, delay=2)


def parallel(jobs: Iterable[Any], workers: int | None = None, description: str = "") -> list[Any]:
    """The results of `joblib.delayed` calls, in order, each in one of `workers` processes (None: one a core).

    With a `description`, a bar counts the results.

    The processes end here: a kernel that is shut down under them leaves a trace of each in the log.
    """
    if workers == 1:
        return [function(*arguments, **options) for function, arguments, options in jobs]
    # One thread a process: as many processes as cores already.
    with ProcessPoolExecutor(workers, env={"OMP_NUM_THREADS": "1"}) as pool:
        waiting = [pool.submit(function, *arguments, **options) for function, arguments, options in jobs]
        return [future.result() for future in (bar(waiting, description) if description else waiting)]
