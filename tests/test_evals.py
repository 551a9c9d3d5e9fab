import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import evals
from headbound.measure.saturation import detect

SHARED = Path(evals.__file__).parents[3] / "shared" / "pythia"


def old(folder, step, acc, task="lambada_openai", model="pythia-v1.1-70m", shots=0, **more):
    metrics = {"acc": acc, "acc_stderr": 0.005, **more}
    arguments = f"use_accelerate=True,pretrained=EleutherAI/{model},revision=step{step}"
    content = {
        "results": {task: metrics},
        "versions": {task: 0},
        "config": {"model": "hf-causal", "model_args": arguments, "num_fewshot": shots},
    }
    return write(Path(folder) / f"{model}_step{step}.json", content)


def new(folder, step, acc, task="lambada_openai", model="org/other-31m", **more):
    metrics = {"alias": task, "acc,none": acc, "acc_stderr,none": 0.005, **more}
    content = {
        "results": {task: metrics},
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "config": {"model": "hf", "model_args": {"pretrained": model, "revision": f"step{step}"}},
    }
    return write(
        Path(folder) / model.replace("/", "__") / f"results_2026-01-01T00-00-{step:02}.1.json",
        content,
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_both_harnesses_in_one_table(tmp_path):
    old(tmp_path / "a" / "zero-shot", 1000, 0.1234567890123456)
    new(tmp_path / "b", 20, 0.25, **{"perplexity,none": 30.5, "perplexity_stderr,none": "N/A"})
    table = evals.read_results(tmp_path)
    assert list(table.columns) == ["model", "step", "tokens", "task", "metric", "value", "stderr"]
    assert [
        tuple(row) for row in table[["model", "step", "task", "metric", "value"]].to_numpy()
    ] == [
        ("other-31m", 20, "lambada_openai", "acc", 0.25),
        ("other-31m", 20, "lambada_openai", "perplexity", 30.5),
        ("pythia-70m", 1000, "lambada_openai", "acc", 0.1234567890123456),
    ]
    assert table["tokens"].iloc[2] == 1000 * 2_097_152
    assert np.isnan(table["tokens"].iloc[0])
    assert np.isnan(table["stderr"].iloc[1])


def test_a_local_checkpoint_folder_names_model_and_step(tmp_path):
    content = {
        "results": {"t": {"acc,none": 0.5}},
        "config": {"model_args": "pretrained=suite/d032/step64"},
    }
    write(tmp_path / "results_2026.json", content)
    write(
        tmp_path / "wide" / "step128" / "results_2026.json", {"results": {"t": {"acc,none": 0.6}}}
    )
    table = evals.read_results(tmp_path)
    assert list(zip(table["model"], table["step"], strict=True)) == [("d032", 64), ("wide", 128)]


def test_another_filter_stays_in_the_metrics_name(tmp_path):
    new(
        tmp_path,
        1,
        0.5,
        **{"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    )
    row = evals.read_results(tmp_path).set_index("metric").loc["exact_match,strict-match"]
    assert (row["value"], row["stderr"]) == (0.25, 0.1)


def test_tasks_of_one_step_may_lie_in_several_files_and_other_json_is_passed_over(tmp_path):
    old(tmp_path / "x", 5, 0.5)
    old(tmp_path / "y", 5, 0.6, task="sciq")
    write(tmp_path / "config.json", {"hidden_size": 3})
    write(tmp_path / "list.json", [1])
    assert list(evals.read_results(tmp_path)["task"]) == ["lambada_openai", "sciq"]


def test_gaps_are_named(tmp_path):
    for step in (0, 1000, 2000):
        old(tmp_path / "a", step, 0.5)
        old(tmp_path / "b", step, 0.5, task="sciq", model="pythia-160m")
    (tmp_path / "a" / "pythia-v1.1-70m_step1000.json").unlink()
    lacking = [tuple(row) for row in evals.gaps(evals.read_results(tmp_path)).to_numpy()]
    assert ("pythia-70m", "lambada_openai", "acc", "1000") in lacking
    assert ("pythia-160m", "lambada_openai", "acc", "all") in lacking
    assert len(lacking) == 3


@pytest.mark.parametrize(
    ("model", "size"), [("pythia-70m", 18_915_328), ("pythia-1b-bf16", 805_736_448)]
)
def test_parameters_are_those_that_pythias_authors_publish_and_that_transformers_builds(
    model, size
):
    assert evals.parameters(model, embeddings=False) == size
    layers, d, vocabulary = evals.PYTHIA[model.split("-")[1]]
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=d, num_hidden_layers=layers, intermediate_size=4 * d
    )
    with torch.device("meta"):
        assert GPTNeoXForCausalLM(config).num_parameters() == evals.parameters(model)


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="'opt-1b': its size is unknown"):
        evals.parameters("opt-1b")


def broken(folder):
    old(folder, 1, 0.5).write_text('{"results": {')


def twice(folder):
    old(folder / "a", 1, 0.5)
    old(folder / "b", 1, 0.5)


def mixed(folder):
    old(folder, 1, 0.5, model="other-31m")
    new(folder, 2, 0.5)


def mixed_shots(folder):
    old(folder, 1, 0.5)
    old(folder, 2, 0.5, shots=5)


def stepless(folder):
    write(
        folder / "opt.json",
        {"results": {"t": {"acc": 1.0}}, "config": {"model_args": "pretrained=opt"}},
    )


def contradictory(folder):
    old(folder, 1, 0.5).rename(folder / "m_step2.json")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (broken, "step1.json: broken JSON"),
        (twice, "pythia-70m, step 1, lambada_openai: in .* remove one"),
        (mixed, "lm-eval 0.4.* but lm-eval before 0.4"),
        (mixed_shots, "0 shots .* 5 shots"),
        (stepless, "opt.json: no step"),
        (contradictory, r"steps \[1, 2\]"),
        (lambda folder: None, "no lm-eval result file"),
    ],
)
def test_bad_results_are_named(tmp_path, plant, message):
    plant(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evals.read_results(tmp_path)


def test_shots_pick_one_kind(tmp_path):
    mixed_shots(tmp_path)
    assert list(evals.read_results(tmp_path, shots=5)["step"]) == [2]


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A repository on this disk that stands in for EleutherAI's."""
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADBOUND_PYTHIA_EVALS", raising=False)
    folder = tmp_path / "upstream"
    old(folder / "evals/pythia-v1/pythia-70m/zero-shot", 1, 0.5)
    old(folder / "evals/pythia-v1/pythia-70m-deduped/zero-shot", 1, 0.5, model="pythia-70m-deduped")

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(folder), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("config", "uploadpack.allowFilter", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "results")
    return folder.as_uri(), git("rev-parse", "HEAD")


def test_fetches_the_pinned_commit_once_and_only_what_it_needs(upstream):
    folder, source = evals.find(None, *upstream)
    assert set(evals.read_results(folder)["model"]) == {"pythia-70m"}
    assert upstream[1][:10] in source
    assert evals.find(None, "file:///nowhere", upstream[1])[0] == folder


def test_a_changed_copy_is_refused(upstream):
    folder, _ = evals.find(None, *upstream)
    next(folder.rglob("*step1.json")).write_text("{}")
    with pytest.raises(ValueError, match="not as in commit"):
        evals.find(None, *upstream)


def test_an_unknown_commit_leaves_nothing_behind(upstream, monkeypatch, tmp_path):
    monkeypatch.setattr(evals, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    folder, reason = evals.find(None, upstream[0], "0" * 40)
    assert folder is None
    assert reason.startswith("not fetched: ")
    assert not list((tmp_path / "cache").iterdir())


def test_a_given_folder_wins_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_PYTHIA_EVALS", str(tmp_path))
    assert evals.find()[0] == tmp_path
    with pytest.raises(FileNotFoundError, match="no such folder"):
        evals.find(str(tmp_path / "missing"))


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="Pythia's published evaluations do not lie beside the repository"
)
def test_pythia_saturates_on_lambada_below_410m_only():
    table = evals.read_results(SHARED)
    assert len(table) == 37_152
    assert evals.gaps(table).empty
    for path in sorted(SHARED.rglob("*step143000.json")):
        results = json.loads(path.read_text())["results"]
        model = path.parents[1].name
        rows = table[(table["model"] == model) & (table["step"] == 143_000)]
        for row in rows.itertuples():
            assert row.value == results[row.task][row.metric]
            assert row.stderr == results[row.task][f"{row.metric}_stderr"]
    best = {}
    curves = table[(table["task"] == "lambada_openai") & (table["metric"] == "acc")]
    for model, curve in curves.groupby("model"):
        result = detect(curve["step"], curve["value"], curve["stderr"])
        if result.p_value < 0.01:
            best[model] = result.best_step
    assert best == {"pythia-70m": 53_000, "pythia-160m": 63_000}
