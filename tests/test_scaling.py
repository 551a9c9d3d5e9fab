import math

import numpy as np
import pytest

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
    law = scaling.fit(*curves(), resamples=0)
    assert {name: e.value for name, e in law.constants.items()} == pytest.approx(TRUTH, rel=0.02)
    assert law.misfit < 1e-4


@pytest.mark.parametrize("fixed", [None, scaling.HOFFMANN])
def test_recovers_planted_constants_within_its_intervals(fixed):
    law = scaling.fit(*curves(noise=0.002, seed=1), fixed=fixed, resamples=100)
    free = [name for name in TRUTH if name not in (fixed or {})]
    assert all(law.constants[name].low <= TRUTH[name] <= law.constants[name].high for name in free)
    assert law.constants["A"].n == len(SIZES)


def test_fixed_constants_stay_as_they_are():
    law = scaling.fit(*curves(noise=0.01), fixed=scaling.HOFFMANN, resamples=20)
    for name, value in scaling.HOFFMANN.items():
        assert law.constants[name][:3] == pytest.approx((value, value, value))


def test_the_shortfall_of_a_planted_small_model_is_found():
    n, t, loss = curves(noise=0.001, seed=2)
    law = scaling.fit(n, t, loss, fixed=scaling.HOFFMANN, resamples=100)
    promised = TRUTH["A"] / 7e7**0.35 + TRUTH["B"] / 3e11**0.28 + TRUTH["E"]
    shortfall = law.shortfall(1.08 * promised, 7e7, 3e11)
    assert shortfall.low <= 0.08 <= shortfall.high
    assert shortfall.value == pytest.approx(0.08, abs=0.02)


def test_one_wild_checkpoint_hardly_moves_the_fit():
    n, t, loss = curves()
    loss[5] *= 3
    law = scaling.fit(n, t, loss, fixed=scaling.HOFFMANN, resamples=0)
    assert law.constants["alpha"].value == pytest.approx(TRUTH["alpha"], rel=0.01)
    assert math.isnan(law.constants["alpha"].low)


def test_models_of_one_size_count_apart_when_they_are_named():
    n, t, loss = curves(sizes=np.array([1e9, 1e9, 2e9, 4e9]))
    names = np.repeat(["a", "b", "c", "d"], 8)
    assert scaling.fit(n, t, loss, names, fixed=scaling.HOFFMANN, resamples=5).constants["A"].n == 4
    assert scaling.fit(n, t, loss, None, fixed=scaling.HOFFMANN, resamples=5).constants["A"].n == 3


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
    monkeypatch.setattr(scaling, "_minimum", lambda *_: None)
    with pytest.raises(RuntimeError, match="did not converge from any of 30 starts"):
        scaling.fit(*curves())
