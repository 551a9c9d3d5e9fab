"""What is written in one way everywhere: numbers, and text that comes from elsewhere."""

import math
import re
import unicodedata
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

LONGEST = 1_000  # characters of a text from elsewhere that are shown


@runtime_checkable
class Estimate(Protocol):
    """Anything that has a value, an interval and a sample size."""

    value: float
    low: float
    high: float
    n: int


def number(value: Any, digits: int = 4) -> str:
    """A number as the whole book prints it: with its interval and sample size where it has them.

    An estimate looks like `0.41 [0.38, 0.44] (n = 64)`; `digits` are those of a plain number.
    """
    if isinstance(value, dict):
        known = {name: math.nan if part is None else part for name, part in value.items()}
        value = SimpleNamespace(**known)
    if isinstance(value, Estimate):
        return _estimate(value)
    if isinstance(value, Real) and not isinstance(value, Integral):
        large = abs(value) >= 10**digits
        return f"{value:,.0f}" if large else f"{value:.{digits}g}"
    return "unknown" if value is None else str(value)


def _estimate(value: Estimate) -> str:
    width = abs(value.high - value.low)
    known = not math.isnan(width)
    scale = abs(value.value)
    if known:
        scale = max(scale, width)
    digits = 3
    if 0 < scale < math.inf:
        digits = max(0, 2 - math.floor(math.log10(scale)))
    middle = f"{value.value:,.{digits}f}"
    if not known:
        return f"{middle} (no interval, n = {value.n:,})"
    low = f"{value.low:,.{digits}f}"
    high = f"{value.high:,.{digits}f}"
    return f"{middle} [{low}, {high}] (n = {value.n:,})"


def visible(text: Any) -> str:
    """A text from elsewhere in one line, cut where it is endless, without invisible marks.

    A right-to-left mark in a token would turn the words around it.
    """
    line = " ".join(str(text).split())
    line = "".join(sign for sign in line if unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def markdown(text: Any) -> str:
    """A text from elsewhere as Markdown that shows it as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|$~^&])", r"\\\1", visible(text))
    # At the start of a line: no list, no option, no underline.
    return re.sub(r"^(?=[-+=:])|^(\d+)(?=[.)]\s)", r"\1\\", escaped)
