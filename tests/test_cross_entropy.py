import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from headbound.measure.lowrank import blocked_cross_entropy, perplexity


def problem(tokens, vocab, d, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden_states = scale * torch.randn(tokens, d, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocab, d, generator=draw, dtype=torch.float64)
    return hidden_states, weight, torch.randint(vocab, (tokens,), generator=draw)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


sizes = st.tuples(st.integers(1, 70), st.integers(2, 40), st.integers(1, 12))


@given(
    sizes, st.integers(1, 80), st.sampled_from([1e-6, 1.0, 1e3]), st.sampled_from(["mean", "none"])
)
@settings(max_examples=60, deadline=None)
def test_equals_the_full_loss_and_gradient(size, block, scale, reduction):
    hidden_states, weight, targets = problem(*size, scale)
    bias = torch.randn(len(weight), dtype=torch.float64, requires_grad=True)
    hidden_states.requires_grad_(), weight.requires_grad_()
    inputs = (hidden_states, weight, bias)
    full = cross_entropy(hidden_states @ weight.T + bias, targets, reduction=reduction)
    blocked = blocked_cross_entropy(hidden_states, weight, targets, block, bias, reduction)
    torch.testing.assert_close(blocked, full, rtol=1e-9, atol=1e-12)
    upstream = torch.linspace(0.5, 2, len(targets)) if reduction == "none" else torch.tensor(1.0)
    expected = gradients((upstream * full).sum(), *inputs)
    for got, wanted in zip(gradients((upstream * blocked).sum(), *inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-12)


def test_gradient_of_a_factored_head_in_float32():
    hidden_states, weight, targets = problem(500, 300, 24)
    A, B = (
        weight[:, :9].clone().requires_grad_(),
        torch.randn(9, 24, dtype=torch.float64, requires_grad=True),
    )
    expected = gradients(cross_entropy(hidden_states @ (A @ B).T, targets), A, B)
    a, b = A.detach().float().requires_grad_(), B.detach().float().requires_grad_()
    got = gradients(blocked_cross_entropy(hidden_states.float(), (a, b), targets, block=64), a, b)
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernel_agrees():
    hidden_states, weight, targets = (x.cuda() for x in problem(700, 3000, 64))
    expected = cross_entropy(hidden_states @ weight.T, targets)
    got = blocked_cross_entropy(
        hidden_states.float().requires_grad_(), weight.float().requires_grad_(), targets
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(5, 3)}, "hidden states of width 3, head of width 4"),
        (
            {"weight": (torch.zeros(7, 2), torch.zeros(2, 3))},
            "hidden states of width 4, head of width 3",
        ),
        ({"targets": torch.full((5,), 7)}, "targets from 7 to 7: the head has rows 0 to 6"),
        ({"targets": torch.full((5,), -100)}, "targets from -100"),
        ({"block": 0}, "block = 0"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    good = {
        "hidden_states": torch.zeros(5, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(5).long(),
    }
    with pytest.raises(ValueError, match=message):
        blocked_cross_entropy(**{**good, **change})


def test_perplexity_resamples_texts_not_tokens():
    texts = np.repeat(np.arange(40), 25)
    losses = 1.0 + np.repeat(np.random.default_rng(0).normal(size=40), 25)
    estimate = perplexity(losses, texts)
    assert estimate.n == 40
    assert estimate.value == pytest.approx(np.exp(losses.mean()))
    width = 1.96 * losses.reshape(40, 25).mean(1).std() / np.sqrt(40)
    assert np.log(estimate.high / estimate.low) == pytest.approx(2 * width, rel=0.2)
