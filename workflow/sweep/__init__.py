"""A sweep over published checkpoints: `hub` reads, `audit` compares, `measure`, `plan` counts."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonschema import Draft202012Validator

import headbound
from headbound import cache

SCHEMA = Path(__file__).with_name("schema.json")  # of a sweep's file


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
        made = {"version": headbound.__version__, **self._asdict()}
        path = Path(self.source).expanduser()
        if self.whole and path.is_file():
            made["text"] = cache.key(path.read_bytes())
        return made

    def folder(self, model: str) -> Path:
        """Where the results of a model are."""
        return cache.cache_dir() / "sweeps" / self.name / model.replace("/", "--")


def read(path: str | Path) -> tuple[dict[str, list[str]], Settings]:
    """A sweep's file, or that which `HEADBOUND_SWEEP` names: each model's revisions; settings.

    `steps` lists single steps; `every` and `last` add regular ones.

    **Raises:** `ValueError` for what is no such file, naming the key.
    """
    path = Path(os.environ.get("HEADBOUND_SWEEP") or path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file in UTF-8 ({error})") from error
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for error in Draft202012Validator(schema).iter_errors(given):
        where = ".".join(map(str, error.path))
        raise ValueError(f"{path}: {where}: {error.message}")
    every = given.pop("every", 1)
    regular = range(every, given.pop("last", 0) + 1, every)
    steps = sorted({*given.pop("steps", []), *regular})
    if not steps:
        raise ValueError(f"{path}: no steps; give steps, or every and last")
    models = given.pop("models")
    return {model: [f"step{step}" for step in steps] for model in models}, Settings(**given)
