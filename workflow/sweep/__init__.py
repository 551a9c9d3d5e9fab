"""A sweep over published checkpoints: `hub` reads, `audit` compares, `measure`, `plan` counts."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import headbound
from headbound import cache


class Settings(NamedTuple):
    """What a sweep measures. With the package's version, it is what makes a result valid.

    `name` is the folder of the results. `whole` loads each checkpoint, for loss and anisotropy;
    else only heads are read. `texts` passages of `length` tokens are held-out ones of `source`;
    `dtype` is the model's in memory.
    """

    name: str = "paper"
    whole: bool = True
    source: str = "docstrings"
    texts: int = 256
    length: int = 256
    dtype: str = "float32"

    def made_by(self) -> dict[str, Any]:
        """What a result must say of itself to be valid."""
        return {"version": headbound.__version__, **self._asdict()}

    def folder(self, model: str) -> Path:
        """Where the results of a model are."""
        return cache.cache_dir() / "sweeps" / self.name / model.replace("/", "--")


def read(path: str | Path) -> tuple[dict[str, list[str]], Settings]:
    """A sweep's file, or that which `HEADBOUND_SWEEP` names: each model's revisions; settings.

    `steps` lists single steps; `every` and `last` add regular ones.

    **Raises:** `ValueError` for a key that is neither one of these, `models`, nor a setting.
    """
    path = Path(os.environ.get("HEADBOUND_SWEEP") or path)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = set(given.pop("steps", []))
    every = given.pop("every", None)
    last = given.pop("last", 0)
    if every:
        steps |= set(range(every, last + 1, every))
    models = given.pop("models", [])
    unknown = sorted(set(given) - set(Settings._fields))
    if unknown or not models or not steps:
        fields = ", ".join(Settings._fields)
        why = f"unknown {unknown}" if unknown else "no models or no steps"
        raise ValueError(f"{path}: {why}; it has models, steps, every, last, {fields}")
    return {model: [f"step{step}" for step in sorted(steps)] for model in models}, Settings(**given)
