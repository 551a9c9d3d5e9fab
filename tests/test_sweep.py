"""A sweep over the loopback hub: killed, faulty, resumed, stale; and Snakemake running it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest
import sweep
import tenacity
import torch
from huggingface_hub import close_session, constants
from sweep import hub as reader
from sweep import measure, plan

import headbound

ROOT = Path(__file__).parents[1]
STEPS = hub.STEPS[:4]
HEADS = sweep.Settings(whole=False)


@pytest.fixture(scope="module")
def filled():
    with hub.serving(steps=STEPS) as server:
        yield server


@pytest.fixture
def served(filled, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, filled.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", filled.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reader, "WAIT", 0.01)
    hub.hurry(monkeypatch)
    filled.fail([])
    branches = {model: dict(names) for model, names in filled.branches.items()}
    yield filled
    filled.fail([])
    filled.branches = branches
    close_session()


@pytest.fixture
def table():
    return {
        f"EleutherAI/pythia-{size}": [f"step{step}" for step in STEPS]
        for size in ("14m", "31m", "70m")
    }


@pytest.fixture
def prose(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(500)]
    path = tmp_path / "prose.txt"
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=500)) + f" {n}" for n in range(400)))
    return str(path)


def test_a_head_sweep_costs_little_more_than_its_heads(served, table, monkeypatch):
    monkeypatch.setattr(reader, "authenticated", lambda: True)
    hub.pythia_suite(served, {"wide-1": 128, "wide-2": 192}, steps=(0, 1, 2))
    table = {f"EleutherAI/wide-{n}": ["step0", "step1", "step2"] for n in (1, 2)}
    before = served.sent
    frame = measure.run(table, HEADS)
    assert served.sent - before < 1.2 * sum(3 * 2048 * width * 2 for width in (128, 192))
    assert list(frame.status) == ["ok"] * 6
    assert frame.singular_entropy.between(0, math.log(64)).all()
    first = hub.checkpoint(128, 2048, seed=0)[1]["embed_out.weight"][:2000].double()
    values = torch.linalg.svdvals(first - first.mean(0))
    p = values / values.sum()
    assert frame.singular_entropy_centred[0] == pytest.approx(
        math.log(128) + float((p * p.log()).sum()), rel=1e-4
    )
    before = served.sent
    assert measure.run(table, HEADS).equals(frame)
    assert served.sent == before


@pytest.mark.slow
def test_whole_checkpoints_give_loss_and_anisotropy_and_go_again(served, table, prose, tmp_path):
    settings = sweep.Settings(source=prose, texts=4, length=32)
    few = {model: names[:1] for model, names in table.items()}
    frame = measure.run(few, settings)
    assert frame.loss.between(7, 8.5).all()
    assert (frame.loss_low < frame.loss).all()
    assert frame.anisotropy_after_norm.between(-1, 1).all()
    heads = measure.run(few, HEADS._replace(name="heads"))
    assert frame.singular_entropy.tolist() == pytest.approx(
        heads.singular_entropy.tolist(), rel=1e-6
    )
    assert not list((tmp_path / "cache" / "checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_third_of_the_answers_failing_changes_no_result(served, table):
    clean = measure.run(table, HEADS)
    served.fail_often(1 / 3)
    assert measure.run(table, HEADS._replace(name="faulty")).equals(clean)


@pytest.mark.slow
def test_what_the_network_left_out_is_named(served, table, monkeypatch):
    monkeypatch.setattr(reader, "TRIES", 2)
    for model in table:
        measure.audited(model, table[model], HEADS)
    served.fail(["503"] * 10**6)
    with pytest.raises(
        ConnectionError,
        match=r"^12 checkpoints are missing: .*pythia-14m at step0: .*pythia-70m at step4",
    ):
        measure.run(table, HEADS)
    served.fail([])
    assert len(measure.run(table, HEADS)) == 12


def test_what_the_audit_finds_is_named_and_has_no_numbers(served, table):
    branches = served.branches["EleutherAI/pythia-14m"]
    served.branches = {
        **served.branches,
        "EleutherAI/pythia-14m": {**branches, "step1": branches["step0"]},
    }
    frame = measure.run(
        {"EleutherAI/pythia-14m": [*table["EleutherAI/pythia-14m"][:3], "step7"]}, HEADS
    )
    assert list(frame.status) == ["identical", "identical", "ok", "missing"]
    assert frame.singular_entropy.isna().tolist() == [True, True, False, True]


def test_two_checkpoints_that_swapped_their_names_are_found_by_their_heads(served):
    tokenizer, (config, first), (_, last) = (
        hub.tokenizer_files(300),
        hub.checkpoint(32, 512),
        hub.checkpoint(32, 512, seed=9),
    )
    steps = list(range(10))
    for n, share in enumerate([0, 1, 2, 7, 4, 5, 6, 3, 8, 9]):  # 3 and 7 swapped
        tensors = {name: first[name] * (1 - share / 9) + last[name] * (share / 9) for name in first}
        served.commit("a/swapped", f"step{n}", {**config, **tokenizer, **hub.weights(tensors)})
    frame = measure.run({"a/swapped": [f"step{n}" for n in steps]}, HEADS)
    assert frame.step[frame.status != "ok"].tolist() == [3, 7]
    assert set(frame.detail[frame.status != "ok"]) == {
        "far from the checkpoints before and after it"
    }


def test_a_checkpoint_that_changed_since_its_audit_is_refused(served, table):
    model, names = next(iter(table.items()))
    measure.audited(model, names, HEADS)
    branches = served.branches[model]
    served.branches = {**served.branches, model: {**branches, "step1": branches["step4"]}}
    with pytest.raises(ValueError, match="changed on the Hub since its audit"):
        measure.run(table, HEADS)


def test_results_of_another_version_are_named_and_made_again(served, table, monkeypatch, capsys):
    one = {"EleutherAI/pythia-14m": ["step1"]}
    measure.run(one, HEADS)
    monkeypatch.setattr(headbound, "__version__", "99")
    assert measure.left(one, HEADS) == [("EleutherAI/pythia-14m", "step1")]
    assert "made with {'version': '0" in capsys.readouterr().err
    measure.run(one, HEADS)
    assert not measure.left(one, HEADS)


def test_a_corrected_text_makes_results_of_it_invalid(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a text", encoding="utf-8")
    settings = sweep.Settings(source=str(path))
    before = settings.made_by()
    assert settings.made_by() == before
    path.write_text("another text", encoding="utf-8")
    assert settings.made_by() != before
    assert "text" not in sweep.Settings().made_by()


def test_a_long_pause_of_the_hub_is_told(monkeypatch, capsys):
    state = tenacity.RetryCallState(None, None, (), {})
    state.set_exception((ConnectionError, ConnectionError("no\nroute"), None))
    state.upcoming_sleep = 2
    reader._tell(state)
    assert capsys.readouterr().err == ""
    state.upcoming_sleep = 8
    reader._tell(state)
    assert capsys.readouterr().err == "headbound: no route: asked again in 8 s, 1 of 8\n"


def test_models_of_different_vocabularies_are_not_mixed(served, table):
    files, tensors = hub.checkpoint(32, 2048)
    served.commit(
        "other/model", "step1", {**files, **hub.tokenizer_files(400), **hub.weights(tensors)}
    )
    with pytest.raises(ValueError, match="different vocabularies"):
        measure.run({"EleutherAI/pythia-14m": ["step1"], "other/model": ["step1"]}, HEADS)


def sweep_file(tmp_path, **settings):
    path = tmp_path / "sweep.yaml"
    plan = {
        "name": "cli",
        "models": ["EleutherAI/pythia-14m", "EleutherAI/pythia-31m"],
        "steps": list(STEPS),
    }
    path.write_text(json.dumps({**plan, "whole": False, **settings}))
    return path


def environment(served, cache):
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {
        "PATH": programs,
        "HF_ENDPOINT": served.url,
        "HEADBOUND_CACHE": str(cache),
        "HEADBOUND_WAIT": "0.01",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return {
        **os.environ,
        **variables,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'workflow'}",
        "HF_HUB_OFFLINE": "0",
    }


def contents(cache):
    return {
        path.name + path.parent.name: path.read_bytes()
        for path in (cache / "sweeps").rglob("step*.json")
    }


@pytest.mark.slow
def test_killed_halfway_and_run_again_gives_the_same_files(served, tmp_path):
    path = sweep_file(tmp_path, steps=[0, 1])
    program = f"from sweep import measure, read; measure.run(*read({str(path)!r}))"
    table, settings = sweep.read(path)
    measure.run(table, settings)
    cache = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(served, cache), stderr=subprocess.DEVNULL
    )
    halfway = len(served.answers) + 20
    while len(served.answers) < halfway and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(
        [sys.executable, "-c", program],
        env=environment(served, cache),
        check=True,
        capture_output=True,
    )
    assert contents(cache) == contents(tmp_path / "cache")
    assert len(contents(cache)) == 4
    assert not [p for p in (cache / "sweeps").rglob("*") if p.is_file() and p.suffix != ".json"]


@pytest.mark.slow
def test_snakemake_runs_it_and_again_does_nothing(served, tmp_path):
    """From a folder whose name has a space, an umlaut and another script's letter."""
    folder = tmp_path / "my sweeps ü中"
    folder.mkdir()
    path = sweep_file(folder, steps=[0], models=["EleutherAI/pythia-31m"])
    variables = {**environment(served, folder / "flow"), "HEADBOUND_SWEEP": str(path)}
    snakemake = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "workflow/sweep.smk"),
        "--cores",
        "2",
    ]
    command = [*snakemake, "--directory", str(ROOT), "--nolock", "sweep"]
    first = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert "Nothing to be done" in again.stdout + again.stderr
    table, settings = sweep.read(path)
    measure.run(table, settings)
    assert contents(folder / "flow") == contents(tmp_path / "cache")


def planned(path, whole=True):
    return plan.words(*sweep.read(path), plan.Rates())


def test_the_plan_measures_bytes_or_says_that_it_computed_them(served, tmp_path, monkeypatch):
    printed = planned(sweep_file(tmp_path, whole=True))
    for line in ("jobs: 8, 0 of them done", "bytes: 0.0 GB to fetch", "GPU hours:", "disk peak:"):
        assert line in printed
    assert printed.count("measured") == 2
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(reader, "TRIES", 2)
    printed = planned(ROOT / "workflow/sweep.yaml")
    assert "jobs: 1540" in printed
    assert printed.count("hub out of reach") == 10


def test_the_plan_costs_what_its_formula_says(served, tmp_path):
    table, settings = sweep.read(
        sweep_file(tmp_path, whole=False, models=["EleutherAI/pythia-14m"])
    )
    costs = plan.table(table, settings, plan.Rates(tflops=1, tflops64=1))
    V, d = 2048, 32
    assert costs["fetched"].item() == len(STEPS) * 2 * V * d
    operations = V * d**2 + 4 / 3 * d**3
    assert costs["GPU hours"].item() == pytest.approx(len(STEPS) * operations / 1e12 / 3600)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mpt", "opt"])
def test_the_plan_reads_any_familys_names_of_the_sizes(served, tmp_path, family):
    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64},
        "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64},
        "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 64},
        "opt": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64},
    }
    config = json.dumps({"model_type": family, **sizes[family]}).encode()
    served.commit("crfm/small", "step100", {"config.json": config, "model.safetensors": bytes(100)})
    shape = plan.shape("crfm/small", "step100")
    assert [shape[key] for key in ("layers", "width", "rows", "size")] == [2, 16, 64, 100]


def test_a_plan_with_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'lenght' was unexpected"):
        sweep.read(sweep_file(tmp_path, lenght=3))
