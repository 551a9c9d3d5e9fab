import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from headbound import models, pythia
from headbound.measure import lowrank, rules

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
    covariance = lowrank.covariance(states(100, 8))
    full = lowrank.low_rank(weight, 8, covariance)
    torch.testing.assert_close(full.A @ full.B, weight, rtol=1e-4, atol=1e-4)
    cut = full.cut(3)
    direct = lowrank.low_rank(weight, 3, covariance)
    torch.testing.assert_close(cut.A @ cut.B, direct.A @ direct.B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "covariance", "message"),
    [
        (0, None, "rank = 0: must be between 1 and 4"),
        (5, None, "rank = 5: must be between 1 and 4"),
        (2, torch.eye(3), "covariance of shape"),
        (2, torch.ones(4, 4), "covariance of 4 dimensions: singular"),
        (2, lowrank.covariance(states(3, 4), ridge=0.0), "covariance of 4 dimensions: singular"),
        (2, torch.zeros(4, 4), "covariance of 4 dimensions: singular"),
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


def examples(world):
    return lowrank.Examples(world[1], world[2], np.arange(len(world[2])))


def loss(head, world):
    return lowrank.token_losses(examples(world), [head]).mean()


@pytest.mark.parametrize("sampled", [None, 5])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_one_pass_equals_one_rank_after_another(world, sampled, cap):
    starts = [lowrank.Head.random(world[0], rank)._replace(cap=cap) for rank in (1, 4, 8)]
    before = [start.A.clone() for start in starts]
    options = {"epochs": 2, "batch": 64, "sampled": sampled}
    together = lowrank.train(examples(world), starts, **options)
    for start, kept, head in zip(starts, before, together, strict=True):
        (alone,) = lowrank.train(examples(world), [start], **options)
        assert torch.equal(alone.A, head.A)
        assert torch.equal(alone.B, head.B)
        assert torch.equal(start.A, kept)
        assert head.cap == cap
        assert loss(head, world) < loss(start, world)


def test_heads_trained_and_measured_one_by_one_lose_what_they_lose_together(world):
    data = examples(world)
    tests = {"all": data, "some": lowrank.Examples(*(part[:64] for part in data))}
    ranks = (1, 4)
    options = {"epochs": 1, "batch": 64, "learning_rate": 0.02}
    starts = [lowrank.Head.random(world[0], rank) for rank in ranks]
    together = lowrank.train(data, starts, **options)
    found = lowrank.trained_losses(data, iter(starts), tests, **options)
    assert found.keys() == tests.keys()
    for name, test in tests.items():
        alone = [lowrank.token_losses(test, [head])[0] for head in together]
        np.testing.assert_array_equal(found[name], alone)


def test_a_step_is_adams_step(world):
    """One step, by hand: each entry moves by its rate, against its gradient's sign."""
    data = lowrank.Examples(*(part[:64] for part in examples(world)))
    start = lowrank.Head.random(world[0], 4)
    A, B = (factor.clone().requires_grad_() for factor in start[:2])
    states = torch.from_numpy(data.hidden_states)
    cross_entropy(states @ B.T @ A.T, torch.from_numpy(data.targets)).backward()
    (head,) = lowrank.train(data, [start], 1, batch=64, learning_rate=0.02)
    size = start.B.square().mean().sqrt()
    torch.testing.assert_close(head.A, start.A - 0.02 / 2 * A.grad.sign(), atol=1e-4, rtol=0)
    torch.testing.assert_close(head.B, start.B - 0.04 * size * B.grad.sign(), atol=1e-4, rtol=0)


def test_training_reaches_the_teacher_and_sampling_does_not_move_it(world):
    options = {"epochs": 12, "batch": 64, "learning_rate": 0.15}
    start = lowrank.Head.random(world[0], 8)
    whole, sampled = (
        loss(lowrank.train(examples(world), [start], sampled=count, **options)[0], world)
        for count in (None, 5)
    )
    best = loss(lowrank.Head(world[0], torch.eye(8)), world)
    assert whole == pytest.approx(best, abs=0.05)
    assert sampled == pytest.approx(whole, abs=0.03)


def test_memory_mapped_states_are_enough(world, tmp_path):
    np.save(tmp_path / "states.npy", world[1])
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    start = lowrank.Head.random(world[0], 2)
    one, other = (
        lowrank.train(examples(world)._replace(hidden_states=states), [start], 1)[0]
        for states in (world[1], mapped)
    )
    assert torch.equal(one.A, other.A)


def test_divergence_is_an_error_not_a_head(world):
    with pytest.raises(FloatingPointError, match=r"rank 4 diverged: .*; lower learning_rate"):
        lowrank.train(examples(world), [lowrank.Head.random(world[0], 4)], learning_rate=1e3)
    broken = examples(world)._replace(
        hidden_states=np.where(world[1] > 1, np.nan, world[1])  # float32
    )
    with pytest.raises(FloatingPointError, match=r"rank 8 diverged: .* nan at the end"):
        lowrank.train(broken, [lowrank.Head.random(world[0], 8)])


@pytest.mark.parametrize(("tokens", "epochs"), [(100, 1), (2048, 0)])
def test_too_little_to_train_on(world, tokens, epochs):
    data = lowrank.Examples(*(part[:tokens] for part in examples(world)))
    with pytest.raises(ValueError, match="need an epoch and a batch of 128"):
        lowrank.train(data, [lowrank.Head.random(world[0], 2)], epochs)


@pytest.mark.parametrize(
    ("states", "targets", "message"),
    [
        (np.zeros((5, 3)), np.zeros(5, int), r"states \(5, 3\), head \(7, 4\): they do not fit"),
        (np.zeros((5, 4)), np.zeros(4, int), r"4 targets from 0 to 0, states \(5, 4\)"),
        (np.zeros((5, 4)), np.full(5, 7), "targets from 0 to 7"),
        (np.zeros((5, 4)), np.full(5, -100), "targets from -100"),
        (np.zeros((0, 4)), np.zeros(0, int), "0 targets"),
    ],
)
def test_bad_input_says_what_to_do(states, targets, message):
    head = lowrank.Head(torch.zeros(7, 4), torch.eye(4))
    data = lowrank.Examples(states.astype(np.float32), targets, np.zeros(len(targets), int))
    with pytest.raises(ValueError, match=message):
        lowrank.token_losses(data, [head])


@pytest.mark.parametrize(("vocab", "d"), [(5, 16), (9, 7), (3, 1)])
def test_small_vocabularies_odd_widths_and_one_passage(vocab, d):
    weight = torch.randn(vocab, d, generator=torch.Generator().manual_seed(0))
    hidden_states = states(64, d).astype(np.float32)
    texts = np.zeros(64, int)
    data = lowrank.Examples(hidden_states, np.arange(64) % vocab, texts)
    rank = min(vocab, d)
    full = lowrank.low_rank(weight, rank, lowrank.covariance(hidden_states))
    whole = lowrank.Head(weight, torch.eye(d))
    losses = lowrank.token_losses(data, [full, whole])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    (trained,) = lowrank.train(data, [full], 1, batch=16, learning_rate=1e-3, sampled=1)
    estimate = lowrank.perplexity(lowrank.token_losses(data, [trained])[0], texts)
    assert estimate.n == 1
    assert np.isnan(estimate.low)


def test_knee_is_found_where_it_was_put():
    ranks = [8, 16, 32, 64, 128]
    texts = np.repeat(np.arange(50), 10)
    excess = np.log1p(0.05) * np.array([8, 4, 2, 0.5, 0])
    losses = 3 + excess[:, None] + np.random.default_rng(0).normal(size=500)
    knee = lowrank.ByRank(ranks, losses, texts).knee()
    assert knee.value == pytest.approx(32 * 2 ** (1 / 1.5))
    assert knee.low == pytest.approx(knee.high)
    assert lowrank.ByRank(ranks, 0 * losses + 1, texts).knee().value == 8
    assert lowrank.ByRank(ranks, losses, texts).knee(tolerance=0.2).value < knee.value


PAPER = pythia.figures("6b")


def test_texts_may_have_any_numbers_and_an_unknown_loss_has_no_knee():
    losses = np.outer([3.0, 2.0, 1.0], np.ones(4))
    numbered = lowrank.ByRank([1, 2, 4], losses, np.array([3, 3, 7, 9])).knee()
    assert numbered == lowrank.ByRank([1, 2, 4], losses, np.array([0, 0, 1, 2])).knee()
    assert numbered.n == 3
    unknown = lowrank.ByRank([1, 2, 4], losses * math.nan, np.array([0, 0, 1, 2])).knee()
    assert math.isnan(unknown.value)


def curve(frame):
    """A cited curve by rank; two texts that agree."""
    ordered = frame.sort_values("x")
    losses = np.repeat(ordered["y"].to_numpy()[:, None], 2, 1)
    return lowrank.ByRank(ordered["x"].astype(int).tolist(), losses, np.arange(2))


@pytest.mark.parametrize("name", PAPER["curve"].unique())
def test_on_the_papers_curves_the_rank_decides_and_not_its_share_of_the_width(name):
    own = PAPER[PAPER["curve"] == name]
    others = PAPER[PAPER["curve"] != name]
    assert rules.positive(curve(own).rank_or_share(others)).agrees
    assert rules.knee_near(curve(own).knee(), int(own["x"].max())).agrees
    assert rules.rank_costs(own["x"], own["y"]).agrees


@pytest.mark.parametrize("width", [128, 576, 2048])
def test_where_a_share_of_the_width_decides_it_says_so(width):
    """Counter-example: models whose loss depends on r/d alone."""
    frames = []
    for d in (1024, 2048, 4096, width):
        ranks = np.array([d / 32, d / 16, d / 8, d / 4, d / 2, d])
        frames.append(pd.DataFrame({"curve": str(d), "x": ranks, "y": np.log2(d / ranks)}))
    own = curve(frames.pop())
    assert rules.positive(own.rank_or_share(pd.concat(frames))).agrees is False


def test_without_a_rank_on_the_other_curves_there_is_nothing_to_compare():
    theirs = pd.DataFrame({"curve": "wide", "x": [256, 1024, 4096], "y": [3.0, 1.0, 0.0]})
    ours = pd.DataFrame({"curve": "narrow", "x": [2, 4, 8], "y": [2.0, 1.0, 0.0]})
    found = curve(ours).rank_or_share(theirs)
    assert np.isnan(found.value)
    told = (None, "nothing in common to compare, so there is no such number")
    assert rules.positive(found) == told


@pytest.mark.parametrize(("moved", "agrees"), [(0.03, True), (-0.03, True), (0.14, None)])
def test_a_curve_that_half_the_text_moves_is_not_judged(moved, agrees):
    assert rules.Ruling(True, "").if_settled(moved).agrees is agrees


def test_perplexity_resamples_texts_not_tokens():
    texts = np.repeat(np.arange(40), 25)
    losses = 1.0 + np.repeat(np.random.default_rng(0).normal(size=40), 25)
    estimate = lowrank.perplexity(losses, texts)
    assert estimate.n == 40
    assert estimate.value == pytest.approx(np.exp(losses.mean()))
    width = 1.96 * losses.reshape(40, 25).mean(1).std() / np.sqrt(40)
    assert np.log(estimate.high / estimate.low) == pytest.approx(2 * width, rel=0.2)


SIZE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ONE_KEY = {**SIZE, "num_key_value_heads": 2, "pad_token_id": 0}
ODDITIES = {
    "none": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE)),
    "bias": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZE)),
    "divided": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(logits_scaling=8.0, **SIZE)
    ),
    "multiplied": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**ONE_KEY)),
    "capped": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(head_dim=8, final_logit_softcapping=2.0, **ONE_KEY)
    ),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_losses_of_stored_states_are_the_models_own(oddity, tmp_path, monkeypatch):
    """Heads with a bias, a scale or a soft cap, as in a report on vLLM (46835)."""
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = ODDITIES[oddity]().eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    if oddity == "bias":
        torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    ids = torch.randint(60, (5, 33))
    readout = models.readout(model, None, ids)
    data = lowrank.examples(model, ids, readout)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.double().flatten(0, 1)
    expected = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weight = readout.matrix()
    d = weight.shape[1]
    whole = lowrank.Head(weight, torch.eye(d), readout.cap)
    full = lowrank.low_rank(weight, d, lowrank.covariance(data.hidden_states))
    full = full._replace(cap=readout.cap)
    losses = lowrank.token_losses(data, [whole, full, full.cut(2)], block=7)
    np.testing.assert_allclose(losses[0], expected, atol=1e-4)
    np.testing.assert_allclose(losses[1], expected, atol=1e-3)
    assert np.abs(losses[2] - losses[0]).max() > 1e-3


@pytest.mark.parametrize("cap", [None, 3.0])
def test_cuts_of_one_head_share_their_work_and_lose_what_each_loses_alone(cap):
    generator = torch.Generator().manual_seed(0)
    head = lowrank.low_rank(torch.randn(40, 9, generator=generator), 9)._replace(cap=cap)
    other = lowrank.Head.random(torch.zeros(40, 9), 4)
    states = torch.randn(30, 9, generator=generator).numpy()
    data = lowrank.Examples(states, np.arange(30), np.arange(30) // 5)
    heads = [head.cut(2), head.cut(5), other, head.cut(5), head, head, head.cut(3)]
    assert [head.extends(part) for part in heads] == [True, True, False, True, True, True, True]
    assert not head.cut(3).extends(head)
    shared = lowrank.token_losses(data, heads, block=7)
    alone = [lowrank.token_losses(data, [part])[0] for part in heads]
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
