import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from headbound.measure import gradients, lowrank
from headbound.stats import Estimate

pytestmark = pytest.mark.usefixtures("one_thread")


def examples(hidden_states, vocab, seed=0, texts=2):
    targets = np.random.default_rng(seed).integers(vocab, size=len(hidden_states))
    return lowrank.Examples(hidden_states, targets, np.arange(len(targets)) % texts)


def logit_gradient(data, weight):
    """G itself, N × V, in float64."""
    logits = torch.tensor(np.asarray(data.hidden_states)).double() @ weight.double().T
    target = torch.nn.functional.one_hot(torch.tensor(data.targets), len(weight)).bool()
    p = torch.softmax(logits, 1).masked_fill(target, 0)
    return torch.where(target, -p.sum(1, keepdim=True), p)


@st.composite
def cases(draw):
    """Heads of any rank, tiny or huge, with unequal columns; a token or more; logits up to 1e5."""
    vocab, d, tokens = draw(st.integers(2, 60)), draw(st.integers(1, 12)), draw(st.integers(1, 20))
    rank = draw(st.integers(0, min(vocab, d)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    weight = rng.normal(size=(vocab, rank)) @ rng.normal(size=(rank, d))
    weight *= np.geomspace(1, draw(st.sampled_from([1.0, 1e-9])), d) * draw(
        st.sampled_from([1e-20, 1.0, 1e3])
    )
    if draw(st.booleans()):
        weight += weight.mean() * 30  # a mean row that dominates
    states = rng.normal(size=(tokens, d)) * draw(st.sampled_from([1e-3, 1.0, 1e2]))
    return examples(states, vocab), torch.tensor(weight), draw(st.sampled_from([1, 7, 128]))


@given(cases())
@settings(max_examples=60)
def test_equals_brute_force(case):
    data, weight, block = case
    found = gradients.share_kept(data, weight, block)
    gradient = logit_gradient(data, weight)
    scaled = weight / torch.where(weight.norm(dim=0) > 0, weight.norm(dim=0), 1)
    left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    projected = gradient @ left[:, values > 1e-6 * max(values[0], 1e-30)]
    whole, kept = (x.square().sum(1).numpy() for x in (gradient, projected))
    np.testing.assert_allclose(found.gradient, whole, rtol=1e-10, atol=1e-280)
    assert (abs(found.kept - kept) <= 1e-9 * whole + 1e-280).all()
    reference = np.zeros(len(gradient))
    reference[: min(gradient.shape)] = torch.linalg.svdvals(gradient)
    np.testing.assert_allclose(
        gradients.singular_values(data, weight, block=block),
        reference,
        atol=1e-7 * reference[0] + 1e-280,
    )


class Largest(TorchFunctionMode):
    """The number of entries of the largest tensor that any torch function returns."""

    entries = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return result


def test_streams_at_a_real_vocabulary_and_is_exact_there():
    vocab, d, tokens, block = 49_152, 8, 150, 16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, d, generator=generator)
    data = examples(torch.randn(tokens, d, generator=generator).numpy(), vocab)
    with Largest() as largest:
        found = gradients.share_kept(data, weight, block)
    assert largest.entries == block * vocab  # never tokens × vocab
    with Largest() as largest:
        values = gradients.singular_values(data, weight, block=block)
    assert largest.entries <= block * vocab
    gradient = logit_gradient(data, weight)
    kept = (gradient @ torch.linalg.qr(weight.double()).Q).square().sum(1)
    np.testing.assert_allclose(found.kept, kept, rtol=1e-9)
    np.testing.assert_allclose(
        values, torch.linalg.eigvalsh(gradient @ gradient.T).flip(0).sqrt(), rtol=1e-9
    )


def test_shares_of_a_batch_of_a_choice_and_of_the_norm():
    data = examples(np.random.default_rng(1).normal(size=(40, 4)), 30, texts=8)
    weight = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).double()
    found, gradient = gradients.share_kept(data, weight), logit_gradient(data, weight)
    projector = weight @ torch.linalg.pinv(weight)
    share = found.share()
    assert share.n == 8
    assert share.value == pytest.approx(float((gradient @ projector).norm() / gradient.norm()) ** 2)
    assert share.low < share.value < share.high
    odd = data.texts % 2 == 1
    part = gradient[torch.tensor(odd)]
    assert found.share(where=odd).n == 4
    assert found.share(where=odd).value == pytest.approx(
        float((part @ projector).norm() / part.norm()) ** 2
    )
    with pytest.raises(ValueError, match="units = 0"):
        found.share(where=data.texts > 8)
    assert np.isnan(found._replace(gradient=np.zeros(40)).share().value)


def test_a_mean_row_takes_a_dimension_that_the_softmax_ignores():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(50, 6, generator=generator).double()
    weight -= weight.mean(0)
    data = examples(np.random.default_rng(2).normal(size=(20, 6)), 50)
    shifted = weight + torch.randn(6, generator=generator)
    bare, with_mean = (gradients.share_kept(data, w) for w in (weight, shifted))
    np.testing.assert_allclose(bare.gradient, with_mean.gradient, rtol=1e-9)  # the same predictions
    assert (with_mean.kept < bare.kept).all()


def test_a_random_subspace_keeps_d_of_v():
    rng, vocab, d = np.random.default_rng(3), 400, 40
    data = examples(0.01 * rng.normal(size=(300, d)), vocab, texts=300)
    share = gradients.share_kept(data, torch.tensor(rng.normal(size=(vocab, d)))).share()
    assert share.value == pytest.approx(d / vocab, rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": np.array([0, 9])},
            r"2 targets from 0 to 9, states \(2, 3\), head \(5, 3\): they do not fit",
        ),
        ({"targets": np.array([0])}, r"1 targets from 0 to 0, states \(2, 3\)"),
        ({"hidden_states": np.zeros((0, 3)), "targets": np.zeros(0, int)}, "0 targets"),
        ({"hidden_states": np.zeros((2, 4))}, r"states \(2, 4\), head \(5, 3\)"),
        ({"hidden_states": np.full((2, 3), np.nan)}, "NaN or Inf"),
    ],
)
def test_bad_input(change, message):
    data = examples(np.zeros((2, 3)), 5)._replace(**change)
    for measure in (gradients.share_kept, gradients.singular_values):
        with pytest.raises(ValueError, match=message):
            measure(data, torch.ones(5, 3))


@given(st.data())
@settings(max_examples=30)
def test_no_step_moves_the_logits_by_more_than_rank_2d(data):
    """(H + ΔH)(W + ΔW)ᵀ − H Wᵀ has rank 2d at most, and 2d for generic steps."""
    d, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 10**6))
    tokens, vocab = data.draw(st.integers(1, 24)), data.draw(st.integers(2, 24))
    rng = np.random.default_rng(seed)
    states, weight = rng.normal(size=(tokens, d)), rng.normal(size=(vocab, d))
    gradient = logit_gradient(examples(states, vocab, seed), torch.tensor(weight)).numpy()
    rate = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    new_states, new_weight = states - rate * gradient @ weight, weight - rate * gradient.T @ states
    if data.draw(st.booleans()):  # any other step
        new_states, new_weight = rng.normal(size=(tokens, d)), rng.normal(size=(vocab, d))
    change = new_states @ new_weight.T - states @ weight.T
    values = np.linalg.svd(change, compute_uv=False)
    rank = int((values > 1e-11 * values[0]).sum())
    assert rank <= 2 * d
    if tokens > 2 * d and vocab > 2 * d:
        assert rank == 2 * d


def test_a_soft_cap_changes_the_gradient_and_not_the_projection():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(30, 5, generator=generator).double()
    data = examples(3 * np.random.default_rng(4).normal(size=(12, 5)), 30)

    def capped(states):
        return 2 * torch.tanh(states @ weight.T / 2)

    found = gradients.share_kept(data, weight, 5, capped)
    p = torch.softmax(capped(torch.tensor(data.hidden_states)), 1)
    g = p - torch.nn.functional.one_hot(torch.tensor(data.targets), 30)
    projected = g @ weight @ torch.linalg.pinv(weight)
    np.testing.assert_allclose(found.gradient, g.square().sum(1), rtol=1e-9)
    np.testing.assert_allclose(found.kept, projected.square().sum(1), rtol=1e-9)
    values = gradients.singular_values(data, weight, 5, capped)
    np.testing.assert_allclose(values, torch.linalg.svdvals(g), rtol=1e-6, atol=1e-7)


@given(cases())
@settings(max_examples=30)
def test_the_basis_is_orthonormal_and_spans_the_columns(case):
    _, weight, _ = case
    basis = weight @ gradients._orthonormal(weight)
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, atol=1e-12, rtol=0)
    left = weight - basis @ (basis.T @ weight)
    assert (left.norm(dim=0) <= 1e-5 * weight.norm(dim=0) + 1e-300).all()


def share(value, low, high):
    return Estimate(value, low, high, 9)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_readings_of_lost_are_ordered_and_their_intervals_hold_them(three):
    low, value, high = sorted(three)
    squared, shorter, part = gradients.lost(share(value, low, high)).values()
    for reading in (squared, shorter, part):
        assert reading.low <= reading.value <= reading.high
        assert 0 <= reading.value <= 1
    assert shorter.value <= squared.value <= part.value
    assert part.value**2 + (1 - shorter.value) ** 2 == pytest.approx(1)


@pytest.mark.parametrize(
    ("interval", "answer"),
    [((0.95, 0.99), True), ((0.945, 0.995), True), ((0.9, 0.94), False), ((0.9, 0.96), None)],
)
def test_the_range_of_the_paper(interval, answer):
    assert share(0.95, *interval).within(0.945, 0.995) is answer
