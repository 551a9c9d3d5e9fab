"""Check a learner's function against what is right, and against the mistakes that people make.

An exercise is a module: `right` is the answer, `INPUTS` a list of argument tuples, and each other
function that has a docstring makes a mistake. Its docstring is the hint that the learner gets.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

Function = Callable[..., Any]


def feedback(function: Function, exercise: ModuleType) -> str:
    """The word "correct", the hint of the mistake that answers as `function` does, or what is seen.

    Every input has to agree: a mistake that shows on one input alone is none of the known ones.
    """
    expected = _answers(exercise.right, exercise.INPUTS)
    try:
        found = _answers(function, exercise.INPUTS)
    except Exception as error:  # whatever a learner's function may raise
        return f"your function stopped with {type(error).__name__}: {error}"
    if _same(found, expected):
        return "correct"
    for mistaken in mistakes(exercise):
        if _same(found, _answers(mistaken, exercise.INPUTS)):
            return inspect.getdoc(mistaken)
    return _from_outside(found, expected, exercise.INPUTS)


def mistakes(exercise: ModuleType) -> list[Function]:
    """The functions of an exercise that make a mistake, in their order."""
    own = [f for f in vars(exercise).values() if inspect.isfunction(f)]
    own = [f for f in own if f.__module__ == exercise.__name__ and not f.__name__.startswith("_")]
    return [f for f in own if f.__doc__ and f is not exercise.right]


def _from_outside(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], inputs: Sequence[tuple]
) -> str:
    wrong = [
        place for place, pair in enumerate(zip(found, expected, strict=True)) if _differ(*pair)
    ]
    yours, mine = found[wrong[0]], expected[wrong[0]]
    if mine.shape != yours.shape:
        return f"your result has the shape {yours.shape}, it should have {mine.shape}"
    factor = float(yours.sum() / mine.sum())
    if np.isfinite(factor) and _same(found, [np.asarray(factor * part) for part in expected]):
        return f"right but for a constant factor: your results are {factor:.4g} times as large"
    asked = ", ".join(map(str, inputs[wrong[0]]))
    return f"not yet: for {asked} it should give {mine}, yours gives {yours}"


def _answers(function: Function, inputs: Sequence[tuple]) -> list[np.ndarray]:
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return [np.asarray(function(*arguments), float) for arguments in copy.deepcopy(inputs)]


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape != other.shape or not np.allclose(one, other, 1e-5, 1e-9, equal_nan=True)


def _same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return not any(_differ(*pair) for pair in zip(first, second, strict=True))
