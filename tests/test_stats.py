import math

import numpy as np
import pytest

from headbound.stats import Estimate, bootstrap, jackknife, mean


def test_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap(lambda w: w @ x / w.sum(1), len(x), resamples=4000)
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(200, 80))
    intervals = [bootstrap(lambda w, x=x: w @ x / w.sum(1), len(x), resamples=300) for x in samples]
    covered = np.mean([e.low <= 1 <= e.high for e in intervals])
    assert 0.88 <= covered <= 0.99


def test_one_unit_has_no_interval():
    estimate = bootstrap(lambda w: w.sum(1), 1)
    assert estimate.value == 1
    assert math.isnan(estimate.low)


def test_no_unit_is_an_error():
    with pytest.raises(ValueError, match="units = 0"):
        bootstrap(lambda w: w.sum(1), 0)


def test_jackknife_of_a_mean_is_the_textbook_interval():
    x = np.random.default_rng(2).normal(size=30)
    estimate = jackknife([float(np.delete(x, i).mean()) for i in range(30)], float(x.mean()))
    half = 2.045 * x.std(ddof=1) / math.sqrt(30)
    assert estimate.high - estimate.value == pytest.approx(half, rel=1e-3)
    with pytest.raises(ValueError, match="1 groups"):
        jackknife([1.0], 1.0)


def test_a_mean_resamples_texts_not_tokens():
    rng = np.random.default_rng(3)
    of_text = rng.normal(size=60)
    texts = np.repeat(10 * np.arange(60), 50)  # numbers with gaps, fifty equal tokens in each
    estimate = mean(np.repeat(of_text, 50), texts)
    assert estimate.value == pytest.approx(of_text.mean())
    assert estimate.n == 60
    assert estimate.high - estimate.low == pytest.approx(
        2 * 1.96 * of_text.std() / math.sqrt(60), rel=0.15
    )
    values, weights = rng.random(3000), rng.random(3000)
    assert mean(values, texts, weights).value == pytest.approx(
        values.sum() / weights.sum(), rel=1e-12
    )
    assert math.isnan(mean(values, texts, 0 * weights).value)
    alone = mean(values)
    assert (alone.value, alone.n) == (pytest.approx(values.mean()), 3000)
    with pytest.raises(ValueError, match="units = 0"):
        mean(np.zeros(0))


def test_an_increasing_function_keeps_the_interval_around_the_value():
    assert Estimate(0.0, -1.0, 1.0, 7).map(math.exp) == (1.0, math.exp(-1), math.e, 7)
