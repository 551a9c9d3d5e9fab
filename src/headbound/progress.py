"""Progress bars that stay readable in a terminal, a notebook and a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None, description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on standard error: redrawn in place on a terminal, a line every 30 s elsewhere.

    A notebook's outputs are published, so bars never go there: papermill's log has them.
    """
    terminal = sys.stderr.isatty()
    return tqdm(items, desc=description, total=total, file=sys.__stderr__, mininterval=0.2 if terminal else 30)
