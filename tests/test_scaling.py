import numpy as np
import pytest

from headbound import pythia
from headbound.measure import scaling

A, ALPHA = 119.09, 0.246
SIZES = np.array([4e8, 1e9, 1.4e9, 2.8e9, 6.9e9, 1.2e10])
TOKENS = 3e11


def planted(noise=0.0, seed=0, sizes=SIZES):
    """Losses of a planted law, each off by a factor."""
    loss = A / sizes**ALPHA + 410.7 / TOKENS**0.28 + 1.69
    return loss * np.exp(noise * np.random.default_rng(seed).normal(size=len(sizes)))


def test_recovers_planted_constants():
    law = scaling.fit(SIZES, TOKENS, planted())
    assert law.constants["A"].value == pytest.approx(A, rel=1e-3)
    assert law.constants["alpha"].value == pytest.approx(ALPHA, rel=1e-4)
    assert law.misfit < 1e-6
    assert law.promise(SIZES, TOKENS) == pytest.approx(planted(), rel=1e-6)


def test_its_intervals_hold_the_planted_constants_in_about_95_of_100_cases():
    fits = [scaling.fit(SIZES, TOKENS, planted(0.004, seed)).constants for seed in range(100)]
    held = np.mean([fit["alpha"].low <= ALPHA <= fit["alpha"].high for fit in fits])
    assert held >= 0.88
    assert fits[0]["A"].n == len(SIZES)


def test_the_shortfall_of_planted_small_models_is_found():
    law = scaling.fit(SIZES, TOKENS, planted(noise=0.001, seed=2))
    small = np.array([1.4e7, 7e7])
    shortfall = law.shortfall(1.08 * planted(sizes=small), small, TOKENS)
    assert shortfall.low <= 0.08 <= shortfall.high
    assert shortfall.value == pytest.approx(0.08, abs=0.02)
    alone = law.shortfall(1.08 * planted(sizes=small[:1])[0], 1.4e7, TOKENS)
    assert alone.value == pytest.approx(0.08, abs=0.02)


def test_one_wild_model_among_many_hardly_moves_the_fit():
    sizes = np.geomspace(1e8, 1e10, 30)
    losses = planted(sizes=sizes)
    losses[12] *= 3
    alpha = scaling.fit(sizes, TOKENS, losses).constants["alpha"]
    assert alpha.value == pytest.approx(ALPHA, rel=0.02)


def test_an_error_of_reading_widens_the_intervals():
    plain = scaling.fit(SIZES, TOKENS, planted(0.001)).constants["alpha"]
    read = scaling.fit(SIZES, TOKENS, planted(0.001), error=0.02).constants["alpha"]
    assert read.low < plain.low < plain.value == read.value


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 models"):
        scaling.fit(SIZES[:2], TOKENS, planted()[:2])
    with pytest.raises(ValueError, match="losses has nan"):
        scaling.fit(SIZES, TOKENS, np.where(SIZES > 1e10, np.nan, planted()))
    with pytest.raises(ValueError, match=r"tokens has 0\.0"):
        scaling.fit(SIZES, 0.0, planted())


def refit(count):
    """The law fitted to the losses of Figure 1b the paper's way; the small models' shortfall."""
    final = pythia.figures("1b", series="final")
    sizes = final["curve"].map(count).to_numpy(float)
    small = final["curve"].isin(["14M", "31M", "70M", "160M"]).to_numpy()
    losses = final["y"].to_numpy()
    tokens = 140_000.0 * pythia.STEP_TOKENS
    law = scaling.fit(sizes[~small], tokens, losses[~small], error=0.002)
    return law, law.shortfall(losses[small], sizes[small], tokens)


def test_the_papers_own_losses_give_its_law_and_its_eight_per_cent():
    law, short = refit(pythia.nominal)
    assert law.constants["A"].low < 119.09 < law.constants["A"].high
    assert law.constants["alpha"].low < 0.246 < law.constants["alpha"].high
    assert 0 < short.low < 0.08 < short.high
    assert law.misfit < 0.005


def test_without_embeddings_the_shortfall_changes_its_sign():
    law, short = refit(lambda model: pythia.parameters(model, embeddings=False))
    assert short.value < 0
    assert short.high < 0.08
    assert law.misfit < 0.005
