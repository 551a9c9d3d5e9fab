import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from headbound import models
from headbound.measure import checkpoint
from headbound.train import step, tunnel

TINY = {
    "vocab_size": 300,
    "layers": 1,
    "context": 16,
    "batch_size": 4,
    "checkpoints": 4,
    "held_out_texts": 8,
    "warmup": 0.1,
}


@pytest.fixture
def suites(tmp_path, monkeypatch):
    """Where suites are kept: in a cache that is empty."""
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    return tmp_path / "suites"


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_table_and_hub_layout(source, suites, monkeypatch, cores):
    """With two cores, the models train in processes of their own."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    table = tunnel.train([8, 16], 12, source=source, **TINY)
    assert list(table.hidden_size.unique()) == [8, 16]
    assert (
        list(table[table.hidden_size == 8].step)
        == tunnel._checkpoint_steps(12, 4)
        == [0, 1, 2, 5, 12]
    )
    assert (table.tokens == table.step * 64).all()
    assert (table.loss_low <= table.loss).all()
    assert (table.loss <= table.loss_high).all()
    # Before any training the model knows nothing: its loss is that of a uniform guess.
    assert table.loss.iloc[0] == pytest.approx(math.log(300), abs=0.05)
    assert not list(suites.rglob("training.pt"))
    # Every other chapter reads a checkpoint as it reads Pythia's, and finds the numbers of the table again.
    row = table.iloc[-1]
    model, tokenizer = models.load(row.path)
    assert len(tokenizer) == 300
    _, _, rows = tunnel.corpus(source, 300, 16, 8)
    again = checkpoint.measure(model, rows)
    assert {k: row[k] for k in again} == pytest.approx(again, rel=1e-5)
    (weights,) = suites.rglob("neox-d8/step12/model.safetensors")
    before = weights.stat().st_mtime_ns
    narrow = table[table.hidden_size == 8]
    assert tunnel.train([8], 12, source=source, **TINY).equals(narrow)
    assert weights.stat().st_mtime_ns == before


SCRIPT = """
import sys, time
from headbound.train import step, tunnel
tunnel.SAVE_EVERY = 0.0
slow = tunnel.batch
tunnel.batch = lambda *a: time.sleep(float(sys.argv[2])) or slow(*a)
tunnel.train([8], 60, source=sys.argv[1], **{tiny})
"""


@pytest.mark.slow
def test_killed_run_ends_as_an_unbroken_one(source, suites, monkeypatch):
    script = [sys.executable, "-c", SCRIPT.replace("{tiny}", repr(TINY))]
    with subprocess.Popen([*script, source, "0.1"], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list(suites.rglob("step15")):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert list(suites.rglob("training.pt"))
    assert not list(suites.rglob("step60"))
    resumed = tunnel.train([8], 60, source=source, **TINY)
    monkeypatch.setenv("HEADBOUND_CACHE", str(suites.with_name("whole")))
    unbroken = tunnel.train([8], 60, source=source, **TINY)
    assert resumed.drop(columns="path").equals(unbroken.drop(columns="path"))
    for one, other in zip(resumed.path, unbroken.path, strict=True):
        a, b = (load_file(f"{path}/model.safetensors") for path in (one, other))
        assert all(torch.equal(a[k], b[k]) for k in a | b)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(source, suites):
    with pytest.raises(FloatingPointError, match=r"loss = nan at step \d+ of neox-d8: lower peak"):
        tunnel.train([8], 40, source=source, **TINY | {"peak": math.nan, "warmup": 0.0})
    (measured,) = suites.rglob("neox-d8/step0/measurements.json")
    assert json.loads(measured.read_text())["loss"] > 0
    assert not list(suites.rglob("step40"))


class Bottleneck(torch.nn.Module):
    def __init__(self, d, vocab):
        super().__init__()
        self.down, self.up = (
            torch.nn.Linear(d, 2, bias=False),
            torch.nn.Linear(2, vocab, bias=False),
        )

    def forward(self, hidden_states):
        return self.up(self.down(hidden_states))


def with_bottleneck(config):
    model = tunnel.GPTNeoXForCausalLM(config)
    model.set_output_embeddings(Bottleneck(config.hidden_size, config.vocab_size))
    return model


def test_another_head(source, suites):
    table = tunnel.train([8], 6, source=source, build=with_bottleneck, variant="bottleneck", **TINY)
    assert table.singular_entropy.isna().all()
    assert list(suites.rglob("bottleneck-d8/step6/model.safetensors"))
    with pytest.raises(ValueError, match="variant = 'neox': only a model of another build"):
        tunnel.train([8], 6, source=source, build=with_bottleneck, **TINY)


def test_a_broken_run_of_another_head_goes_on_bit_for_bit(source, suites, monkeypatch, stopped):
    options = {"source": source, "build": with_bottleneck, "variant": "other"} | TINY
    with monkeypatch.context() as patch:
        patch.setattr(tunnel, "SAVE_EVERY", 0.0)
        stopped(lambda: tunnel.train([8], 20, **options), at=13)
    assert list(suites.rglob("other-d8/training.pt"))
    resumed = tunnel.train([8], 20, **options)
    monkeypatch.setenv("HEADBOUND_CACHE", str(suites.with_name("whole")))
    whole = tunnel.train([8], 20, **options)
    assert resumed.drop(columns="path").equals(whole.drop(columns="path"))
    a, b = (load_file(f"{table.path.iloc[-1]}/model.safetensors") for table in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a | b)


def test_epochs_cut_the_data_and_ties_tie(source, suites):
    options = TINY | {"epochs": 4.0, "tied": True}
    table = tunnel.train([8], 16, source=source, **options)
    model, _ = models.load(table.path.iloc[-1])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    # 16 steps of 4 windows over 4 epochs: 16 of 64 windows, each seen four times.
    stream = np.arange(64 * 16 + 1)
    recipe = step.Recipe(8, 16, context=16, batch_size=4, epochs=4.0)
    seen = torch.cat([tunnel.batch(stream, n, recipe)[:, 0] for n in range(16)])
    assert sorted(seen.bincount().tolist())[-17:] == [0] + [4] * 16
    assert seen.max() > 16 * 16  # drawn from the whole stream, not cut from its beginning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sizes": [12]}, "hidden_size = 12: must be a multiple of 8"),
        ({"steps": 0}, "steps = 0, checkpoints = 4: both must be 1 or more"),
        ({"schedule": "linear"}, "schedule = 'linear': must be one of \\('cosine', 'constant'\\)"),
        ({"epochs": 1e9}, r"epochs = 1000000000.0: 0 windows of \d+; give more text"),
        ({"held_out_texts": 10**6}, "count = 1000000, length = 17"),
    ],
)
def test_bad_input(source, suites, change, message):
    with pytest.raises(ValueError, match=message):
        tunnel.train(**{"hidden_sizes": [8], "steps": 6, "source": source} | TINY | change)


@given(steps=st.integers(1, 10**6), checkpoints=st.integers(1, 40))
def test_checkpoint_steps(steps, checkpoints):
    found = tunnel._checkpoint_steps(steps, checkpoints)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[-1] == steps


@given(
    steps=st.integers(1, 5000),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_learning_rate_stays_between_zero_and_the_peak(steps, warmup, schedule):
    recipe = step.Recipe(8, steps, peak=0.01, schedule=schedule, warmup=warmup)
    rates = [recipe.learning_rate(s) for s in {0, steps // 2, steps - 1}]
    assert all(0 < rate <= 0.01 + 1e-12 for rate in rates)
