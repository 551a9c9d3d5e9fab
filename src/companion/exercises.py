"""Check a learner's function against what is right, and against the mistakes that people make.

An exercise is a module: `right` is the answer, `INPUTS` a list of argument tuples, and each other
public function makes a mistake. Its docstring is the hint that the learner gets.
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
    """Say "correct", the hint of the mistake that answers every input alike, or what is seen."""
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
    functions = filter(inspect.isfunction, vars(exercise).values())
    own = [each for each in functions if each.__module__ == exercise.__name__]
    return [each for each in own if each.__name__ != "right" and each.__name__[0] != "_"]


def _from_outside(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], inputs: Sequence[tuple]
) -> str:
    wrong = 0
    while _same(found[wrong : wrong + 1], expected[wrong : wrong + 1]):
        wrong += 1
    yours = found[wrong]
    mine = expected[wrong]
    if mine.shape != yours.shape:
        return f"your result has the shape {yours.shape}, it should have {mine.shape}"
    factor = float(yours.sum() / mine.sum())
    scaled = [np.asarray(factor * part) for part in expected]
    if np.isfinite(factor) and _same(found, scaled):
        return f"right but for a constant factor: your results are {factor:.4g} times as large"
    arguments = ", ".join(map(str, inputs[wrong]))
    return f"not yet: for {arguments} it should give {mine}, yours gives {yours}"


def _answers(function: Function, inputs: Sequence[tuple]) -> list[np.ndarray]:
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return [np.asarray(function(*arguments), float) for arguments in copy.deepcopy(inputs)]


def _same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape or not np.allclose(one, other, 1e-5, 1e-9, equal_nan=True):
            return False
    return True
