"""Published evaluations: lm-eval's result files, old and new, as one tidy table; where Pythia's are."""

import json
import os
import re
import subprocess
import tempfile
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from headbound.cache import cache_dir

REPOSITORY, COMMIT = (
    "https://github.com/EleutherAI/pythia",
    "a19eecb807ec2c79a39ebf18108816e6ffffc1d5",
)
SIZES = ("70m", "160m", "410m", "1b-bf16", "1.4b", "2.8b", "6.9b", "12b")
# layers, hidden size and padded vocabulary, as in Biderman et al. 2023, table 1
PYTHIA = {
    "14m": (6, 128, 50_304),
    "31m": (6, 256, 50_304),
    "70m": (6, 512, 50_304),
    "160m": (12, 768, 50_304),
    "410m": (24, 1024, 50_304),
    "1b": (16, 2048, 50_304),
    "1.4b": (24, 2048, 50_304),
    "2.8b": (32, 2560, 50_304),
    "6.9b": (32, 4096, 50_432),
    "12b": (36, 5120, 50_688),
}
COLUMNS = ["model", "step", "tokens", "task", "metric", "value", "stderr"]


def read_results(folder: str | Path, shots: int | None = None) -> pd.DataFrame:
    """One row per model, step, task and metric from all result files (`*.json`) below a folder.

    **Arguments:**

    - `folder`: searched at any depth. Files of the old harness (`acc`, `acc_stderr`) and of lm-eval 0.4
      (`acc,none`, `acc_stderr,none`) are read; other JSON is passed over. Model and step are what the file's
      `model_args` say, else its name and folders. `-v1.1` is dropped from names, as on the Hub.
    - `shots`: keep only tasks with that many examples in the prompt.

    **Returns:** columns model, step, tokens (seen in training; NaN where the batch is unknown), task, metric,
    value, stderr (NaN where the file has none), sorted.

    **Raises:** `FileNotFoundError` if there is no result file; `ValueError` for broken JSON, a file without a
    step, two files for one step, or one curve from two harness versions or numbers of shots.
    """
    rows, curves = {}, {}
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}: broken JSON ({error}); fetch the file again or remove it"
            ) from error
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            continue
        model, step = _origin(content, path)
        for task, metrics in content["results"].items():
            if not isinstance(metrics, dict):
                continue
            new = any("," in name for name in metrics)
            asked = (content.get("n-shot") or {}).get(
                task, (content.get("config") or {}).get("num_fewshot")
            )
            if shots is not None and asked != shots:
                continue
            version = (content.get("versions") or {}).get(task)
            how = f"lm-eval {'0.4' if new else 'before 0.4'}, task version {version}, {asked} shots"
            first, before = curves.setdefault((model, task), (how, path))
            if first != how:
                raise ValueError(
                    f"{model}, {task}: {first} in {before}, but {how} in {path}; keep one kind"
                )
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if "_stderr" in name or type(value) not in (int, float) or (new and not kind):
                    continue
                key = (model, step, task, metric if kind in ("", "none") else name)
                if key in rows:
                    raise ValueError(
                        f"{model}, step {step}, {task}: in {rows[key][2]} and {path}; remove one"
                    )
                stderr = metrics.get(f"{metric}_stderr,{kind}" if new else f"{name}_stderr")
                rows[key] = (
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else nan,
                    path,
                )
    if not rows:
        raise FileNotFoundError(
            f"{folder}: no lm-eval result file (*.json) there; give the folder that has them"
        )
    data = [
        (m, s, s * _batch(m), t, metric, *values[:2]) for (m, s, t, metric), values in rows.items()
    ]
    return pd.DataFrame(data, columns=COLUMNS).sort_values(COLUMNS[:5], ignore_index=True)


def parameters(model: str, embeddings: bool = True) -> int:
    """Parameters of a Pythia model, from its architecture: l(12 d² + 13 d) + 2 d, and 2 V d of embeddings.

    The head counts as an embedding. **Raises:** `ValueError` for a model whose name has no size of Pythia's.
    """
    size = re.search(r"pythia-([\d.]+[mb])", model)
    if not size or size[1] not in PYTHIA:
        raise ValueError(
            f"model = {model!r}: its size is unknown; Pythia's are {', '.join(PYTHIA)}"
        )
    layers, d, vocabulary = PYTHIA[size[1]]
    return layers * (12 * d**2 + 13 * d) + 2 * d + embeddings * 2 * vocabulary * d


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """What a table of results lacks: for each model, task and metric the steps that others have, by name."""
    models, steps = sorted(set(table["model"])), set(table["step"])
    found = (
        table[table["value"].notna()]
        .groupby(["model", "task", "metric"])["step"]
        .agg(set)
        .to_dict()
    )
    rows = []
    for task, metric in sorted({key[1:] for key in found}):
        for model in models:
            if missing := steps - found.get((model, task, metric), set()):
                words = "all" if missing == steps else ", ".join(map(str, sorted(missing)))
                rows.append((model, task, metric, words))
    return pd.DataFrame(rows, columns=["model", "task", "metric", "missing steps"])


def find(
    folder: str | None = None, url: str = REPOSITORY, commit: str = COMMIT
) -> tuple[Path | None, str]:
    """The folder of Pythia's published evaluations, and where it comes from, in words.

    Tried in turn: `folder` or the variable HEADBOUND_PYTHIA_EVALS; a copy of `url` at `commit`, fetched once
    by git into the cache (a commit is a hash of its content; the copy is compared with it at each use);
    `../shared/pythia` beside the repository. None, with the reason, where all fail.

    **Raises:** `FileNotFoundError` for a given folder that does not exist; `ValueError` for a changed copy.
    """
    if given := folder or os.environ.get("HEADBOUND_PYTHIA_EVALS"):
        if not Path(given).is_dir():
            raise FileNotFoundError(
                f"evaluations folder {given!r}: no such folder; give one with result files"
            )
        return Path(given), "the folder given"
    try:
        return _fetch(url, commit), f"{url} at {commit[:10]}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
    beside = Path(__file__).parents[3] / "shared" / "pythia"
    return (
        (beside, "the copy beside the repository")
        if beside.is_dir()
        else (None, f"not fetched: {reason}")
    )


def _fetch(url: str, commit: str) -> Path:
    target = cache_dir() / f"pythia-evals-{commit}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            copy = Path(scratch) / "copy"
            wanted = [f"evals/pythia-v1/pythia-{size}/zero-shot" for size in SIZES]
            _git(copy.parent, "init", "--quiet", copy.name)
            _git(copy, "remote", "add", "origin", url)
            _git(copy, "sparse-checkout", "set", *wanted)
            _git(copy, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit)
            _git(copy, "checkout", "--quiet", commit)
            copy.replace(target)
    if (
        _git(target, "rev-parse", "HEAD").strip() != commit
        or _git(target, "status", "--porcelain").strip()
    ):
        raise ValueError(
            f"{target}: not as in commit {commit[:10]} any more; delete it to fetch it again"
        )
    return target / "evals"


def _git(folder: Path, *arguments: str) -> str:
    quiet = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
        "GIT_HTTP_LOW_SPEED_TIME": "20",
    }
    command = ["git", "-C", str(folder), *arguments]
    environment = os.environ | quiet
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=180
    ).stdout


def _origin(content: dict[str, Any], path: Path) -> tuple[str, int]:
    """Model and step of a result file."""
    config = content.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    source = str(arguments.get("pretrained") or config.get("model_name") or "")
    places = (str(arguments.get("revision")), source, path.name)
    said = {int(n) for place in places for n in re.findall(r"step_?(\d+)", place)}
    said = said or {int(n) for n in re.findall(r"step_?(\d+)", str(path.parent))[-1:]}
    if len(said) != 1:
        what = f"steps {sorted(said)}" if said else "no step"
        raise ValueError(
            f"{path}: {what} in its name and model_args; a result file needs one, as step1000"
        )
    names = [part for part in source.split("/") if part and not re.fullmatch(r"step_?\d+", part)]
    folders = [part for part in path.parent.parts if not re.fullmatch(r"step_?\d+|\w+-shot", part)]
    return (names or folders)[-1].replace("-v1.1", ""), said.pop()


def _batch(model: str) -> float:
    """Tokens a step: 2 Mi for Pythia but where the name says otherwise."""
    named = re.search(r"([\d.]+)MtokBS", model)
    return float(named[1]) * 2**20 if named else 2.0**21 if model.startswith("pythia-") else nan
