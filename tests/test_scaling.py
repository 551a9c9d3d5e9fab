import numpy as np
import pytest

from headbound import pythia
from headbound.measure import scaling

TRUTH = {"A": 300.0, "alpha": 0.35, "B": 410.7, "beta": 0.28, "E": 1.69}
SIZES = np.array([4e8, 1e9, 1.4e9, 2.8e9, 6.9e9, 1.2e10])


def curves(noise=0.0, seed=0, sizes=SIZES):
    """Losses of a planted law: each model is off by a factor, each checkpoint a little more."""
    n, t = (x.ravel() for x in np.meshgrid(sizes, np.linspace(3e10, 3e11, 8), indexing="ij"))
    rng = np.random.default_rng(seed)
    loss = TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / t ** TRUTH["beta"] + TRUTH["E"]
    off = np.repeat(rng.normal(size=len(sizes)), 8) + 0.3 * rng.normal(size=len(n))
    return n, t, loss * np.exp(noise * off)


def test_recovers_planted_constants_without_noise():
    law = scaling.fit(*curves())
    assert {name: e.value for name, e in law.constants.items()} == pytest.approx(TRUTH, rel=0.02)
    assert law.misfit < 1e-4


@pytest.mark.parametrize("fixed", [None, scaling.HOFFMANN])
def test_recovers_planted_constants_within_its_intervals(fixed):
    law = scaling.fit(*curves(noise=0.002, seed=1), fixed=fixed)
    free = [name for name in TRUTH if name not in (fixed or {})]
    assert all(law.constants[name].low <= TRUTH[name] <= law.constants[name].high for name in free)
    assert law.constants["A"].n == len(SIZES)


def test_fixed_constants_stay_as_they_are():
    law = scaling.fit(*curves(noise=0.01), fixed=scaling.HOFFMANN)
    for name, value in scaling.HOFFMANN.items():
        assert law.constants[name][:3] == pytest.approx((value, value, value))


def test_the_shortfall_of_a_planted_small_model_is_found():
    n, t, loss = curves(noise=0.001, seed=2)
    law = scaling.fit(n, t, loss, fixed=scaling.HOFFMANN)
    promised = TRUTH["A"] / 7e7**0.35 + TRUTH["B"] / 3e11**0.28 + TRUTH["E"]
    shortfall = law.shortfall(1.08 * promised, 7e7, 3e11)
    assert shortfall.low <= 0.08 <= shortfall.high
    assert shortfall.value == pytest.approx(0.08, abs=0.02)


def test_one_wild_checkpoint_hardly_moves_the_fit():
    n, t, loss = curves()
    loss[5] *= 3
    law = scaling.fit(n, t, loss, fixed=scaling.HOFFMANN)
    assert law.constants["alpha"].value == pytest.approx(TRUTH["alpha"], rel=0.02)
    assert law.constants["alpha"].n == len(SIZES)


def test_models_of_one_size_count_apart_when_they_are_named():
    n, t, loss = curves(sizes=np.array([1e9, 1e9, 2e9, 4e9]))
    names = np.repeat(["a", "b", "c", "d"], 8)
    assert scaling.fit(n, t, loss, names, fixed=scaling.HOFFMANN).constants["A"].n == 4
    assert scaling.fit(n, t, loss, None, fixed=scaling.HOFFMANN).constants["A"].n == 3


def test_bad_input_is_named():
    n, t, loss = curves()
    with pytest.raises(ValueError, match="2 models"):
        scaling.fit(n[:16], t[:16], loss[:16])
    with pytest.raises(ValueError, match="losses has nan"):
        scaling.fit(n, t, np.where(n > 1e10, np.nan, loss))
    with pytest.raises(ValueError, match=r"tokens has 0\.0"):
        scaling.fit(n, 0 * t, loss)
    with pytest.raises(ValueError, match=r"'gamma'.*constants are A"):
        scaling.fit(n, t, loss, fixed={"gamma": 1.0})


def test_a_fit_that_does_not_converge_says_so(monkeypatch):
    class Failed:
        success = False

    monkeypatch.setattr(scaling, "least_squares", lambda *_, **__: Failed)
    with pytest.raises(RuntimeError, match="did not converge from any of 30 starts"):
        scaling.fit(*curves())


def test_an_error_of_reading_widens_the_intervals():
    plain = scaling.fit(*curves(noise=0.001), fixed=scaling.HOFFMANN).constants["alpha"]
    read = scaling.fit(*curves(noise=0.001), fixed=scaling.HOFFMANN, error=0.02).constants["alpha"]
    assert read.low < plain.low < plain.value == read.value


def refit(count):
    """The law fitted to the losses of Figure 1b the paper's way; the small models' shortfall."""
    final = pythia.figures("1b", series="final")
    size = final["curve"].map(count)
    tokens = np.full(len(final), 140_000 * pythia.STEP_TOKENS)
    large = size >= size[final["curve"] == "410M"].iloc[0]
    law = scaling.fit(
        size[large], tokens[large], final["y"][large], fixed=scaling.HOFFMANN, error=0.002
    )
    return law, law.shortfall(final["y"][~large], size[~large], tokens[~large])


def test_the_papers_own_losses_give_its_law_and_its_eight_per_cent():
    law, short = refit(pythia.nominal)
    assert law.constants["A"].low < 119.09 < law.constants["A"].high
    assert law.constants["alpha"].low < 0.246 < law.constants["alpha"].high
    assert 0 < short.low < 0.08 < short.high
    assert law.misfit < 0.005


def test_without_embeddings_the_shortfall_changes_its_sign():
    law, short = refit(lambda model: pythia.parameters(model, embeddings=False))
    assert short.value < 0
    assert law.misfit < 0.005
