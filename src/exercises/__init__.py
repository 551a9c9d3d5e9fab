"""The book's exercises: one module each, with what is right and the mistakes that people make.

`exercises.check("late_drop", late_drop)` prints "correct", or a hint.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

from companion.exercises import feedback

NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def check(name: str, function: Callable[..., Any]) -> None:
    """Print "correct", or a hint at what is wrong with a learner's answer to the exercise `name`.

    **Raises:** `ValueError` for an exercise that is not there.
    """
    if name not in NAMES:
        raise ValueError(f"exercise = {name!r}: must be one of {', '.join(NAMES)}")
    exercise = import_module(f"exercises.{name}")
    print(f"{name}: {feedback(function, exercise)}")
