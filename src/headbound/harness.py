"""Zero-shot evaluations: run through lm-eval, and read from its result files."""

import copy
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from torch import nn
from transformers import PreTrainedTokenizerBase

from headbound import cache, corpus, models, progress, stats

TASKS = Path(__file__).parents[2] / "book" / "lm_eval"  # those that are not lm-eval's own
COLUMNS = ["model", "step", "task", "metric", "value", "stderr"]
# What says more than a whole number (step1k, step1e5, step1_000, step1.5) is read as no step.
_STEP = re.compile(r"(?i)(?:global_)?(?<![a-z])step[_=-]?(\d++)(?![a-z]|[.,]\d|_\d{3}(?!\d))")
# Arguments that decide what is evaluated; others, such as a batch size, do not.
_DECIDING = ("pretrained", "revision", "subfolder", "gguf_file", "peft", "delta")
_DECIDING += ("load_in_4bit", "load_in_8bit", "autogptq")
_UNSET = ("None", "False", "")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...] = ("docstring_last_word",),
    limit: int | None = None,
    batch_size: int = 8,
    source: str = "docstrings",
) -> pd.DataFrame:
    """Run lm-eval, zero-shot, on a model in memory (`models.load` gets one).

    Results are kept in the cache under all that decides them, task by task and answer by answer: a
    killed run goes on. What the tokenizer puts before a text is put before each item. Tasks have
    lm-eval's names; the local ones lie in `TASKS`, with passages from `source` (see `corpus.load`).

    **Returns:** task, metric, value, `low`, `high`, items `n`. The 95 % interval is Wilson's for an
    accuracy, a bootstrap over items for LAMBADA's perplexity, else 1.96 of lm-eval's standard
    errors, NaN where it gives none.

    **Raises:** `ValueError` for a task that lm-eval does not know, or a group of tasks.
    """
    local = {file.stem: file.read_text(encoding="utf-8") for file in TASKS.glob("*.yaml")}
    folder = cache.cache_dir() / "lm-eval" / models.key(model, tokenizer)
    rows = []
    for task in tasks:
        metadata = text = None
        if task in local:
            metadata = {"source": source}
            texts = corpus.load(source)
            text = corpus.fingerprint(texts)
        key = cache.key(task, local.get(task), text, limit, libraries=["lm_eval", "datasets"])
        options = {"limit": limit, "use_cache": str(folder / key)}
        with cache.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            run = partial(_run, model, tokenizer, task, metadata, batch_size, options)
            results, n, logs = cache.kept(folder / f"{key}.json", run)
        for metric, _, value, error in _numbers(results):
            low, high = _interval(metric, value, error, n, logs)
            rows.append((task, metric, value, low, high, n))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "low", "high", "n"])


def _numbers(results: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Each metric of a task, its filter, value and standard error: NaN where that is no number."""
    for name, value in results.items():
        metric, _, kind = name.partition(",")
        if not kind or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        if not _is_number(error):
            error = math.nan
        yield metric, kind, value, error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(
    metric: str, value: float, error: float, n: int, logs: list[float]
) -> tuple[float, float]:
    if metric == "acc":
        test = binomtest(round(value * n), n)
        return tuple(test.proportion_ci(method="wilson"))
    if metric == "perplexity" and logs:
        mean = stats.mean(np.array(logs))
        return math.exp(-mean.high), math.exp(-mean.low)
    return value - 1.96 * error, value + 1.96 * error


def _run(model, tokenizer, task, metadata, batch_size, options):
    with progress.aside(), patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        from lm_eval import simple_evaluate  # slow to import
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        extra = {"metadata": metadata, "include_defaults": False} if metadata else {}
        manager = TaskManager(include_path=str(TASKS), **extra)
        if task not in manager.all_tasks:
            raise ValueError(f"task = {task!r}: lm-eval does not know it; see `lm_eval ls tasks`")
        # Its hints would be published with the notebook.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        words = copy.deepcopy(tokenizer)  # lm-eval changes what it is given
        if words.pad_token is None:  # it would add one, behind the last row of the embedding
            words.pad_token = words.eos_token or words.convert_ids_to_tokens(0)
        if words.eos_token is None:  # it puts one before a text, and decodes it
            words.eos_token = words.pad_token
        wrapped = HFLM(pretrained=model, tokenizer=words, batch_size=batch_size)
        options |= {"tasks": [task], "task_manager": manager, "bootstrap_iters": 1000}
        found = simple_evaluate(wrapped, **options)
    if task not in found["samples"]:
        raise ValueError(f"task = {task!r}: a group; name its tasks, {sorted(found['samples'])}")
    logs = [sample["perplexity"] for sample in found["samples"][task] if "perplexity" in sample]
    return found["results"][task], found["n-samples"][task]["effective"], logs


def read_results(folder: str | Path) -> pd.DataFrame:
    """One row a model, step, task and metric, from all lm-eval result files below a folder.

    Files of EleutherAI's evaluations of Pythia (`acc`, `acc_stderr`) and of lm-eval 0.4
    (`acc,none`) are read; other JSON is passed over. Model and step are what the file's
    `model_args` say. An `stderr` is NaN where the file has none.

    **Raises:** `FileNotFoundError` if there is no result file; `ValueError` for broken JSON, no
    step or several, two files for one step, or two kinds of model or evaluation on one curve.
    """
    files = [path for path in sorted(Path(folder).expanduser().rglob("*.json")) if path.is_file()]
    table = pd.DataFrame([row for path in files for row in _rows(path)])
    if table.empty:
        raise FileNotFoundError(f"{folder}: no lm-eval result file (*.json); give their folder")
    _only(table, ["model"], "form")
    _only(table, ["model", "task"], "kind")
    _only(table, ["model", "task", "step", "metric"], "path")
    return table[COLUMNS].sort_values(COLUMNS[:4], ignore_index=True)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The numbers of a result file, each with the file's origin; none of any other JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); fetch it again or remove it") from error
    for task, metrics in _dict(content, "results").items():
        if not isinstance(metrics, dict):
            continue
        age = "0.4"
        if not any("," in name for name in metrics):
            age = "before 0.4"  # where no name says its filter
            metrics = {f"{name},none": value for name, value in metrics.items()}
        kind = _kind(content, task, age)
        origin = {**_origin(content, path), "task": task, "kind": kind, "path": str(path)}
        for metric, filtered, value, error in _numbers(metrics):
            name = metric if filtered == "none" else f"{metric},{filtered}"
            yield {**origin, "metric": name, "value": float(value), "stderr": error}


def _dict(content: Any, name: str) -> dict[str, Any]:
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _kind(content: dict[str, Any], task: str, age: str) -> str:
    """How a task was evaluated: what two points of one curve must share."""
    config = _dict(content, "config")
    version = _dict(content, "versions").get(task)
    shots = _dict(content, "n-shot").get(task, config.get("num_fewshot"))
    parts = [f"lm-eval {age}, task version {version}, limit {config.get('limit')}, {shots} shots"]
    parts += [name for name in ("chat_template", "system_instruction") if content.get(name)]
    return ", ".join(parts)


def _only(table: pd.DataFrame, by: list[str], column: str) -> None:
    """Check that a column has one value in each group.

    **Raises:** `ValueError` naming the first group that has several, and their files.
    """
    values = table.drop_duplicates([*by, column])
    mixed = values[values.duplicated(by, keep=False)]
    for group, rows in mixed.groupby(by):
        places = rows["path"]
        if column != "path":
            places = rows[column] + " in " + places
        curve = " ".join(map(str, group))
        raise ValueError(f"{curve}: {', but '.join(places)}; keep one")


def _origin(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The model and the step that a file is of, and all that its model's arguments say of them."""
    arguments = _dict(content, "config").get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        arguments = {}
    given = {name: str(arguments.get(name)) for name in _DECIDING}
    told = [f"{name} {value}" for name, value in given.items() if value not in _UNSET]
    steps = {int(step) for part in told for step in _STEP.findall(part)}
    if len(steps) != 1:
        what = f"steps {sorted(steps)}" if steps else "no step"
        raise ValueError(f"{path}: {what} in its model_args; it needs one, as step1000")
    # The last folder before the step is the model's name, on whatever system it lay.
    before_step = _STEP.split(str(arguments.get("pretrained") or ""))[0]
    model = PureWindowsPath(before_step).name.rstrip("_- ").replace("-v1.1", "")
    if not model:
        raise ValueError(f"{path}: no model in its model_args; name its folder by it")
    return {"model": model, "step": steps.pop(), "form": _STEP.sub("", " ".join(told))}
