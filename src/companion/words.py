"""What is written in one way everywhere: verdicts, numbers, and text that comes from elsewhere."""

import math
import re
import unicodedata
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

VERDICTS = ("reproduced", "consistent", "not reproduced", "not testable here")
LONGEST = 1_000  # characters of a foreign text that are shown


@runtime_checkable
class Estimate(Protocol):
    """Anything that has a value, an interval and a sample size."""

    value: float
    low: float
    high: float
    n: int


class Kept(NamedTuple):
    """An estimate read back from a notebook; what was not finite there is NaN here."""

    value: float
    low: float
    high: float
    n: int


def number(value: Any) -> str:
    """A number as the whole book prints it: with its interval and sample size where it has them.

    An estimate looks like `0.41 [0.38, 0.44] (n = 64)`.
    """
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        finite = {key: math.nan if part is None else part for key, part in value.items()}
        value = Kept(**finite)
    if isinstance(value, Estimate):
        scale = max(abs(value.value), abs(value.high - value.low), 1e-12)
        digits = max(0, 2 - math.floor(math.log10(scale))) if math.isfinite(scale) else 3
        middle, low, high = (f"{part:,.{digits}f}" for part in (value.value, value.low, value.high))
        return f"{middle} [{low}, {high}] (n = {value.n:,})"
    real = isinstance(value, Real) and not isinstance(value, Integral)
    return f"{value:.4g}" if real else str(value)


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
    return re.sub(r"^(\d*)([-+=:.)])", r"\1\\\2", escaped)  # no list, no option, no underline
