import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_rel
from transformers import GPTNeoXForCausalLM

from headbound import pythia
from headbound.train import changes
from headbound.train.changes import ARMS


def test_arms_share_tokens_and_first_weights():
    tokens = {}
    for arm in ARMS:
        recipe = changes.recipe(arm, 8, 0)
        tokens[arm] = recipe.steps * recipe.tokens_a_step
    more = tokens.pop("batch x 8, equal steps")
    assert more == 8 * tokens["baseline"]
    assert max(tokens.values()) - min(tokens.values()) < 128 * 128
    for d in (8, 16, 32):
        recipe = changes.recipe("baseline", d, 0)
        with torch.device("meta"):
            model = GPTNeoXForCausalLM(recipe.config(0))
        assert model.num_parameters() == pythia.count(2, d, changes.VOCAB)
        seen = recipe.steps * recipe.tokens_a_step / model.num_parameters()
        assert seen == pytest.approx(changes.TOKENS_A_PARAMETER, rel=1e-4)


LIFTED = ("lifted head, two layers", "lifted head, linear")


@settings(max_examples=10)
@given(d=st.integers(1, 6), seed=st.integers(0, 99))
def test_only_a_bent_head_exceeds_the_rank_of_a_linear_one(d, seed):
    torch.manual_seed(seed)
    states = 3 * torch.randn(60, d, dtype=torch.float64)

    def rank(bent):
        head = changes.LiftedHead(d, 40, bent).double()
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
        logits = head(states).detach()
        inner = head.down(states)
        layers = head.up(torch.nn.functional.gelu(inner) if bent else inner)
        torch.testing.assert_close(logits, layers)
        return int(torch.linalg.matrix_rank(logits))

    assert rank(bent=False) == d
    assert rank(bent=True) > d


@pytest.mark.parametrize("name", LIFTED)
def test_another_head_leaves_the_body_and_the_first_guess_alone(name):
    config = changes.recipe(name, 16, 0).config(0)
    models = []
    for arm in ("baseline", name):
        torch.manual_seed(3)
        models.append(changes.build(arm, config))
    bodies = [model.gpt_neox.state_dict() for model in models]
    assert all(torch.equal(bodies[0][key], bodies[1][key]) for key in bodies[0])
    guess = torch.log_softmax(models[1](torch.arange(8)[None]).logits, -1)
    assert guess.detach().numpy() == pytest.approx(-np.log(1024), abs=1)


def planted(shift, seeds=4):
    rng = np.random.default_rng(0)
    rows = []
    for arm in ("baseline", "a", "b"):
        for seed in range(seeds):
            value = rng.normal() + shift * (arm == "a")
            rows.append({"arm": arm, "hidden_size": 8, "seed": seed, "loss": value, "entropy": 1.0})
    return pd.DataFrame(rows)


def test_one_arms_effect_is_a_paired_t_test():
    runs = planted(20.0).query("arm != 'b'")
    (found,) = changes.effects(runs, ["loss"]).to_dict("records")
    wide = runs.set_index("arm")["loss"]
    reference = ttest_rel(wide["a"], wide["baseline"])
    interval = reference.confidence_interval()
    expected = [reference.pvalue, interval.low, interval.high]
    assert [found[name] for name in ("p", "low", "high")] == pytest.approx(expected)
    assert found["n"] == 4


def test_arms_of_two_pairs_share_one_size_of_noise_and_all_are_corrected_together():
    runs = planted(2.0, seeds=2)
    found = changes.effects(runs, ["loss"]).set_index("arm")
    table = runs.pivot(index="seed", columns="arm", values="loss")
    mean = table.mean()
    rest = table.sub(table.mean(axis=1), axis=0) - mean + mean.mean()
    freedom = (2 - 1) * (3 - 1)
    error = np.sqrt(2 / 2 * (rest.to_numpy() ** 2).sum() / freedom)
    for arm in ("a", "b"):
        effect = mean[arm] - mean["baseline"]
        half = student.ppf(0.975, freedom) * error
        expected = [effect, effect - half, effect + half]
        assert found.loc[arm, ["value", "low", "high"]].to_list() == pytest.approx(expected)
        p = 2 * student.sf(abs(effect) / error, freedom)
        assert found.loc[arm, "p"] == pytest.approx(p)
    smallest, largest = sorted(found["p"])
    by_hand = [min(1, 2 * smallest), max(2 * smallest, largest)]
    assert sorted(found["adjusted"]) == pytest.approx(by_hand)


def test_an_arm_of_three_pairs_has_its_own_noise():
    runs = planted(2.0, seeds=3)
    alone = changes.effects(runs.query("arm != 'b'"), ["loss"]).set_index("arm")
    noisy = runs.assign(loss=runs["loss"].where(runs["arm"] != "b", 1e3 * runs["loss"]))
    both = changes.effects(noisy, ["loss"]).set_index("arm")
    columns = ["value", "low", "high", "p", "freedom"]
    assert both.loc["a", columns].to_list() == pytest.approx(alone.loc["a", columns].to_list())
    assert both.loc["a", "adjusted"] > alone.loc["a", "adjusted"]


def test_cures_are_compared_with_the_arm_that_they_are_tried_on():
    runs = planted(2.0)
    renamed = runs.replace({"arm": {"baseline": changes.RISING}})
    found = changes.effects(renamed, ["loss"], changes.RISING)
    assert found.equals(changes.effects(runs, ["loss"]))
    for cure in changes.CURES:
        sick, well = (changes.recipe(arm, 8, 0) for arm in (changes.RISING, cure))
        assert sick.cut == well.cut == "backward"
        assert sick != well


def run_of(**columns):
    steps = np.arange(21)
    usual = dict.fromkeys((*changes.COURSES, "mean_share"), 0.1)
    keys = {"arm": "baseline", "hidden_size": 8, "seed": 0, "step": steps, "tokens": 100 * steps}
    return pd.DataFrame({**keys, **usual, **columns})


def appeared(**columns):
    return changes.appeared(changes.signs(run_of(**columns))).iloc[0]


def test_signs_appear_beyond_the_thresholds_and_beyond_noise():
    rising = np.r_[np.full(16, 0.1), np.linspace(0.1, 0.5, 5)]
    assert appeared(entropy=rising)["entropy"]
    assert not appeared(entropy=rising)["centred"]
    assert not appeared(entropy=0.5 * rising + 0.1)["entropy"]
    assert appeared(cosine_after_norm=0.51)["cosine"]
    noise = 0.01 * np.random.default_rng(0).normal(size=21)
    assert appeared(loss=rising + noise)["loss"]
    assert not appeared(loss=0.1 + noise)["loss"]
    visible = changes.signs(run_of(loss=0.1 + noise))["visible"].iloc[0]
    assert 0.02 < visible < 0.1


def test_a_share_has_clopper_and_pearsons_interval():
    found = changes.share([False] * 7)
    assert (found.value, found.low, found.n) == (0, 0, 7)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 7))


def effect(arm, quantity, value, half, adjusted):
    bounds = {"low": value - half, "high": value + half, "n": 3}
    return {"arm": arm, "quantity": quantity, "value": value, "adjusted": adjusted, **bounds}


def with_outcomes(table):
    return table.assign(outcome=[changes._outcome(row) for _, row in table.iterrows()])


def test_outcomes_and_judgements_of_planted_effects():
    table = pd.DataFrame(
        [
            effect("a", "loss_late", 0.001, 0.002, 0.9),
            effect("a", "cosine_after_norm", 0.2, 0.5, 0.4),
            effect("a", "entropy_late", 0.5, 0.1, 0.001),
            effect("a", "entropy_centred_late", -0.5, 0.1, 0.001),
            effect("a", "loss", 0.01, 0.02, 0.9),
        ]
    )
    table = with_outcomes(table)
    assert list(table["outcome"]) == ["same", "open", "more", "less", "same"]
    estimate, ruling = changes.told(table, "a", "entropy_late", ("more",))
    assert estimate == (0.5, 0.4, 0.6, 3)
    assert ruling.agrees
    assert changes.told(table, "a", "entropy_centred_late", ("more",))[1].agrees is False
    assert changes.told(table, "a", "cosine_after_norm", ("more",))[1].agrees is None
    assert changes.told(table, "never run", "loss", ("more",))[0] is None
    assert changes.parted(table) == (["a"], 1, (True, "a"))
    worse = table.assign(value=table["value"].where(table["quantity"] != "loss", 0.3))
    worse["adjusted"] = worse["adjusted"].where(worse["quantity"] != "loss", 0.001)
    assert changes.parted(with_outcomes(worse)) == ([], 1, (None, ""))
    three = pd.concat([with_outcomes(worse).assign(arm=arm) for arm in "abc"])
    assert changes.parted(three) == ([], 3, (False, ""))
    flat = with_outcomes(table.assign(adjusted=0.9))
    assert changes.parted(flat) == ([], 0, (None, ""))
    runs = pd.DataFrame({"arm": ["a"] * 3, "loss": [False] * 3, "entropy": [True, False, True]})
    said = {
        "a": {
            "one": {"loss": "absent", "entropy": "more", "cosine": "same"},
            "two": {"loss": "more", "entropy": "appears", "centred": "open"},
        },
        "never run": {"one": {"loss": "more"}},
    }
    every = changes.judge(said, table, runs).set_index(["account", "sign"])
    assert list(every.index[every["tells"]]) == [("one", "loss"), ("two", "loss")]
    judged = every["held"]
    assert judged.to_dict() == {
        ("one", "loss"): True,
        ("one", "entropy"): True,
        ("one", "cosine"): None,
        ("two", "loss"): False,
        ("two", "entropy"): None,
        ("two", "centred"): None,
    }
    two_runs = changes.judge(said, table, runs[:2]).set_index(["account", "sign"])["held"]
    assert two_runs["one", "loss"] is None


def test_one_pair_settles_nothing():
    alone = changes.effects(planted(20.0).query("seed == 0"), ["loss"])
    assert set(alone["outcome"]) == {"open"}
    assert changes.told(alone, "a", "loss", ("more",))[0] is None
