import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound.train import fast

pytestmark = pytest.mark.usefixtures("one_thread")


def neox(d, scale, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=d,
        intermediate_size=4 * d,
        num_attention_heads=max(1, d // 16),
        num_hidden_layers=2,
        max_position_embeddings=32,
        **options,
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model.to(dtype)


def gradients(states, model):
    """Of the sum of the states times fixed random numbers, by every weight of the body."""
    torch.manual_seed(1)
    return torch.autograd.grad(states, list(model.parameters()), torch.randn_like(states))


@pytest.mark.parametrize("d", [8, 16, 32])
@pytest.mark.parametrize("scale", [0.0, 0.3, 30.0])
def test_states_and_their_gradients_are_the_models_own(d, scale):
    # At the largest scale the scores are beyond what exp can take, and the bound notices.
    model = neox(d, scale, torch.float64).base_model
    tokens = torch.arange(3 * 20).view(3, 20) % 50
    own = model(tokens, use_cache=False).last_hidden_state
    before, after = fast.states(model, tokens)
    assert torch.allclose(after, own, atol=1e-9)
    assert torch.allclose(model.final_layer_norm(before), own, atol=1e-9)
    expected, found = gradients(own, model), gradients(after, model)
    # Some gradients are zero but for rounding: what counts is the largest.
    largest = max(float(one.abs().max()) for one in expected)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(other, one, rtol=1e-5, atol=1e-6 * largest)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([1, 7, 256, 700]),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
)
def test_loss_and_gradients_are_those_of_whole_logits(seed, tokens, scale, z_loss):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weight = (scale * torch.randn(60, 5, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(60, (tokens,))
    logits = hidden @ weight.T
    expected = cross_entropy(logits, targets) + z_loss * logits.logsumexp(1).square().mean()
    found = fast.cross_entropy(hidden, weight, targets, z_loss)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-9)
    for of in (hidden, weight):
        (one,) = torch.autograd.grad(expected, of, retain_graph=True)
        (other,) = torch.autograd.grad(found, of, retain_graph=True)
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9 * float(one.abs().max() + 1))


def test_float32_is_as_good_as_whole_logits_in_float32():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2048, 8), torch.randn(1024, 8), torch.arange(2048) % 1024
    exact = cross_entropy(hidden.double() @ weight.double().T, targets)
    assert float(fast.cross_entropy(hidden, weight, targets)) == pytest.approx(
        float(exact), rel=1e-6
    )


@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_no_gradient_moves_the_mean_row(seed, scale):
    """The lemma: probabilities and targets both sum to one, so the rows' gradients sum to zero."""
    torch.manual_seed(seed)
    hidden = torch.randn(40, 6, dtype=torch.float64)
    weight = (scale * torch.randn(30, 6, dtype=torch.float64)).requires_grad_()
    loss = fast.cross_entropy(hidden, weight, torch.randint(30, (40,)))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.sum(0).abs().max()) <= 1e-13 * float(1 + gradient.abs().sum())
    assert float(gradient.abs().max()) > 0


def test_rounding_is_applied_to_logits_and_their_scaled_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(300, 5, requires_grad=True)
    weight = torch.randn(60, 5, requires_grad=True)
    targets = torch.randint(60, (300,))

    def half(numbers):
        return numbers.half().float()

    found = fast.cross_entropy(hidden, weight, targets, precision=torch.float16)
    by_hidden, by_weight = torch.autograd.grad(found, (hidden, weight))
    with torch.no_grad():
        logits = half(hidden @ weight.T)
        error = torch.softmax(logits, 1) - torch.nn.functional.one_hot(targets, 60)
        error = half(error * fast.LOSS_SCALE / 300) / fast.LOSS_SCALE
        assert float(found) == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-6)
        assert torch.allclose(by_hidden, error @ weight, atol=1e-7)
        assert torch.allclose(by_weight, error.T @ hidden, atol=1e-6)
    plain = fast.cross_entropy(hidden, weight, targets, precision=torch.float64)
    assert float(plain.detach()) == pytest.approx(
        float(fast.cross_entropy(hidden, weight, targets).detach()), rel=1e-6
    )
