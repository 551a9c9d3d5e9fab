import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headbound.measure import anisotropy
from headbound.measure.anisotropy import cosines, mean_cosine, sinks, sum_of_units


def all_pairs(hidden_states):
    """Mean cosine of every pair i ≠ j, one by one, in float64."""
    h = hidden_states.double()
    h = h / h.abs().amax(1, keepdim=True)
    u = (h / h.norm(dim=1, keepdim=True)).numpy()
    cosine = u @ u.T
    return float(cosine[~np.eye(len(u), dtype=bool)].mean())


def states(tokens, d, seed=0, mean=0.0, dtype=torch.float32):
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + mean


@given(
    tokens=st.integers(2, 60),
    d=st.integers(1, 12),
    seed=st.integers(0, 99),
    mean=st.sampled_from([0.0, 0.3, 5.0]),
    scales=st.lists(st.sampled_from([1e-12, 1.0, 1e6, 1e12]), min_size=60, max_size=60),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_mean_over_all_pairs_at_any_scale(tokens, d, seed, mean, scales, dtype):
    h = states(tokens, d, seed, mean, dtype) * torch.tensor(scales[:tokens], dtype=dtype)[:, None]
    estimate = mean_cosine(h)
    assert estimate.value == pytest.approx(
        all_pairs(h), abs=1e-6 if dtype == torch.float32 else 1e-12
    )
    assert estimate.n == 1
    assert math.isnan(estimate.low)


def test_no_row_is_lost_between_blocks(monkeypatch):
    monkeypatch.setattr(anisotropy, "ROWS", 7)
    for tokens in (6, 7, 8, 29):
        h = states(tokens, 5, mean=0.5)
        assert mean_cosine(h).value == pytest.approx(all_pairs(h), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_more(dtype):
    h = (states(500, 64, mean=0.2) * 300).to(dtype)
    assert mean_cosine(h).value == pytest.approx(all_pairs(h), abs=1e-6)


def test_constant_rows_have_cosine_one_and_opposite_rows_minus_one():
    assert mean_cosine(torch.full((50, 8), 3.0)).value == pytest.approx(1, abs=1e-6)
    assert mean_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).value == pytest.approx(
        -1, abs=1e-6
    )


def test_many_tokens_keep_their_digits():
    h = states(40_000, 16, mean=0.05)
    u = torch.nn.functional.normalize(h.double(), dim=1)
    exact = float((u.sum(0).square().sum() - len(u)) / (len(u) * (len(u) - 1)))
    assert mean_cosine(h).value == pytest.approx(exact, abs=1e-8)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6).filter(lambda s: sum(s) > 1),
    seed=st.integers(0, 99),
)
def test_a_stream_of_texts_is_the_whole(sizes, seed):
    h = states(sum(sizes), 4, seed, 0.4)
    estimate = mean_cosine((block for block in h.split(sizes)), resamples=20)
    assert estimate.value == pytest.approx(all_pairs(h), abs=1e-6)
    assert estimate.n == len(sizes)


def test_resamples_never_pair_a_token_with_its_copy():
    # Orthogonal tokens: every pair has cosine 0, also in a resample; a copy would bring a 1.
    estimate = mean_cosine(list(torch.eye(12).split(2)), resamples=200)
    assert estimate[:3] == pytest.approx((0, 0, 0), abs=1e-7)


def test_the_interval_matches_pairs_counted_by_hand():
    texts = [states(n, 3, seed=n, mean=0.3, dtype=torch.float64) for n in (2, 3, 4)]
    u = torch.nn.functional.normalize(torch.cat(texts), dim=1).numpy()
    owner = np.repeat([0, 1, 2], [2, 3, 4])
    values = []
    for chosen in np.ndindex(3, 3, 3):  # every resample there is
        w = np.bincount(chosen, minlength=3)[owner].astype(float)
        weights = np.where(owner[:, None] == owner, w[:, None], np.outer(w, w))
        np.fill_diagonal(weights, 0)
        values.append((weights * (u @ u.T)).sum() / weights.sum())
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    estimate = mean_cosine(texts, resamples=4000)
    # 27 resamples are a coarse law, so both ends are among its values.
    assert estimate.low == pytest.approx(low, abs=0.02)
    assert estimate.high == pytest.approx(high, abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Each text has its own direction, so that its tokens are alike; the truth is ‖E u‖².
    rng = np.random.default_rng(0)
    d, texts, length = 8, 40, 5

    def sample(count):
        centres = rng.normal(size=(count, 1, d)) + 0.7
        h = centres + 0.5 * rng.normal(size=(count, length, d))
        return h / np.linalg.norm(h, axis=-1, keepdims=True)

    truth = float((sample(100_000).mean((0, 1)) ** 2).sum())
    covered = []
    for _ in range(100):
        estimate = mean_cosine(list(torch.from_numpy(sample(texts))), resamples=150)
        # Pairs inside a text push the value up a little; the interval must still hold the truth.
        covered.append(estimate.low <= truth <= estimate.high)
    assert 0.85 <= np.mean(covered) <= 0.99


def test_texts_of_one_token_and_empty_texts_give_no_warning():
    two = mean_cosine([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])], resamples=50)
    assert two.value == pytest.approx(math.sqrt(0.5))
    assert math.isnan(
        two.low
    )  # a resample of one token alone has no pair, so the interval is unknown
    some = mean_cosine([torch.eye(3), torch.empty(0, 3), torch.eye(3)], resamples=50)
    assert some.n == 2


def test_the_same_seed_gives_the_same_interval():
    texts = [states(5, 4, seed) for seed in range(6)]
    assert mean_cosine(texts, resamples=50, seed=3) == mean_cosine(texts, resamples=50, seed=3)


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.empty(0, 4), "0 hidden states: a mean over pairs needs at least two"),
        (torch.ones(1, 4), "1 hidden states: a mean over pairs needs at least two"),
        ([], "0 hidden states"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "hidden state 1 is zero"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), "hidden state 1 has NaN or Inf"),
        (torch.tensor([[1.0, -math.inf], [1.0, 0.0]]), "hidden state 0 has NaN or Inf"),
    ],
)
def test_bad_states_are_named(h, message):
    with pytest.raises(ValueError, match=message):
        mean_cosine(h)


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e24, 1e37])
def test_a_state_whose_squares_leave_float32_is_neither_zero_nor_infinite(size):
    h = states(50, 4)
    assert mean_cosine(h * size).value == pytest.approx(mean_cosine(h).value, rel=1e-5)


def test_the_index_of_a_bad_state_counts_from_the_first_block():
    h = states(10_000, 2)
    h[9_000] = 0
    with pytest.raises(ValueError, match="hidden state 9000 is zero"):
        sum_of_units(h)


def test_sinks_are_left_out_by_their_norm():
    h = states(101, 6, mean=1.0)
    h[0] *= -1000
    assert sinks(h).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sinks_are_found_at_any_scale(scale):
    h = states(50, 6) * scale
    h[7] *= 1000
    assert sinks(h).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("ratio", [1.0, 0.0, -2.0, math.nan])
def test_a_sink_ratio_must_exceed_one(ratio):
    with pytest.raises(ValueError, match=r"sink_ratio = .*: must be above 1"):
        sinks(torch.ones(3, 2), ratio)


def test_random_pairs_estimate_the_mean_and_never_pair_a_token_with_itself():
    h = states(300, 10, mean=0.4)
    sample = cosines(h, 20_000)
    assert float(sample.mean()) == pytest.approx(all_pairs(h), abs=0.01)
    assert cosines(torch.eye(4), 500).abs().max() == 0
    assert torch.equal(cosines(h, 50, seed=1), cosines(h, 50, seed=1))


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.ones(1, 2), "1 hidden states"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "hidden state 1 is zero"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), "hidden state 1 has NaN or Inf"),
    ],
)
def test_random_pairs_refuse_what_the_mean_refuses(h, message):
    with pytest.raises(ValueError, match=message):
        cosines(h, 10)


def test_a_zero_state_has_no_direction_and_is_left_out_of_layers():
    stack = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0)) + 1
    stack[1, 0, 2] = 0
    (layers,) = anisotropy.by_layer([stack], resamples=20)
    kept = [*stack[1, 0][[0, 1, 3, 4, 5]].split(5), *stack[1, 1:]]
    assert layers[1].value == pytest.approx(all_pairs(torch.cat(kept)), abs=1e-6)


def test_by_layer_is_mean_cosine_of_each_layer():
    torch.manual_seed(0)
    states = torch.randn(3, 7, 12, 8) + 0.5
    states[1, :, 0] *= 500  # a sink at the start of each text
    both = anisotropy.by_layer(states.split(3, dim=1), sink_ratios=(None, 10.0), resamples=50)
    for ratio, layers in zip((None, 10.0), both, strict=True):
        for layer, estimate in enumerate(layers):
            texts = states[layer].unbind(0)
            kept = texts if ratio is None else [text[~sinks(text, ratio)] for text in texts]
            alone = anisotropy.mean_cosine(kept, resamples=50)
            assert estimate == pytest.approx(alone)
    assert both[0][0] == both[1][0]
    assert both[0][1] != both[1][1]


def test_by_layer_of_nothing():
    with pytest.raises(ValueError, match="stream is empty"):
        anisotropy.by_layer([])


def test_texts_of_different_lengths():
    blocks = [torch.randn(n, 8) + 1 for n in (3, 9, 5)]
    assert anisotropy.mean_cosine(blocks).value == pytest.approx(
        anisotropy.mean_cosine(torch.cat(blocks)).value
    )
