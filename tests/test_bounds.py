"""Each theorem on the head bound has a test here that tries to break it; names follow its labels."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, rel_entr, softmax

from headbound.measure import bounds

rng = np.random.default_rng
pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def targets(draw, largest=64):
    n, v = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    scale = draw(st.sampled_from([1e-3, 0.1, 1.0, 3.0, 10.0]))
    kind = draw(st.sampled_from(["noise", "head", "constant", "offset", "one-hot"]))
    noise = rng(draw(st.integers(0, 10**6)))
    if kind == "head":  # decaying spectrum and a unigram direction, as a trained head has
        width = min(n, v)
        head = (
            noise.normal(size=(n, width)) / np.arange(1, width + 1) @ noise.normal(size=(width, v))
        )
        return scale * (head - np.log(np.arange(1, v + 1)))
    if kind == "constant":
        return np.full((n, v), scale)
    if kind == "one-hot":
        return scale * np.eye(v)[noise.integers(v, size=n)]
    return scale * noise.normal(size=(n, v)) + (
        1e4 * noise.normal(size=(n, 1)) if kind == "offset" else 0
    )


def kl(logits, other):
    return rel_entr(softmax(logits, axis=1), softmax(other, axis=1)).sum(1)


def independent_solver(logits, rank, seed, start=None):
    """Another road to small gaps: from random heads, or on from given logits: the gap reached."""
    n, v = logits.shape
    p = softmax(logits, axis=1)
    x = rng(seed).normal(size=(n + v) * rank)
    if start is not None:
        u, s, wt = np.linalg.svd(start - start.mean(1, keepdims=True), full_matrices=False)
        x = np.concatenate([(u[:, :rank] * s[:rank]).ravel(), wt[:rank].T.ravel()])

    def loss(x):
        h, w = x[: n * rank].reshape(n, rank), x[n * rank :].reshape(v, rank)
        log_q = log_softmax(h @ w.T, axis=1)
        g = np.exp(log_q) - p
        return -(p * log_q).sum() / n, np.concatenate([(g @ w).ravel(), (g.T @ h).ravel()]) / n

    x = minimize(loss, x, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return kl(logits, x[: n * rank].reshape(n, rank) @ x[n * rank :].reshape(v, rank).T).mean()


@pytest.mark.slow
@settings(max_examples=10)
@given(targets())
def test_no_solver_leaves_the_bounds_at_any_rank(logits):
    ranks = range(1, min(logits.shape) + 1)
    low = bounds.lower(logits, ranks, steps=30, anchors=3)
    high = bounds.upper(logits, ranks, steps=10)
    plain_low = bounds.textbook_lower(logits, ranks)
    plain_high = bounds.textbook_upper(logits, ranks)
    slack = 1e-12 * (1 + np.abs(logits).max())
    assert np.isfinite(low).all()
    assert (low >= 0).all()
    assert (low <= high).all()
    assert (plain_low <= high + slack).all()
    assert (np.diff(low) <= slack).all()
    for rank in ranks[:: max(1, len(ranks) // 6)]:
        witness = bounds.reach(logits, rank, steps=10)
        reached = min(
            independent_solver(logits, rank, 0), independent_solver(logits, rank, 1, witness)
        )
        assert reached <= high[rank - 1] + slack
        assert low[rank - 1] <= reached + slack
        assert plain_low[rank - 1] <= reached + slack
        assert reached <= plain_high[rank - 1] * (1 + 1e-9) + slack


@settings(max_examples=20)
@given(targets(16), st.integers(1, 16))
def test_upper_is_the_loss_of_logits_of_that_rank(logits, rank):
    rank = min(rank, *logits.shape)
    witness = bounds.reach(logits, rank, steps=20)
    values = np.linalg.svd(witness, compute_uv=False)
    assert (values[rank:] <= 1e-12 * max(values[0], 1e-9)).all()
    assert bounds.loss_gap(logits, witness) == pytest.approx(
        kl(logits, witness).mean(), rel=1e-7, abs=1e-8
    )
    assert bounds.upper(logits, [rank], steps=20)[0] <= bounds.loss_gap(logits, witness)


@pytest.mark.parametrize(("contexts", "vocab"), [(30, 12), (12, 30), (12, 12), (11, 12)])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_exact_at_the_rank_modulo_row_constants_and_not_one_below(contexts, vocab, width):
    generator = rng(width)
    logits = generator.normal(size=(contexts, width)) @ generator.normal(size=(width, vocab))
    logits += 5 * generator.normal(
        size=(contexts, 1)
    )  # a row constant is free: it must not cost a rank
    ranks = list(range(1, width + 1))
    gaps = bounds.upper(logits, ranks, steps=20)
    low = bounds.lower(logits, ranks, steps=20, anchors=2)
    assert gaps[-1] < 1e-10
    assert low[-1] == 0
    if width > 1:
        assert low[-2] > 0
    assert np.linalg.matrix_rank(log_softmax(logits, axis=1)) == min(width + 1, contexts, vocab)


def test_generic_targets_need_the_smaller_of_contexts_and_vocabulary_less_one():
    for shape in [(20, 8), (8, 20), (8, 8)]:
        needed = min(shape[0], shape[1] - 1)
        logits = rng(0).normal(size=shape)
        assert bounds.upper(logits, [needed])[0] < 1e-10
        assert bounds.lower(logits, [needed - 1], steps=20)[0] > 0


def test_nearly_uniform_targets_have_bounds_that_meet():
    logits = 1e-3 * rng(0).normal(size=(30, 20))
    ranks = range(1, 19, 3)
    ratio = bounds.lower(logits, ranks) / bounds.upper(logits, ranks)
    assert ratio.min() > 0.95
    values = np.linalg.svd(logits - logits.mean(1, keepdims=True), compute_uv=False)
    local = np.array([(values[d:] ** 2).sum() for d in ranks]) / (2 * 30 * 20)
    np.testing.assert_allclose(bounds.upper(logits, ranks), local, rtol=1e-2)


@given(
    st.floats(-300, 300),
    st.floats(1e-6, 1),
    st.floats(1e-6, 1e3),
    st.floats(1e-3, 1, exclude_max=False),
)
def test_the_scalar_lemma_behind_the_lower_bound(t, p, kappa, fraction):
    y = p / kappa
    r = fraction * (y if y < 1 else np.sqrt(y))
    assume(t < 300)
    phi = lambda t: np.expm1(t) - t  # noqa: E731
    assert p * phi(t) >= kappa * phi(-r * abs(t)) * (1 - 1e-9) - 1e-14 * (
        kappa * r * abs(t) + p * abs(t)
    )


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8), st.floats(0.1, 10))
def test_concave_sum_over_rows_is_at_least_the_one_over_singular_values(seed, n, v, scale):
    matrix = scale * rng(seed).normal(size=(n, v))
    g = lambda s: np.expm1(-s) + s  # noqa: E731  φ(−√x) as a function of s = √x
    rows = g(np.linalg.norm(matrix, axis=1)).sum()
    assert g(np.abs(matrix)).sum() >= rows * (1 - 1e-12)
    assert rows >= g(np.linalg.svd(matrix, compute_uv=False)).sum() * (1 - 1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_sparse_targets_cost_little_at_twice_their_support(tokens):
    """Proposition: rank 2k reaches every choice of k tokens a row, however many rows there are."""
    v = 10
    generator = rng(0)
    support = np.array([generator.permutation(v)[:tokens] for _ in range(200)])
    x = np.linspace(-1, 1, v)
    outside = -np.prod((x[None, :, None] - x[support][:, None, :]) ** 2, axis=2)
    values = generator.normal(size=(200, tokens))
    inside = np.array(
        [
            np.polyval(np.polyfit(x[s], y, tokens - 1), x)
            for s, y in zip(support, values, strict=True)
        ]
    )
    logits = 1e7 * outside + inside
    assert np.linalg.matrix_rank(logits - logits.mean(1, keepdims=True), tol=1e-3) <= 2 * tokens
    wanted = np.zeros((200, v))
    np.put_along_axis(wanted, support, softmax(values, axis=1), axis=1)
    assert rel_entr(wanted, softmax(logits, axis=1)).sum(1).max() < 1e-6


def test_a_sample_of_contexts_has_a_smaller_gap_on_average():
    logits = rng(0).normal(size=(6, 7))
    subsets = [list(chosen) for chosen in itertools.combinations(range(6), 4)]
    everywhere = bounds.upper(logits, [2])[0]
    assert np.mean([bounds.upper(logits[s], [2])[0] for s in subsets]) <= everywhere
    assert np.mean([bounds.lower(logits[s], [2], steps=20)[0] for s in subsets]) <= everywhere


@given(targets(20), st.integers(0, 10**6))
def test_second_order_expansion_is_met_as_the_change_shrinks(logits, seed):
    change = rng(seed).normal(size=logits.shape)
    exact, local = (
        f(logits, x)
        for f, x in [
            (lambda z, c: kl(z, z + c).mean(), 1e-3 * change),
            (bounds.second_order, 1e-3 * change),
        ]
    )
    noise = 1e-9 * (1 + np.abs(logits).max()) * 1e-3
    assert exact == pytest.approx(local, rel=2e-2, abs=noise)
    assert bounds.second_order(logits, np.ones_like(logits)) < 1e-15
    assert local <= (1e-6 * change**2).sum(1).mean() / 4 * (1 + 1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_gradients_lie_in_the_row_space_of_the_head(seed, width):
    generator = rng(seed)
    h, w = generator.normal(size=(9, width)), generator.normal(size=(12, width))
    y = np.eye(12)[generator.integers(12, size=9)]
    loss = lambda h: -(y * log_softmax(h @ w.T, axis=1)).sum()  # noqa: E731
    bump = generator.normal(size=h.shape)
    numeric = (loss(h + 1e-5 * bump) - loss(h - 1e-5 * bump)) / 2e-5
    error = softmax(h @ w.T, axis=1) - y
    assert numeric == pytest.approx((error @ w * bump).sum(), rel=1e-5, abs=1e-6)
    eta = 1e-2
    update = (h - eta * error @ w) @ (w - eta * error.T @ h).T - h @ w.T
    assert np.linalg.matrix_rank(update, tol=1e-9) <= 2 * width


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "bound", [bounds.upper, bounds.lower, bounds.textbook_upper, bounds.textbook_lower]
)
def test_logits_that_are_not_finite_are_refused(bound, bad):
    logits = np.zeros((3, 4))
    logits[1, 2] = bad
    with pytest.raises(ValueError, match=r"logits\[1, 2\] = .*no logarithm"):
        bound(logits, [1])


@pytest.mark.parametrize("rank", [0, -1, 4])
@pytest.mark.parametrize(
    "bound", [bounds.upper, bounds.lower, bounds.textbook_upper, bounds.textbook_lower]
)
def test_ranks_out_of_range_are_refused(bound, rank):
    with pytest.raises(ValueError, match=f"rank = {rank}: must be between 1 and 3"):
        bound(np.eye(3, 4), [rank])


def test_underflowing_probabilities_are_no_trouble():
    logits = np.array([[0.0, -2000.0, -1.0], [-3000.0, 0.0, 2.0], [0.0, 0.0, -5000.0]])
    assert bounds.lower(logits, [1])[0] <= bounds.upper(logits, [1])[0]
    assert bounds.textbook_lower(logits, [1])[0] == 0


def test_large_targets_descend_in_single_precision_and_are_measured_in_double(monkeypatch):
    logits = rng(0).normal(size=(30, 40))
    double = bounds.upper(logits, [4, 30], steps=40)
    monkeypatch.setattr(bounds, "LARGE", 100)
    single = bounds.upper(logits, [4, 30], steps=40)
    np.testing.assert_allclose(single, double, rtol=1e-2, atol=1e-9)
    witness = bounds.reach(logits, 4, steps=40)
    values = np.linalg.svd(witness, compute_uv=False)
    assert values[4] < 1e-9 * values[0]
    assert bounds.loss_gap(logits, witness) >= kl(logits, witness).mean()
    assert bounds.lower(logits, [4])[0] <= single[0]
