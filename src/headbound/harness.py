"""Zero-shot evaluations through lm-eval, and its local task: the last word of held-out docstring prose."""

import hashlib
import itertools
import json
import logging
import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import binomtest
from torch import nn
from transformers import PreTrainedTokenizerBase

from headbound import cache, corpus, models, progress, stats
from headbound.train import tunnel

TASKS = Path(__file__).parent / "tasks"
_WORDS = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*")
# Letters, figures and plain punctuation, no capitals in a row (constants), no double space, no abbreviation.
_SENTENCE = re.compile(
    r"(?!.*([A-Z]{6}|\(\)|--| -|  |\b[ei]\.|\bcf\.|\betc\.))[A-Z](?:[\w ,;'\"()%-]|\.(?=\d))+\."
)


def passages(texts: list[str]) -> list[dict[str, str]]:
    """At most one passage a text: two sentences or more, 20 to 90 words, the last word said before.

    Only runs of plain prose sentences count: no code, no cross-reference, no list, no heading. A name between
    backticks becomes a word.

    **Returns:** `context` without the last word, and `word`: lower-case, four letters or more.
    """
    return [found for found in map(_passage, texts) if found]


def _passage(content: str) -> dict[str, str] | None:
    lines = [
        (len(line) - len(line.lstrip()), line.split()) for line in _plain(content).splitlines()
    ]
    for (_, filled), block in itertools.groupby(lines, key=lambda line: (line[0], bool(line[1]))):
        run: list[str] = []
        for sentence in re.split(
            r"(?<=[.!?]) (?=[A-Z])", " ".join(w for _, words in block for w in words)
        ):
            words = _WORDS.findall(sentence)
            run = (
                [*run, sentence]
                if filled and len(words) > 3 and _SENTENCE.fullmatch(sentence)
                else []
            )
            for first in range(len(run) - 1):
                whole = " ".join(run[first:])[:-1]
                context, _, last = whole.rpartition(" ")
                said = _WORDS.findall(context)
                if re.fullmatch("[a-z]{4,}", last) and last in said and 19 <= len(said) <= 89:
                    return {"context": context, "word": last}
    return None


def _plain(content: str) -> str:
    return re.sub(r"(?<![:\w`])(``?)([A-Za-z_]\w*)\1(?![_`])", r"\2", content)


def last_words(source: str = "docstrings", **_: object) -> dict[str, Dataset]:
    """The local task's data, as lm-eval's `custom_dataset` asks for it.

    A passage that also stands in a text the suite trains on is left out.

    **Raises:** `ValueError` if no passage is left.
    """
    train_texts, test_texts = corpus.split(corpus.load(source), tunnel.HELD_OUT)
    path = cache.cache_dir() / "tasks" / f"last-words-{corpus.fingerprint(test_texts)}.json"
    if not path.exists():
        seen = " ".join("\0".join(train_texts).replace("`", "").split())
        unique = {f"{p['context']} {p['word']}": p for p in passages(test_texts)}
        with cache.replacing(path) as temporary:
            temporary.write_text(
                json.dumps([p for whole, p in unique.items() if whole not in seen])
            )
    found = json.loads(path.read_text())
    if not found:
        raise ValueError(
            f"source = {source!r}: no held-out passage fits the last-word task; give more prose"
        )
    return {"test": Dataset.from_list(found)}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...] = ("docstring_last_word",),
    limit: int | None = None,
    batch_size: int = 8,
    source: str = "docstrings",
) -> pd.DataFrame:
    """Run lm-eval, zero-shot, on a model in memory (`models.load` gets one from a folder or a revision).

    Kept in the cache by the model's weights, task by task, and answer by answer: a killed run goes on.

    **Arguments:**

    - `tasks`: lm-eval's names; the local ones lie in `TASKS`.
    - `limit`: items a task, None for all.
    - `source`: of the local task's passages, see `corpus.load`.

    **Returns:** task, metric, value, `low`, `high`, items `n`. The 95 % interval is Wilson's for an accuracy (which
    may be 0), a bootstrap over items for LAMBADA's perplexity, else lm-eval's stderr × 1.96.

    **Raises:** `ValueError` for a task that lm-eval does not know.
    """
    local = {file.stem: file.read_text() for file in sorted(TASKS.glob("*.yaml"))}
    folder = cache.cache_dir() / "lm-eval" / models.fingerprint(model)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in tasks:
        recipe = f"{local.get(task)} {limit} {source} {version('lm_eval')}"
        path = folder / f"{task}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.json"
        if not path.exists():
            found = _run(
                model,
                tokenizer,
                task,
                limit,
                batch_size,
                path.with_suffix(""),
                task in local and source,
            )
            with cache.replacing(path) as temporary:
                temporary.write_text(json.dumps(found))
        results, n, logs = json.loads(path.read_text())
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = float(results.get(f"{metric}_stderr,{kind}", math.nan))
                low, high = _interval(metric, value, error, n, logs)
                rows.append((task, metric, value, low, high, n))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "low", "high", "n"])


def _interval(metric, value, error, n, logs):
    if metric == "acc":
        return tuple(binomtest(round(value * n), n).proportion_ci(method="wilson"))
    if metric == "perplexity" and logs:
        mean = stats.mean(np.array(logs))
        return math.exp(-mean.high), math.exp(-mean.low)
    return value - 1.96 * error, value + 1.96 * error


def _run(model, tokenizer, task, limit, batch_size, cache, source):
    with progress.aside(), mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        from lm_eval import simple_evaluate  # slow to import
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        extra = {"metadata": {"source": source}, "include_defaults": False} if source else {}
        manager = TaskManager(include_path=str(TASKS), **extra)
        if task not in manager.all_tasks:
            raise ValueError(f"task = {task!r}: lm-eval does not know it; see `lm_eval ls tasks`")
        logging.getLogger("lm_eval").setLevel(
            logging.ERROR
        )  # its hints would be published with the notebook
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        options = {"limit": limit, "use_cache": str(cache), "bootstrap_iters": 1000}
        found = simple_evaluate(wrapped, tasks=[task], task_manager=manager, **options)
    logs = [sample["perplexity"] for sample in found["samples"][task] if "perplexity" in sample]
    return found["results"][task], found["n-samples"][task]["effective"], logs
