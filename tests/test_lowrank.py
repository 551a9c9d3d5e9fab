import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound.measure import lowrank
from headbound.measure.lowrank import blocked_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def states(tokens, d, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, d)) * np.geomspace(1, 1e-3, d) * scale + scale


def error(head, weight, hidden_states):
    return float(((torch.tensor(hidden_states) @ (weight - head.A @ head.B).T) ** 2).sum())


shapes = st.tuples(st.integers(2, 30), st.integers(2, 12))


@given(shapes, st.floats(1e-4, 1e4), st.integers(0, 99), st.data())
@settings(max_examples=50, deadline=None)
def test_closed_form_is_the_best_on_the_states_that_occur(shape, scale, seed, data):
    vocab, d = shape
    rank = data.draw(st.integers(1, min(vocab, d)))
    weight = torch.randn(
        vocab, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    occurring = states(4 * d + 20, d, scale, seed)
    closed = lowrank.low_rank(weight, rank, lowrank.covariance(occurring, ridge=0.0, block=7))
    truncated = lowrank.low_rank(weight, rank)
    size = error(
        lowrank.Head(torch.zeros(vocab, 1).double(), torch.zeros(1, d).double()), weight, occurring
    )
    assert error(closed, weight, occurring) <= error(truncated, weight, occurring) + 1e-9 * size
    # Reference: Eckart–Young on the logits themselves.
    tail = torch.linalg.svdvals(torch.tensor(occurring) @ weight.T)[rank:].square().sum()
    assert error(closed, weight, occurring) == pytest.approx(float(tail), abs=1e-8 * size)
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    reference = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    if rank == len(S) or S[rank - 1] - S[rank] > 1e-3 * S[0]:
        torch.testing.assert_close(truncated.A @ truncated.B, reference, rtol=1e-6, atol=1e-6)


def test_heads_are_nested_and_rank_d_reproduces_the_head():
    weight = torch.randn(50, 8)
    full = lowrank.low_rank(weight, 8, lowrank.covariance(states(100, 8)))
    torch.testing.assert_close(full.A @ full.B, weight, rtol=1e-4, atol=1e-4)
    for one, other in zip(
        full.cut(3), lowrank.low_rank(weight, 3, lowrank.covariance(states(100, 8))), strict=True
    ):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "covariance", "message"),
    [
        (0, None, "rank = 0: must be between 1 and 4"),
        (5, None, "rank = 5: must be between 1 and 4"),
        (2, torch.eye(3), "covariance of shape"),
        (2, torch.ones(4, 4), "covariance of rank 1: singular"),
        (2, lowrank.covariance(states(3, 4), ridge=0.0), "covariance of rank 3: singular"),
        (2, torch.zeros(4, 4), "covariance of rank 0: singular"),
    ],
)
def test_bad_ranks_and_covariances(rank, covariance, message):
    with pytest.raises(ValueError, match=message):
        lowrank.low_rank(torch.randn(9, 4), rank, covariance)


@pytest.fixture(scope="module")
def world():
    """States, a teacher of full rank and targets drawn from it; 30 of the 40 tokens ever occur."""
    weight = 2 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    weight[30:] = -weight[30:].abs() * torch.ones(8)
    hidden_states = np.abs(states(2048, 8)).astype(np.float32)
    probabilities = torch.softmax(torch.tensor(hidden_states) @ weight.T, 1)
    targets = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    return weight, hidden_states, targets.numpy()


def loss(head, world):
    _, hidden_states, targets = world
    return blocked_cross_entropy(torch.tensor(hidden_states), head, torch.tensor(targets)).item()


@pytest.mark.parametrize("sampled", [None, 5])
def test_one_pass_equals_one_rank_after_another(world, sampled):
    _, hidden_states, targets = world
    starts = [lowrank.random(world[0], rank) for rank in (1, 4, 8)]
    before = [start.A.clone() for start in starts]
    options = {"epochs": 2, "batch": 64, "sampled": sampled}
    together = lowrank.train(hidden_states, targets, starts, **options)
    for start, kept, head in zip(starts, before, together, strict=True):
        (alone,) = lowrank.train(hidden_states, targets, [start], **options)
        assert torch.equal(alone.A, head.A)
        assert torch.equal(alone.B, head.B)
        assert torch.equal(start.A, kept)
        assert loss(head, world) < loss(start, world)


def test_training_reaches_the_teacher_and_sampling_does_not_move_it(world):
    options = {"epochs": 12, "batch": 64, "learning_rate": 0.15}
    whole, sampled = (
        loss(
            lowrank.train(*world[1:], [lowrank.random(world[0], 8)], sampled=s, **options)[0], world
        )
        for s in (None, 5)
    )
    best = loss((world[0], torch.eye(8)), world)
    assert whole == pytest.approx(best, abs=0.05)
    assert sampled == pytest.approx(whole, abs=0.03)


def test_memory_mapped_states_are_enough(world, tmp_path):
    np.save(tmp_path / "states.npy", world[1])
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    one, other = (
        lowrank.train(h, world[2], [lowrank.random(world[0], 2)], 1)[0] for h in (world[1], mapped)
    )
    assert torch.equal(one.A, other.A)


def test_divergence_is_an_error_not_a_head(world):
    with pytest.raises(FloatingPointError, match=r"rank 4 diverged: .*; lower learning_rate"):
        lowrank.train(*world[1:], [lowrank.random(world[0], 4)], learning_rate=1e3)
    _, hidden_states, targets = world
    with pytest.raises(FloatingPointError, match="rank 8 diverged: loss nan"):
        lowrank.train(
            np.where(hidden_states > 1, np.nan, hidden_states),
            targets,
            [lowrank.random(world[0], 8)],
        )


@pytest.mark.parametrize(("tokens", "epochs"), [(100, 1), (2048, 0), (2047, 1)])
def test_too_little_to_train_on(world, tokens, epochs):
    with pytest.raises(ValueError, match="need one target a state"):
        lowrank.train(world[1], world[2][:tokens], [lowrank.random(world[0], 2)], epochs)


def test_knee_is_found_where_it_was_put():
    ranks = [8, 16, 32, 64, 128]
    texts = np.repeat(np.arange(50), 10)
    excess = np.log1p(0.05) * np.array([8, 4, 2, 0.5, 0])
    losses = 3 + excess[:, None] + np.random.default_rng(0).normal(size=500)
    knee = lowrank.knee(ranks, losses, texts)
    assert knee.value == pytest.approx(32 * 2 ** (1 / 1.5))
    assert knee.low == pytest.approx(knee.high)
    assert lowrank.knee(ranks, 0 * losses + 1, texts).value == 8
    assert lowrank.knee(ranks, losses, texts, tolerance=0.2).value < knee.value


def test_losses_of_stored_states_are_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = GPTNeoXForCausalLM(config).eval()
    ids = torch.randint(64, (5, 21))
    data = lowrank.examples(model, ids)
    assert isinstance(data.hidden_states.base, np.memmap)
    weight = model.get_output_embeddings().weight.detach()
    full = lowrank.low_rank(weight, 16, lowrank.covariance(data.hidden_states))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    losses = lowrank.token_losses(data, [full, full.cut(2)], block=7)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)
    assert np.abs(losses[1] - losses[0]).max() > 1e-3
    (stored,) = (tmp_path / "hidden").iterdir()
    before = stored.stat().st_mtime_ns
    lowrank.examples(model, ids)
    assert stored.stat().st_mtime_ns == before
