import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from headbound.measure import spectrum
from headbound.measure.spectrum import (
    _probabilities,
    effective_rank,
    frequency_link,
    participation_ratio,
    singular_entropy,
    singular_values,
    stable_rank,
    w_error,
)

MEASURES = [singular_entropy, effective_rank, stable_rank, participation_ratio, _probabilities]
SPECTRA = arrays(float, st.integers(1, 20), elements=st.floats(0, 1e6)).filter(
    lambda s: s.max() > 1e-3
)


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


@given(
    rows=st.integers(1, 25),
    columns=st.integers(1, 12),
    rank=st.integers(1, 12),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_singular_values_are_numpys(rows, columns, rank, scale, seed, dtype):
    weight = torch.from_numpy(
        gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1) * scale
    ).to(dtype)
    reference = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    ours = singular_values(weight)
    # The root of a Gram's eigenvalue knows the small values to √ε of the largest.
    np.testing.assert_allclose(ours, reference, rtol=1e-7, atol=1e-7 * reference[0])
    assert len(ours) == min(rows, columns)
    assert (np.diff(ours) <= 0).all()


def test_rows_of_very_different_size():
    weight = gaussian(40, 6)
    weight[::3] *= 1e30
    weight[1::3] *= 1e-30
    ours = singular_values(torch.from_numpy(weight).float())
    np.testing.assert_allclose(ours, np.linalg.svd(weight, compute_uv=False), rtol=1e-5)


def test_no_row_is_lost_between_blocks(monkeypatch):
    monkeypatch.setattr(spectrum, "ROWS", 7)
    for rows in (6, 7, 8, 29):
        weight = gaussian(rows, 5)
        np.testing.assert_allclose(
            singular_values(torch.from_numpy(weight)),
            np.linalg.svd(weight, compute_uv=False),
            rtol=1e-9,
        )


def test_the_entropy_is_right_to_1e_8_on_an_ill_conditioned_head():
    # A head of condition 10⁶, the shape of a decaying spectrum, in float32 as it comes.
    d = 96
    left, right = np.linalg.qr(gaussian(2000, d))[0], np.linalg.qr(gaussian(d, d, 1))[0]
    weight = torch.from_numpy(left * np.geomspace(1, 1e-6, d) @ right).float()
    exact = singular_entropy(np.linalg.svd(weight.double().numpy(), compute_uv=False))
    assert singular_entropy(singular_values(weight)) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_parameters_with_gradient(dtype):
    weight = torch.nn.Parameter(torch.from_numpy(gaussian(30, 8)).to(dtype))
    reference = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight), reference, rtol=1e-9)


def test_a_zero_head_has_zero_values_and_no_spectrum():
    values = singular_values(torch.zeros(5, 3))
    np.testing.assert_array_equal(values, np.zeros(3))
    with pytest.raises(ValueError, match="all singular values are zero"):
        singular_entropy(values)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0, 4), r"shape \(0, 4\): nothing to decompose"),
        (torch.tensor([[1.0, math.nan]]), "NaN or Inf in the weight"),
        (torch.tensor([[1.0, -math.inf]]), "NaN or Inf in the weight"),
    ],
)
def test_bad_weights_are_named(weight, message):
    with pytest.raises(ValueError, match=message):
        singular_values(weight)


@given(SPECTRA)
def test_entropy_and_ranks_by_definition(sigma):
    d, p = len(sigma), sigma / sigma.sum()
    kl = sum(x * math.log(x * d) for x in p if x > 0)
    assert singular_entropy(sigma) == pytest.approx(kl, abs=1e-12)
    assert effective_rank(sigma) == pytest.approx(d * math.exp(-kl))
    assert stable_rank(sigma) == pytest.approx((sigma**2).sum() / sigma.max() ** 2)
    assert participation_ratio(sigma) == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum())
    assert 0 <= singular_entropy(sigma) <= math.log(d) + 1e-12
    for rank in (effective_rank, stable_rank, participation_ratio):
        assert 1 - 1e-9 <= rank(sigma) <= d * (1 + 1e-9)


@given(SPECTRA, st.sampled_from([1e-30, 1e-3, 1e30]))
def test_measures_ignore_the_scale(sigma, scale):
    for measure in MEASURES:
        np.testing.assert_allclose(measure(sigma * scale), measure(sigma), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 576])
def test_flat_and_rank_one_spectra(d):
    flat, spike = np.full(d, 0.3), np.eye(d)[0]
    assert singular_entropy(flat) == pytest.approx(0, abs=1e-12)
    assert singular_entropy(spike) == pytest.approx(math.log(d))
    for rank in (effective_rank, stable_rank, participation_ratio):
        assert rank(flat) == pytest.approx(d)
        assert rank(spike) == pytest.approx(1)


@pytest.mark.parametrize("sigma", [[], [-1.0, 2.0], [math.nan], [math.inf, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("measure", [*MEASURES, lambda s: w_error(s, [0])])
def test_what_has_no_spectrum_is_refused(measure, sigma):
    with pytest.raises(ValueError, match="singular values"):
        measure(np.array(sigma, float))


@given(rows=st.integers(1, 12), columns=st.integers(1, 8), seed=st.integers(0, 99))
def test_w_error_is_the_error_of_the_truncated_svd(rows, columns, seed):
    weight = gaussian(rows, columns, seed)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    ranks = range(len(s) + 1)
    best = [
        np.linalg.norm(weight - (u[:, :r] * s[:r]) @ v[:r]) / np.linalg.norm(weight) for r in ranks
    ]
    np.testing.assert_allclose(w_error(s, list(ranks)), best, atol=1e-12)


def test_no_matrix_of_that_rank_does_better():
    weight = gaussian(6, 4)
    bound = w_error(np.linalg.svd(weight, compute_uv=False), [2])[0] * np.linalg.norm(weight)
    for seed in range(200):
        left = gaussian(6, 2, seed)
        right = np.linalg.lstsq(left, weight, rcond=None)[
            0
        ]  # the best partner of a random left factor
        assert np.linalg.norm(weight - left @ right) >= bound


def test_w_error_keeps_a_small_tail_and_any_scale():
    sigma = np.array([1.0, 1e-7, 1e-9])
    np.testing.assert_allclose(
        w_error(sigma, [0, 1, 2, 3]), [1, np.hypot(1e-7, 1e-9), 1e-9, 0], rtol=1e-12
    )
    np.testing.assert_allclose(w_error(sigma * 1e200, [2, 1]), w_error(sigma, [2, 1]), rtol=1e-12)
    assert len(w_error(sigma, [])) == 0


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_head_is_named(rank):
    with pytest.raises(ValueError, match=f"rank = {rank}: must be between 0 and 3"):
        w_error(np.ones(3), [1, rank])


def test_a_planted_frequency_direction_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    counts = rng.zipf(1.3, 3000).clip(max=10**6) - 1
    noise = rng.normal(size=(3000, 12))
    planted = noise + np.outer(np.log1p(counts), 3 * np.eye(12)[4])
    found, loadings = frequency_link(torch.from_numpy(planted).float(), counts, groups=5)
    assert np.corrcoef(loadings, np.log1p(counts))[0, 1] > 0.8
    assert found.low > 0.8
    assert found.n == 5
    nothing, _ = frequency_link(torch.from_numpy(noise).float(), counts, groups=5)
    assert nothing.low < 0 < nothing.high < 0.3


def test_a_models_own_head_is_taken_as_it_is_and_nan_is_named():
    weight = torch.nn.Parameter(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
    counts = np.arange(60)
    assert frequency_link(weight, counts)[0] == frequency_link(weight.detach(), counts)[0]
    broken = weight.detach().clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf in the weight"):
        frequency_link(broken, counts)


def test_the_frequency_link_is_spearmans_over_the_tokens_that_occur():
    weight = gaussian(200, 6) * [5, 1, 1, 1, 1, 1]
    counts = np.random.default_rng(2).integers(0, 9, 200)
    direction = np.linalg.svd(weight)[2][0]
    seen = counts > 0
    expected = abs(stats.spearmanr(weight[seen] @ direction, counts[seen]).statistic)
    found, _ = frequency_link(torch.from_numpy(weight), counts)
    assert found.value == pytest.approx(expected)
    turned, _ = frequency_link(torch.from_numpy(-weight), counts)
    assert turned == pytest.approx(found)
