"""Zero-shot evaluations: run through lm-eval, and read from its result files, old and new."""

import copy
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import binomtest
from torch import nn
from transformers import PreTrainedTokenizerBase

from headbound import cache, corpus, models, progress, stats
from headbound.train import tunnel

TASKS = Path(__file__).parent / "tasks"
COLUMNS = ["model", "step", "tokens", "task", "metric", "value", "stderr"]
_WORDS = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*")
# Letters, figures and plain punctuation; no constants, double spaces or abbreviations.
_SENTENCE = re.compile(
    r"(?!.*([A-Z]{6}|\(\)|--| -|  |\b[ei]\.|\bcf\.|\betc\.))[A-Z](?:[\w ,;'\"()%-]|\.(?=\d))+\."
)
# How trainers name a checkpoint: step1000, global_step1000, checkpoint-500, iter_0001000, step=9.
# What says more than a whole number (step1k, step1e5, step1_000, step1.5) is read as no step.
_STEP = re.compile(
    r"(?i)(?:(?<![a-z])|(?<=global))(?:step|checkpoint|ckpt|iter(?:ation)?)s?[_=-]?"
    r"(\d++)(?![a-z]|[.,]\d|_\d{3}(?!\d))"
)
_STAGE = re.compile(r"(?i)(?<![a-z])stage[_-]?\d+")
# Folders that say nothing of the model, as in mine/checkpoints/step1000.
_NAMELESS = re.compile(
    r"(?i)(global|hf|checkpoints?|ckpts?|evals?|results|[\w]+-shot|epoch[=_-]?\d+)?"
)
# What is counted beside a step, and words for a file's form: they tell no curve from another.
_COUNTED = re.compile(r"(?i)(?<![a-z])(?:stage|epoch|tokens?)[=_-]?[\d.]+[kmbt]?")
_FORMAL = re.compile(
    r"(?i)(global|main|hf|pt|ckpt|safetensors|unsharded|exports?|converted|model|[0-9a-f]{7,40})?"
)
# Arguments that make another model of the one that is named.
_CHANGES = ("subfolder", "gguf_file", "peft", "delta", "load_in_4bit", "load_in_8bit", "autogptq")


def _passages(texts: list[str]) -> list[dict[str, str]]:
    """At most one passage a text: two sentences or more, 20 to 90 words, the last word said before.

    Only runs of plain prose sentences count: no code, no cross-reference, no list, no heading. A
    name between backticks becomes a word.

    **Returns:** `context` without the last word, and `word`: lower-case, four letters or more.
    """
    return [found for found in map(_passage, texts) if found]


def _passage(content: str) -> dict[str, str] | None:
    for block in _blocks(content):
        run: list[str] = []
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", block):
            prose = len(_WORDS.findall(sentence)) > 3 and _SENTENCE.fullmatch(sentence)
            run = [*run, sentence] if prose else []
            for first in range(len(run) - 1):
                whole = " ".join(run[first:])[:-1]
                context, _, last = whole.rpartition(" ")
                said = _WORDS.findall(context)
                if re.fullmatch("[a-z]{4,}", last) and last in said and 19 <= len(said) <= 89:
                    return {"context": context, "word": last}
    return None


def _blocks(content: str) -> Iterator[str]:
    """Runs of lines with one indentation, each joined to one line."""
    lines = _plain(content).splitlines()
    for _, block in itertools.groupby(lines, key=_indentation):
        yield " ".join(" ".join(block).split())


def _indentation(line: str) -> tuple[int, bool]:
    return len(line) - len(line.lstrip()), bool(line.strip())


def _plain(content: str) -> str:
    return re.sub(r"(?<![:\w`])(``?)([A-Za-z_]\w*)\1(?![_`])", r"\2", content)


def last_words(source: str = "docstrings", **_: object) -> dict[str, Dataset]:
    """The local task's data, as lm-eval's `custom_dataset` asks for it.

    A passage that also stands in a text the suite trains on is left out.

    **Raises:** `ValueError` if no passage is left.
    """
    texts = corpus.load(source)
    key = cache.key(corpus.fingerprint(texts), tunnel.HELD_OUT, Path(__file__).read_bytes())
    path = cache.cache_dir() / "tasks" / f"last-words-{key}.json"
    if not path.exists():
        train_texts, test_texts = corpus.split(texts, tunnel.HELD_OUT)
        seen = " ".join("\0".join(train_texts).replace("`", "").split())
        unique = {f"{p['context']} {p['word']}": p for p in _passages(test_texts)}
        kept = [passage for whole, passage in unique.items() if whole not in seen]
        with cache.replacing(path) as temporary:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
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
    """Run lm-eval, zero-shot, on a model in memory (`models.load` gets one).

    Results are kept in the cache under all that decides them, task by task and answer by answer: a
    killed run goes on. What the tokenizer puts before a text is put before each item.

    **Arguments:** `tasks`: lm-eval's names; the local ones lie in `TASKS`. `limit`: items a task,
    None for all. `source`: of the local task's passages, see `corpus.load`.

    **Returns:** task, metric, value, `low`, `high`, items `n`. The 95 % interval is Wilson's for an
    accuracy, a bootstrap over items for LAMBADA's perplexity, else 1.96 of lm-eval's standard
    errors, NaN where it gives none.

    **Raises:** `ValueError` for a task that lm-eval does not know, or a group of tasks.
    """
    local = {file.stem: file.read_text(encoding="utf-8") for file in TASKS.glob("*.yaml")}
    folder = cache.cache_dir() / "lm-eval" / models.key(model, tokenizer)
    rows = []
    for task in tasks:
        metadata = {"source": source} if task in local else None
        text = local and corpus.fingerprint(corpus.load(source)) if metadata else None
        key = cache.key(task, local.get(task), text, limit, libraries=["lm_eval", "datasets"])
        path = folder / f"{key}.json"
        if not path.exists():
            options = {"limit": limit, "use_cache": str(path.with_suffix(""))}
            with cache.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                found = _run(model, tokenizer, task, metadata, batch_size, options)
            with cache.replacing(path) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        results, n, logs = json.loads(path.read_text(encoding="utf-8"))
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr") and _is_number(value):
                error = results.get(f"{metric}_stderr,{kind}")
                low, high = _interval(metric, value, error, n, logs)
                rows.append((task, metric, value, low, high, n))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "low", "high", "n"])


def _interval(
    metric: str, value: float, error: Any, n: int, logs: list[float]
) -> tuple[float, float]:
    if metric == "acc":
        test = binomtest(round(value * n), n)
        return tuple(test.proportion_ci(method="wilson"))
    if metric == "perplexity" and logs:
        mean = stats.mean(np.array(logs))
        return math.exp(-mean.high), math.exp(-mean.low)
    half = 1.96 * error if _is_number(error) else math.nan  # lm-eval says "N/A" where it has none
    return value - half, value + half


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _run(model, tokenizer, task, metadata, batch_size, options):
    with progress.aside(), progress.environment({"DISABLE_MULTIPROC": "1"}):
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


class _Origin(NamedTuple):
    """What a result file is of: a model, as the parts of its path, a step, and training stages.

    `form` is what else is said of the checkpoint, such as a seed or an adapter.
    """

    model: tuple[str, ...]
    step: int
    stages: tuple[str, ...]
    form: str


def read_results(folder: str | Path, shots: int | None = None) -> pd.DataFrame:
    """One row a model, step, task and metric, from all lm-eval result files below a folder.

    Files of the old harness (`acc`, `acc_stderr`) and of lm-eval 0.4 (`acc,none`) are read; other
    JSON is passed over. Model and step are what the file's `model_args` say, else its name, else
    its folders. Two models that end alike are told apart by more of their paths. `shots` keeps only
    tasks with that many examples in the prompt.

    **Returns:** columns model, step, tokens (seen in training; NaN unless it is one of Pythia's own
    runs), task, metric, value, stderr (NaN where the file has none), sorted.

    **Raises:** `FileNotFoundError` if there is no result file; `ValueError` for broken JSON, no
    step or several, two files for one step, or one curve of two stages or kinds of evaluation.
    """
    values: dict[tuple, tuple[float, float, Path]] = {}
    kinds: dict[tuple, tuple[str, Path]] = {}
    for path in sorted(Path(folder).expanduser().rglob("*.json")):
        content = {} if path.is_dir() else _content(path)
        for task, metrics in _dict(content, "results").items():
            asked = _dict(content, "n-shot").get(task, _dict(content, "config").get("num_fewshot"))
            if not isinstance(metrics, dict) or (shots is not None and asked != shots):
                continue
            origin = _origin(content, path)
            kind = _kind(content, task, metrics, asked)
            curve = " ".join(["/".join(origin.model), task])
            _only(kinds, (origin.model, task), kind, path, curve)
            _only(kinds, (origin.model,), " and ".join(origin.stages) or "no stage", path, curve)
            _only(kinds, (origin.model, "form"), origin.form, path, curve)
            for metric, value, stderr in _measured(metrics):
                row = (origin.model, origin.step, task, metric)
                if row in values:
                    raise ValueError(
                        f"{curve}, step {origin.step}: in {values[row][2]} and {path}; remove one"
                    )
                values[row] = (value, stderr, path)
    if not values:
        raise FileNotFoundError(
            f"{folder}: no lm-eval result file (*.json) there; give the folder that has them"
        )
    names = _names({model for model, *_ in values})
    rows = []
    for (model, step, task, metric), (value, stderr, _) in values.items():
        rows.append((names[model], step, step * _batch(model), task, metric, value, stderr))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(COLUMNS[:5], ignore_index=True)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"{path}: broken JSON ({error}); fetch the file again or remove it"
        ) from error
    return content if isinstance(content, dict) else {}


def _dict(content: dict[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _kind(content: dict[str, Any], task: str, metrics: dict[str, Any], shots: Any) -> str:
    age = "0.4" if any("," in name for name in metrics) else "before 0.4"
    version = _dict(content, "versions").get(task)
    limit = _dict(content, "config").get("limit")
    asked = [f"limit {limit}"] if limit else []
    asked += [name for name in ("chat_template", "system_instruction") if content.get(name)]
    return ", ".join([f"lm-eval {age}", f"task version {version}", f"{shots} shots", *asked])


def _only(kinds: dict, key: tuple, kind: str, path: Path, curve: str) -> None:
    """Remember the first kind seen under a key.

    **Raises:** `ValueError` for another.
    """
    first, before = kinds.setdefault(key, (kind, path))
    if first != kind:
        raise ValueError(f"{curve}: {first} in {before}, but {kind} in {path}; keep one kind")


def _measured(metrics: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The metric, value and standard error of each number in a task's results."""
    new = any("," in name for name in metrics)
    for name, value in metrics.items():
        metric, _, kind = name.partition(",")
        if "_stderr" in name or not _is_number(value) or (new and not kind):
            continue
        error = f"{metric}_stderr,{kind}" if new else f"{name}_stderr"
        stderr = metrics.get(error)
        if not _is_number(stderr):
            stderr = math.nan
        shown = metric if kind in ("", "none") else name
        yield shown, float(value), float(stderr)


def _origin(content: dict[str, Any], path: Path) -> _Origin:
    """Model and step: from the model's arguments, else the file's name, else its folders."""
    config = _dict(content, "config")
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        arguments = {}
    source = str(arguments.get("pretrained") or config.get("model_name") or "").replace("\\", "/")
    revision = str(arguments.get("revision") or "")
    changes = [f"{name} {arguments[name]}" for name in _CHANGES if _is_set(arguments.get(name))]
    said = [revision, source, *changes]
    steps = {int(n) for place in (*said, path.name) for n in _STEP.findall(place)}
    folders = path.parent.parts
    if not steps:
        steps = {int(n) for n in _STEP.findall("/".join(folders))[-1:]}
    if len(steps) != 1:
        what = f"steps {sorted(steps)}" if steps else "no step"
        raise ValueError(
            f"{path}: {what} in its name and model_args; a result file needs one, as step1000"
        )
    named = _STEP.split(path.stem)[0] if _STEP.search(path.stem) else ""
    model = _parts(source.split("/")) or _parts([named]) or _parts(folders)
    if not model:
        raise ValueError(
            f"{path}: no model in its name and model_args; put it in a folder of its name"
        )
    stages = tuple(sorted({s.lower() for s in _STAGE.findall(f"{revision} {source} {path}")}))
    behind = _STEP.split(source, 1)[2:]
    return _Origin(model, steps.pop(), stages, _form([revision, *behind, *changes]))


def _is_set(value: Any) -> bool:
    return str(value).lower() not in ("none", "false", "")


def _form(places: Sequence[str]) -> str:
    """What is said of a checkpoint beside its model, step and stage."""
    words = re.split(r"[\s/_.,=-]+", _COUNTED.sub("", _STEP.sub("", " ".join(places))))
    told = " ".join(word for word in words if not _FORMAL.fullmatch(word))
    return f"of {told}" if told else "of no other form"


def _parts(path: Sequence[str]) -> tuple[str, ...]:
    """A model's path up to its step, without folders at its end that say nothing of it."""
    parts = []
    for part in path:
        named = _STAGE.sub("", _STEP.split(part)[0]).removesuffix("global")
        parts.append(named.strip("-_. ").replace("-v1.1", ""))
        if _STEP.search(part):
            break
    while parts and _NAMELESS.fullmatch(parts[-1]):
        parts.pop()
    return tuple(part for part in parts if part and part != "/")


def _names(models: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest end of each path that no other path has."""
    names = {}
    for model in models:
        for count in range(1, len(model) + 1):
            names[model] = "/".join(model[-count:])
            if sum(other[-count:] == model[-count:] for other in models) == 1:
                break
    return names


def _batch(model: tuple[str, ...]) -> float:
    """Tokens a step of EleutherAI's own runs: 2 Mi, or what the name says. NaN for any other."""
    name = re.fullmatch(r"pythia-[\d.]+[mb](-bf16|-([\d.]+)MtokBS)?(-deduped)?", model[-1])
    theirs = model[-2:-1] == ("EleutherAI",)
    if name is None or not theirs:
        return math.nan
    millions = float(name[2] or 2)
    return millions * 2**20
