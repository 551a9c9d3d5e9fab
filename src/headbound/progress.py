"""Progress bars that stay readable in a terminal and a log file, and out of published notebooks."""

import os
import sys
from collections.abc import Iterable
from io import TextIOBase
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None, description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on standard error: redrawn in place on a terminal, a line every 30 s elsewhere."""
    stream = _standard_error()
    return tqdm(items, desc=description, total=total, file=stream, mininterval=0.2 if stream.isatty() else 30)


def _standard_error() -> TextIOBase:
    # A notebook's kernel publishes what is written to standard error, and keeps the real one aside.
    kept = getattr(sys.stderr, "_original_stdstream_copy", None)
    return sys.__stderr__ if kept is None else os.fdopen(os.dup(kept), "w")
