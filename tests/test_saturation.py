import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from headbound.measure.saturation import _compare, detect, late_change, late_rise, together

LOG = np.array([0, *2 ** np.arange(10), 1000, 3000, *range(13_000, 143_001, 10_000)])
CURVES = {
    "level, 27": (np.arange(27), np.zeros(27)),
    "level, 12": (np.arange(12), np.zeros(12)),
    "saturating, 27 as Pythia's": (LOG, 20 * (1 - np.exp(-6 * LOG / LOG[-1]))),
    "steeply saturating, 27": (LOG, 60 * (1 - np.exp(-6 * LOG / LOG[-1]))),
    "saturating, 12": (np.arange(12), 20 * (1 - np.exp(-np.arange(12) / 2))),
    "up, then level, 27": (np.arange(27), np.minimum(30, 3.0 * np.arange(27))),
}


def rate(steps, truth, noise, runs, seed):
    """How often a curve with this noise, of which the stderr says 1, is found to fall."""
    rng, one = np.random.default_rng(seed), np.ones(len(truth))
    curves = truth + noise * rng.normal(size=(runs, len(truth)))
    found = [
        detect(steps, curve, one, resamples=99, seed=i).p_value for i, curve in enumerate(curves)
    ]
    return np.mean(np.array(found) <= 0.05)


def reference(y, error):
    """The two fits one curve and one peak at a time, by SciPy."""
    weights = error**-2.0

    def cost(part, increasing):
        if not len(y[part]):
            return 0.0
        fit = isotonic_regression(y[part], weights=weights[part], increasing=increasing).x
        return float(weights[part] @ (y[part] - fit) ** 2)

    peaked = min(cost(slice(0, k), True) + cost(slice(k, None), False) for k in range(len(y) + 1))
    return cost(slice(None), True) - peaked, peaked


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=12), st.integers(0, 99))
def test_both_fits_equal_scipys(values, seed):
    y, error = np.array(values, float), np.random.default_rng(seed).uniform(0.1, 3, len(values))
    ratio, rest = _compare(np.vstack([y, y[::-1]]), error)
    assert (ratio[0], rest[0]) == pytest.approx(reference(y, error), abs=1e-9)
    assert (ratio[1], rest[1]) == pytest.approx(reference(y[::-1], error), abs=1e-9)


@pytest.mark.parametrize("noise", [1.0, 1.6])
def test_fires_in_3_to_7_percent_of_a_thousand_monotone_curves(noise):
    rates = [rate(steps, truth, noise, runs=200, seed=1) for steps, truth in CURVES.values()]
    assert 0.03 <= np.mean(rates) <= 0.07
    assert max(rates) <= 0.1


def test_hardly_ever_fires_on_a_curve_that_still_climbs_steeply():
    assert rate(np.arange(27), np.linspace(0, 60, 27), 1.0, runs=200, seed=3) <= 0.05


@pytest.mark.parametrize("checkpoints", [27, 40])
def test_finds_most_drops_of_three_standard_errors(checkpoints):
    x = np.linspace(0, 1, checkpoints)
    truth = 20 * np.minimum(1, 2.5 * x) - 3 * np.clip((x - 0.5) / 0.5, 0, 1)
    assert rate(np.arange(checkpoints), truth, 1.0, runs=300, seed=4) > 0.5


def test_picks_the_best_checkpoint_and_measures_the_drop_in_either_direction():
    steps = np.arange(0, 100, 10)
    accuracy = np.array([0.1, 0.3, 0.42, 0.48, 0.50, 0.48, 0.47, 0.44, 0.42, 0.4])
    up = detect(steps, accuracy, np.full(10, 0.01))
    down = detect(list(steps[::-1]), list(-accuracy[::-1]), [0.01] * 10, higher_is_better=False)
    assert (up.best_step, up.best, up.final) == (40, 0.5, 0.4)
    assert (down.best_step, down.best, down.final) == (40, -0.5, -0.4)
    assert up.drop == down.drop == pytest.approx(0.1)
    assert up.low < up.drop < up.high
    assert up.p_value == down.p_value <= 0.01


@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_units_do_not_matter(scale, shift):
    y = np.array([0, 3, 5, 6, 6.5, 6.2, 6.6, 5.9, 5.5, 5.6])
    plain = detect(range(10), y, np.full(10, 0.3), resamples=99)
    other = detect(range(10), scale * (y + shift), np.full(10, 0.3 * scale), resamples=99)
    assert other.p_value == plain.p_value
    assert other.drop == pytest.approx(scale * plain.drop, abs=1e-9 * scale)


def test_a_curve_that_never_falls_has_no_drop():
    result = detect(range(6), [1, 2, 3, 3, 3, 4.0], np.ones(6))
    assert (result.best_step, result.drop, result.low, result.high, result.p_value) == (
        5,
        0,
        0,
        0,
        1,
    )


def test_noise_beyond_the_stderr_is_seen_and_weakens_the_finding():
    rng = np.random.default_rng(0)
    truth = np.array([0, 8, 12, 14, 15, 15, 15, 15, 15, 14, 14, 13.5])
    y = truth + rng.normal(size=12)
    sure, doubtful = detect(range(12), y, np.full(12, 0.3)), detect(range(12), y, np.full(12, 1.0))
    assert sure.noise > 1.5
    assert doubtful.noise < sure.noise


def test_a_zero_stderr_is_raised_to_the_least_positive_one():
    result = detect(range(5), [0, 0, 2, 3, 1.0], [0, 0, 0.1, 0.1, 0.1])
    assert math.isfinite(result.noise)


@pytest.mark.parametrize(
    ("steps", "values", "stderr", "message"),
    [
        ([1, 2], [1.0, 2.0], [1.0, 1.0], "2 steps"),
        ([1, 2, 3], [1.0, 2.0], [1.0, 1.0], "2 values"),
        ([1, 2, 2], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], "step 2: .* it occurs once"),
        ([1, 2, 3], [1.0, math.nan, 3.0], [1.0, 1.0, 1.0], "step 2: .* it has a finite value"),
        (
            [1, 2, 3],
            [1.0, 2.0, 3.0],
            [0.1, math.nan, 0.1],
            "step 2: .* it has an stderr",
        ),
        ([1, 2, 3], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "step 1: .* it has an stderr"),
    ],
)
def test_bad_input_is_named(steps, values, stderr, message):
    with pytest.raises(ValueError, match=message):
        detect(steps, values, stderr)


def test_the_late_rise_of_a_curve_with_an_early_peak_and_a_late_turn():
    steps = np.arange(0, 101, 5)
    values = np.interp(steps, [0, 5, 50, 80, 100], [0.2, 3.0, 1.0, 2.5, 2.0])
    found = late_rise(steps[::-1], values[::-1])
    assert (found.least_step, found.least, found.final) == (50, 1.0, 2.0)
    assert found.rise == 1.0
    assert found.worst_step == 80
    assert found.most == pytest.approx(1.15, abs=0.01)


def test_a_single_outlier_is_no_late_rise():
    values = np.linspace(4, 3, 30) + 0.001 * np.random.default_rng(0).normal(size=30)
    values[20] += 0.5
    assert not late_rise(range(30), values).seen


@pytest.mark.parametrize("checkpoints", [12, 27, 60, 133])
def test_a_level_curves_noise_is_seen_as_a_late_rise_in_one_case_of_a_hundred(checkpoints):
    noise = np.random.default_rng(checkpoints).normal(size=(1000, checkpoints))
    seen = np.mean([late_rise(range(checkpoints), curve).seen for curve in noise])
    assert seen <= 0.02


def test_a_late_rise_needs_three_checkpoints_past_the_first_tenth():
    with pytest.raises(ValueError, match="2 checkpoints past the first tenth"):
        late_rise([0, 1, 2, 50, 100], [5, 4, 3, 2, 1.0])


def test_two_walks_with_one_drift_correlate_in_levels_alone():
    walks = np.cumsum(np.random.default_rng(0).normal(1, 1, size=(2, 200)), axis=1)
    levels, changes = together(*walks)
    assert levels > 0.99
    assert abs(changes) < 0.2


def test_the_late_change_is_the_difference_of_two():
    rng = np.random.default_rng(3)
    tokens = np.linspace(0, 300, 31)
    steady = (tokens, 3 + 0.1 * rng.normal(size=31))
    rising = (tokens, 3 + (tokens > 200) * 0.5 + 0.1 * rng.normal(size=31))
    apart = late_change(rising, steady)
    assert 0 < apart.low < 0.5 < apart.high
    rose, stayed = (values[21:].mean() - values[11:21].mean() for _, values in (rising, steady))
    assert apart.value == pytest.approx(rose - stayed)
    assert apart.n == 40


def test_intervals_of_a_late_change_hold_the_truth_in_about_95_of_100_cases():
    rng = np.random.default_rng(1)
    curves = rng.normal(size=(400, 2, 14))
    tokens = np.arange(1, 15)
    found = [late_change((tokens, a), (tokens, b)) for a, b in curves]
    assert np.mean([e.low < 0 < e.high for e in found]) == pytest.approx(0.95, abs=0.03)
