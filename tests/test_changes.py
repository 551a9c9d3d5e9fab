import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import ttest_rel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import progress
from headbound.measure import checkpoint
from headbound.train import changes, tunnel
from headbound.train.changes import (
    INTERVENTIONS,
    QUANTITIES,
    Factored,
    MixtureOfSoftmaxes,
    SigSoftmax,
)

TINY = {
    "vocab_size": 300,
    "layers": 1,
    "context": 16,
    "checkpoints": 3,
    "held_out_texts": 8,
    "warmup": 0.1,
}
LIFTED = ["two-layer head", "sigsoftmax", "mixture of softmaxes"]
LINEAR = ["head of rank d/2", "head four times as wide"]


def log_probabilities(head, d, contexts=60, vocab=40, seed=0):
    """Float64 log-probabilities of random contexts, by weights large enough for a head to bend."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made, states = head(d, vocab).double(), 3 * torch.randn(contexts, d, dtype=torch.float64)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter)
    return torch.log_softmax(made(states), -1).detach()


@settings(max_examples=10)
@given(d=st.integers(1, 6), seed=st.integers(0, 99))
def test_lifted_heads_exceed_rank_d_plus_one_and_linear_ones_do_not(d, seed):
    def rank(name):
        return int(
            torch.linalg.matrix_rank(log_probabilities(INTERVENTIONS[name]["head"], d, seed=seed))
        )

    assert all(rank(name) > d + 1 for name in LIFTED)
    assert rank("head of rank d/2") <= max(1, round(d / 2)) + 1
    assert rank("head four times as wide") <= d + 1
    usual = log_probabilities(lambda d, vocab: torch.nn.Linear(d, vocab, bias=False), d, seed=seed)
    assert int(torch.linalg.matrix_rank(usual)) == d + 1
    # Modulo a constant a context, which no softmax sees, one dimension less.
    assert int(torch.linalg.matrix_rank(usual - usual.mean(1, keepdim=True))) == d


@settings(max_examples=10)
@given(d=st.integers(1, 5), components=st.integers(1, 4), seed=st.integers(0, 99))
def test_heads_are_their_formulas(d, components, seed):
    torch.manual_seed(seed)
    h = torch.randn(2, 3, d, dtype=torch.float64)
    sig = SigSoftmax(d, 7).double()
    z = h @ sig.weight.T
    p = z.exp() * z.sigmoid()
    assert torch.allclose(torch.softmax(sig(h), -1), p / p.sum(-1, keepdim=True))
    mixture = MixtureOfSoftmaxes(d, 7, components).double()
    prior = torch.softmax(h @ mixture.prior.weight.T, -1)
    parts = mixture.latent.weight.split(d)
    p = sum(
        prior[..., [k]] * torch.softmax((h @ u.T).tanh() @ mixture.weight.T, -1)
        for k, u in enumerate(parts)
    )
    assert torch.allclose(mixture(h), p.log())
    assert torch.allclose(mixture(h).exp().sum(-1), torch.ones(2, 3).double())
    factored = Factored(d, 7, 0.5).double()
    assert torch.allclose(factored(h), h @ factored.weight.T)
    assert Factored(d, 7, 4.0, torch.nn.functional.gelu).weight is None


def test_no_probability_is_lost_where_one_component_is_sure():
    head = MixtureOfSoftmaxes(2, 5)
    with torch.no_grad():
        head.weight.mul_(1e5)
    out = head(torch.ones(1, 2)).detach()
    assert torch.isfinite(out).all()
    assert float(out.exp().sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", [*LIFTED, *LINEAR])
def test_another_head_leaves_the_body_and_the_first_guess_alone(name):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    config = GPTNeoXConfig(vocab_size=300, tie_word_embeddings=False, **sizes)
    models = []
    for build in (GPTNeoXForCausalLM, partial(changes.with_head, head=INTERVENTIONS[name]["head"])):
        torch.manual_seed(3)
        models.append(build(config))
    bodies = [m.gpt_neox.state_dict() for m in models]
    assert all(torch.equal(bodies[0][k], bodies[1][k]) for k in bodies[0])
    ids = torch.arange(8)[None]
    assert torch.log_softmax(models[1](ids).logits, -1).detach().numpy() == pytest.approx(
        -math.log(300), abs=0.6
    )


def test_output_rank_is_what_the_definition_says(source):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=300, tie_word_embeddings=False, **sizes)
    ).eval()
    _, _, rows = tunnel.corpus(source, 300, 16, 12)
    logits = model(rows[:16, :-1]).logits.flatten(0, 1).double().detach()
    values = torch.linalg.svdvals(logits - logits.mean(1, keepdim=True))
    p = (values / values.sum())[:8]
    assert checkpoint.output_rank(model, rows) == pytest.approx(
        float(torch.exp(-(p * p.log()).sum())), rel=1e-5
    )


def test_runs_share_tokens_and_seeds_in_pairs(source, monkeypatch):
    every = progress.parallel
    monkeypatch.setattr(progress, "parallel", lambda jobs, *_: every(jobs, workers=1))
    names = ["baseline", "batches of a quarter", "sigsoftmax"]
    chosen = {name: INTERVENTIONS[name] for name in names}
    options = {"source": source, "batch_size": 8} | TINY
    table = changes.sweep(chosen, [8, 16], 6, replicates=2, seed=5, **options)
    assert list(table["intervention"].unique()) == names
    last = table.groupby(["intervention", "hidden_size", "seed"]).last().reset_index()
    assert len(last) == 12
    assert last["tokens"].nunique() == 1
    assert {d: sorted(rows.unique()) for d, rows in last.groupby("hidden_size")["seed"]} == {
        8: [5, 6],
        16: [7, 8],
    }
    # At step 0 a change of training has changed nothing, and the same head starts from the same weights.
    first = table[table["step"] == 0].set_index(["intervention", "seed"])["loss"]
    assert first["baseline"].equals(first["batches of a quarter"])
    found = changes.effects(changes.outcomes(table))
    assert len(found) == 2 * len(QUANTITIES)
    assert (found["n"] == 4).all()
    # A run with a partner can be told from one without.
    lone = last["seed"].isin([5, 7]) | (last["intervention"] == "baseline")
    with pytest.raises(
        ValueError, match="'batches of a quarter' and 'baseline' have other widths or seeds"
    ):
        changes.effects(
            changes.outcomes(table.merge(last[lone][["intervention", "hidden_size", "seed"]]))
        )
    with pytest.raises(ValueError, match="batch_size = 5 of 'odd': 6 steps of 8 windows"):
        changes.sweep({"odd": {"batch_size": 5}}, [8], 6, **options)


@pytest.mark.parametrize("name", ["mixture of softmaxes", "head of rank d/2"])
def test_a_broken_run_goes_on_bit_for_bit(source, tmp_path, monkeypatch, name):
    build = partial(changes.with_head, head=INTERVENTIONS[name]["head"])
    options = {"source": source, "batch_size": 4, "build": build, "variant": "other"} | TINY
    whole = tunnel.train([8], 20, tmp_path / "whole", **options)
    real = tunnel.batch

    def stop(stream, step, *rest):
        if step == 13:
            raise KeyboardInterrupt
        return real(stream, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tunnel, "batch", stop)
        patch.setattr(tunnel, "SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            tunnel.train([8], 20, tmp_path / "broken", **options)
    assert (tmp_path / "broken" / "other-d8" / "training.pt").exists()
    resumed = tunnel.train([8], 20, tmp_path / "broken", **options)
    assert resumed.drop(columns="path").equals(whole.drop(columns="path"))
    a, b = (load_file(f"{table.path.iloc[-1]}/model.safetensors") for table in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a | b)


def course(**columns):
    steps = len(columns["loss"])
    keys = {
        "intervention": "baseline",
        "hidden_size": 8,
        "seed": 0,
        "parameters": 5,
        "step": range(steps),
    }
    return pd.DataFrame({**keys, **columns})


def test_outcomes_of_a_planted_course():
    entropy = [0.0, 0.9, 0.5, 0.6]
    ranks = [8 * math.exp(-e) for e in (0.1, 2.0, 0.2, 0.5)]
    run = course(
        loss=[6.0, 4.0, 3.0, 3.5],
        anisotropy_after_norm=[0, 1, 0.3, 0.4],
        singular_entropy=entropy,
        output_rank=ranks,
    )
    found = changes.outcomes(run.sample(frac=1, random_state=0)).iloc[0]
    expected = {
        "loss": 3.5,
        "loss_late": 0.5,
        "anisotropy": 0.4,
        "head_entropy": 0.6,
        "head_late": 0.1,
    }
    expected |= {"output_entropy": 0.5, "output_late": 0.3}
    assert found[list(QUANTITIES)].to_dict() == pytest.approx(expected)
    without = changes.outcomes(run.assign(singular_entropy=math.nan)).iloc[0]
    assert math.isnan(without["head_entropy"])
    assert math.isnan(without["head_late"])


def planted(widths, replicates, shift, noise, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for name in ("baseline", "a", "b"):
        for d in widths:
            for k in range(replicates):
                values = rng.normal(d, noise, len(QUANTITIES)) + (shift if name == "a" else 0)
                keys = {"intervention": name, "hidden_size": d, "seed": 100 * d + k}
                rows.append(keys | dict(zip(QUANTITIES, values, strict=True)))
    return pd.DataFrame(rows)


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_effects_of_one_width_are_paired_t_tests(seed):
    runs = planted([8], 5, 0.5, 1.0, seed)
    found = changes.effects(runs)
    wide = runs.set_index("intervention")
    for row in found.itertuples():
        reference = ttest_rel(
            wide.loc[row.intervention, row.quantity], wide.loc["baseline", row.quantity]
        )
        interval = reference.confidence_interval()
        assert (row.p, row.low, row.high) == pytest.approx(
            (reference.pvalue, interval.low, interval.high)
        )
    p = found["p"].to_numpy()
    by_hand = [max(min(1.0, q * (p >= q).sum()) for q in p[p <= own]) for own in p]
    assert found["adjusted"].to_numpy() == pytest.approx(by_hand)


def test_effects_keep_widths_apart_and_find_what_is_planted():
    runs = planted([8, 16, 64], 3, 1.0, 0.01)
    found = changes.effects(runs).set_index("intervention")
    assert (found.loc["a", "adjusted"] < 0.05).all()
    assert found.loc["a", "value"].to_numpy() == pytest.approx(1, abs=0.05)
    assert (found.loc["b", "adjusted"] > 0.05).all()
    other = changes.effects(runs, against="a").set_index("intervention")
    assert other.loc["baseline", "value"].to_numpy() == pytest.approx(
        -found.loc["a", "value"].to_numpy()
    )
    # What is the same in all pairs has an interval of no width, and no test.
    same = changes.effects(planted([8, 16], 2, 0.0, 0.0))
    assert (same[["value", "low", "high"]] == 0).all(axis=None)
    assert same["adjusted"].isna().all()
    # A quantity that some runs lack is left open, and counts in no correction.
    runs.loc[runs["intervention"] == "a", "head_entropy"] = np.nan
    found = changes.effects(runs)
    assert found["adjusted"].isna().sum() == found["p"].isna().sum() == 1


def test_intervals_cover_at_their_rate():
    rng = np.random.default_rng(0)
    hits = [
        changes.effects(planted([8, 16, 32], 3, 0.0, 1.0, int(s))).eval("low <= 0 <= high").mean()
        for s in rng.integers(10**6, size=40)
    ]
    assert np.mean(hits) == pytest.approx(0.96, abs=0.03)


def test_the_chapters_own_example_works_and_is_short(source):
    notebook = json.loads(Path("notebooks/08_cause_or_company.ipynb").read_text())
    (cell,) = (c for c in notebook["cells"] if "own-intervention" in c["metadata"].get("tags", []))
    lines = "".join(cell["source"])
    assert len([line for line in lines.splitlines() if line.strip()]) < 10
    shown = {"changes": changes, "torch": torch, "hidden_sizes": [8], "steps": 12}
    shown["options"] = {"source": source, "replicates": 2, "batch_size": 4} | TINY
    exec(lines, shown)
    own = set(shown["own_runs"]["intervention"]) - {"baseline"}
    assert own
    assert own == set(changes.effects(changes.outcomes(shown["own_runs"]))["intervention"])
