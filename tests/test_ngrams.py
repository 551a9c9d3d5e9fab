import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headbound.measure import ngrams


def zipf_tokens(size, vocab, seed=0):
    return np.random.default_rng(seed).zipf(1.3, size).clip(max=vocab).astype(np.int32) - 1


def dense(tokens, order, vocab):
    """Counts the slow way: contexts in a dictionary."""
    rows = defaultdict(Counter)
    for i in range(len(tokens) - order + 1):
        rows[tuple(tokens[i : i + order - 1])][tokens[i + order - 1]] += 1
    return np.array([[row[v] for v in range(vocab)] for row in rows.values()], float)


def w_error(singular_values):
    tails = np.cumsum(np.sort(singular_values) ** 2)
    return np.sqrt(tails / tails[-1])


def low_rank_tokens(rank, vocab, size, seed=0, lanes=1000):
    """A Markov chain that mixes `rank` topics: its bigram matrix has that rank."""
    rng = np.random.default_rng(seed)
    topics = np.cumsum(rng.dirichlet(np.full(vocab, 0.05), rank), axis=1)
    mixtures = np.cumsum(rng.dirichlet(np.full(rank, 0.3), vocab), axis=1)
    state, chain = rng.integers(0, vocab, lanes), []
    for _ in range(size // lanes):
        topic = (rng.random((lanes, 1)) > mixtures[state]).sum(1).clip(max=rank - 1)
        state = (rng.random((lanes, 1)) > topics[topic]).sum(1).clip(max=vocab - 1)
        chain.append(state)
    return np.stack(chain, axis=1).ravel().astype(np.int32)


@given(
    st.lists(st.integers(0, 6), min_size=6, max_size=60),
    st.integers(2, 5),
    st.integers(1, 5),
    st.sampled_from(["contexts", "tokens"]),
)
def test_gram_is_that_of_the_dense_rows(ids, order, partitions, weighting):
    tokens = np.array(ids)
    k = dense(tokens, order, 7)
    n = k.sum(1, keepdims=True)
    rows = k / n * (np.sqrt(n) if weighting == "tokens" else 1)
    got = ngrams.gram(tokens, order, 7, weighting, partitions=partitions)
    np.testing.assert_allclose(got, rows.T @ rows, atol=1e-12)
    counts = list(ngrams.count(tokens, order, 7, partitions=partitions))
    assert sum(part.shape[0] for part in counts) == len(k)
    assert sum(part.sum() for part in counts) == k.sum()


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("weighting", ["contexts", "tokens"])
def test_spectrum_agrees_with_a_dense_svd(order, weighting):
    tokens = zipf_tokens(3000, 300)
    reference = np.linalg.svd(
        ngrams._context_matrix(tokens, order, 300, weighting).toarray(), compute_uv=False
    )
    got = ngrams._singular_values(ngrams.gram(tokens, order, 300, weighting))
    reference = np.append(reference, np.zeros(300))[:300]
    np.testing.assert_allclose(w_error(got), w_error(reference), atol=1e-10)


def test_rows_of_the_context_matrix_sum_to_one():
    matrix = ngrams._context_matrix(zipf_tokens(2000, 50), 3, 50)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_one_partition_or_sixteen_give_the_same():
    tokens = zipf_tokens(20_000, 200)
    whole = ngrams.gram(tokens, 3, 200, partitions=1)
    in_turn = ngrams.gram(tokens, 3, 200, partitions=16)
    reference = w_error(ngrams._singular_values(whole))
    np.testing.assert_allclose(in_turn, whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(w_error(ngrams._singular_values(in_turn)), reference, atol=1e-12)


def test_contexts_beyond_64_bits_are_counted():
    tokens = zipf_tokens(4000, 60) * 997  # 16 bits an id, 80 for five of them
    counts = next(ngrams.count(tokens, 5, 60_000, partitions=1))
    expected = dense(tokens // 997, 5, 60)
    assert counts.shape[0] == len(expected)
    assert sorted(counts.data) == sorted(expected[expected > 0])


def test_unbiased_gram_has_the_true_expectation():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(6, 0.5), 6)
    total = np.zeros((6, 6))
    runs = 400
    for _ in range(runs):
        follow = np.array([[rng.choice(6, p=row) for _ in range(3)] for row in rows])
        # Each context three times; targets say what follows.
        tokens = np.append(np.repeat(np.arange(6), 3), 0)
        got = ngrams.gram(tokens, 2, 6, unbiased=True, targets=follow.ravel())
        total += got / runs
    np.testing.assert_allclose(total, rows.T @ rows, atol=0.12)
    assert abs(np.trace(total) - (rows**2).sum()) < 0.12


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(ngrams, "BLOCK", 1 << 15)
    monkeypatch.setattr(ngrams, "PARTITION", 1 << 15)
    peaks = []
    for size in (100_000, 800_000):
        np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, size))
        tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
        tracemalloc.start()
        ngrams.gram(tokens, 3, 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_leading_values_and_their_rest_give_the_same_w_error():
    tokens = zipf_tokens(5000, 120)
    full = ngrams._singular_values(ngrams.gram(tokens, 3, 120))
    leading = ngrams._leading_values(ngrams._context_matrix(tokens, 3, 120), 20)
    np.testing.assert_allclose(leading[:20], full[:20], rtol=1e-9)
    np.testing.assert_allclose(w_error(leading)[-21:], w_error(full)[-21:], atol=1e-9)


@pytest.mark.parametrize(
    ("rank", "vocab", "size"), [(5, 200, 200_000), (20, 400, 400_000), (40, 400, 1_000_000)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_split_half_recovers_a_planted_rank(rank, vocab, size, seed):
    tokens = low_rank_tokens(rank, vocab, size, seed)
    split = ngrams.split_half(np.split(tokens, 2), 2, vocab)
    assert abs(split.rank - rank) <= 0.1 * rank
    # The plain spectrum, on the same tokens, sees noise in every direction.
    plain = ngrams._singular_values(ngrams.gram(tokens, 2, vocab, "tokens"))
    assert (plain > 0).sum() > 2 * rank
    assert split.floor[rank // 2] <= split.ceiling[rank // 2]


def test_a_shuffled_text_supports_one_dimension():
    tokens = low_rank_tokens(20, 400, 400_000)
    shuffled = np.random.default_rng(0).permutation(tokens)
    assert ngrams.split_half(np.split(shuffled, 2), 2, 400).rank <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: ngrams.gram(t[:2], 3, 9), "order = 3"),
        (lambda t: ngrams.gram(t, 1, 9), "order = 1"),
        (lambda t: ngrams.gram(t, 2, 5), "token id 8: outside the vocabulary of 5"),
        (lambda t: ngrams.gram(t - 1, 2, 9), "token id -1"),
        (lambda t: ngrams.gram(t, 2, 9, "rows"), "weighting = 'rows'"),
        (lambda t: ngrams.gram(t, 2, 2**20), "vocab_size = 1048576: its spectrum needs 17592"),
        (lambda t: ngrams.errors(t[:9], 2, 9, unbiased=True), "all singular values are zero"),
        (lambda t: ngrams.split_half([t[:9], t[:9]], 2, 9), "in one half no token follows"),
        (lambda t: ngrams.errors(t, 2, 9, leading=9), "`k` must be an integer"),
    ],
)
def test_bad_input_is_named_with_its_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.tile(np.arange(9), 2))


def test_an_empty_partition_adds_nothing():
    tokens = np.array([0, 1, 0, 1, 0])
    whole, parts = ngrams.gram(tokens, 2, 2), ngrams.gram(tokens, 2, 2, partitions=64)
    np.testing.assert_array_equal(whole, parts)


def test_the_memory_limit_follows_the_machine(monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match="at most 7 tokens"):
        ngrams.gram(np.arange(9), 2, 9)


def test_tokens_may_be_any_integers():
    grams = [ngrams.gram(np.array([0, 1, 2, 0, 1], kind), 2, 3) for kind in (np.uint16, np.int64)]
    assert all((a == b).all() for a, b in pairwise(grams))


def test_needed_rank_is_the_first_that_reaches_the_level():
    errors = np.array([1.0, 0.5, 0.3, 0.2])
    assert [ngrams.needed_rank(errors, level) for level in (1.0, 0.4, 0.3, 0.1)] == [0, 2, 2, None]


def test_errors_are_those_of_a_dense_svd_whole_and_leading():
    tokens = zipf_tokens(3000, 100)
    dense_values = np.linalg.svd(ngrams._context_matrix(tokens, 3, 100).toarray(), compute_uv=False)
    expected = np.sqrt(1 - np.append(0, np.cumsum(dense_values**2)) / np.sum(dense_values**2))
    whole = ngrams.errors(tokens, 3, 100)
    np.testing.assert_allclose(whole[:99], expected[:99], atol=1e-9)
    np.testing.assert_allclose(ngrams.errors(tokens, 3, 100, leading=20), whole[:21], atol=1e-9)


def test_a_study_is_its_parts():
    pieces = np.split(low_rank_tokens(5, 60, 20_000), 10)
    counted, shuffled, split = ngrams.study(pieces, 2, 60, seed=1)
    tokens = np.concatenate(pieces)
    np.testing.assert_allclose(counted, ngrams.errors(tokens, 2, 60, weighting="tokens"))
    assert shuffled[5] != counted[5]
    np.testing.assert_allclose(split.ceiling, ngrams.split_half(pieces, 2, 60).ceiling)


def test_a_share_that_follows_the_law_is_carried_exactly():
    sizes = np.array([500, 1000, 2000, 4000])
    exact = sizes / (1 + np.exp(1 - 0.2 * np.log(sizes)))
    noisy = (exact * [1.01, 0.99, 0.99, 1.01]).tolist()
    sizes, exact = sizes.tolist(), exact.tolist()
    assert ngrams.carried(sizes, exact, 50_000).value == pytest.approx(
        50_000 / (1 + np.exp(1 - 0.2 * np.log(50_000)))
    )
    found = ngrams.carried(sizes, noisy, 50_000)
    assert found.low < 50_000 / (1 + np.exp(1 - 0.2 * np.log(50_000))) < found.high
    assert found.n == 4
