"""The diagnosis: its rule, its experiment on planted cases, and the whole report on architectures new to the book."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pages
import pytest
import references
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from headbound.measure import bottleneck, lowrank
from headbound.stats import Estimate

ROOT = Path(__file__).resolve().parent.parent

WORDS = [tiny.TEXT.split()[i % 18] for i in np.random.default_rng(0).integers(0, 18, 60_000)]
PARAGRAPHS = [" ".join(WORDS[i : i + 500]) for i in range(0, len(WORDS), 500)]


def planted(
    useful: int, seed: int = 0, d: int = 16, vocab: int = 60
) -> tuple[lowrank.Examples, lowrank.Examples, lowrank.Head]:
    """States of which `useful` dimensions decide the next token, in two parts, and the head that decides so."""
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(rng.standard_normal((vocab, d)) * (np.arange(d) < useful)).float()
    states = rng.standard_normal((9000, d)).astype(np.float32)
    logits = torch.from_numpy(states) @ A.T
    targets = torch.multinomial(
        logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed)
    )[:, 0].numpy()
    parts = [
        lowrank.Examples(states[i], targets[i], np.arange(len(targets[i])) // 50)
        for i in (slice(6000), slice(6000, 9000))
    ]
    return (*parts, lowrank.Head(A, torch.eye(d)))


SURE = Estimate(1.0, 0.9, 1.1, 9)


def test_a_model_that_does_not_beat_token_frequencies_is_not_judged():
    train, test, head = planted(useful=16)
    assert bottleneck.ahead(lowrank.token_losses(test, [head])[0], train, test).low > 0
    blind = lowrank.Head(torch.zeros_like(head.A), head.B)
    lead = bottleneck.ahead(lowrank.token_losses(test, [blind])[0], train, test)
    assert bottleneck.verdict(SURE, SURE, lead, 1.0, 0.01) == "undecided"


@pytest.mark.parametrize("seed", range(3))
def test_a_head_cut_on_purpose_is_a_bottleneck_and_the_same_head_uncut_is_not(seed):
    train, test, head = planted(useful=16, seed=seed)
    whole, control = bottleneck.lift(train, test, head, [(16, 24), (4, 12)], sampled=0, batch=64)
    assert control.low > 0.01
    assert whole.high < 0.01
    assert bottleneck.verdict(whole, control, SURE, 1.0, 0.01) == "no bottleneck found"
    cut = lowrank.Head(head.A * (torch.arange(16) < 4), head.B)
    (gain,) = bottleneck.lift(train, test, cut, [(4, 12)], sampled=0, batch=64)
    assert bottleneck.verdict(gain, control, SURE, 0.25, 0.01) == "bottleneck"


def test_a_narrow_head_that_leaves_out_nothing_useful_is_no_bottleneck():
    train, test, head = planted(useful=4)
    (gain,) = bottleneck.lift(train, test, head, [(4, 12)], sampled=0, batch=64)
    assert gain.high < 0.01


def test_states_that_say_nothing_gain_nothing():
    train, test, head = planted(useful=16)
    rng, silent = np.random.default_rng(1), lowrank.Head(torch.zeros_like(head.A), head.B)
    noise = [x._replace(hidden_states=rng.permutation(x.hidden_states)) for x in (train, test)]
    (gain,) = bottleneck.lift(*noise, silent, [(4, 12)], sampled=0, batch=64)
    assert gain.high < 0.01


@given(st.tuples(*[st.floats(-1, 1)] * 4), st.floats(0, 1))
def test_the_verdict_follows_its_rule(bounds, used):
    gain, control = (
        Estimate((a + b) / 2, min(a, b), max(a, b), 9) for a, b in (bounds[:2], bounds[2:])
    )
    found = bottleneck.verdict(gain, control, SURE, used, 0.01)
    assert (found == "bottleneck") == (gain.low > 0.01)
    assert (found == "no bottleneck found") == (
        gain.high < 0.01 and control.low > 0.01 and used >= 0.9
    )


def test_an_interval_that_is_unknown_decides_nothing():
    nan = Estimate(1.0, float("nan"), float("nan"), 1)
    assert bottleneck.verdict(nan, nan, SURE, 1.0, 0.01) == "undecided"
    assert bottleneck.verdict(SURE, SURE, nan, 1.0, 0.01) == "undecided"


def test_ranks_that_cannot_be_are_refused():
    train, test, head = planted(useful=4)
    for pair in ((0, 4), (17, 20), (4, 4), (4, 33)):
        with pytest.raises(ValueError, match="choose ranks there"):
            bottleneck.lift(train, test, head, [pair])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_working_rank_is_the_planted_one_whatever_the_weights_are_rounded_to(dtype):
    train, _, head = planted(useful=6)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    weight = (head.A @ turn).to(dtype).float()
    train = train._replace(hidden_states=train.hidden_states @ turn.numpy())
    assert int(torch.linalg.matrix_rank(weight)) == (6 if dtype == torch.float32 else 16)
    whole = lowrank.low_rank(weight, 16, lowrank.covariance(train.hidden_states))
    assert bottleneck.working_rank(whole, train) == 6


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("gpt2", True),
        ("llama", False),
        ("gemma", True),
        ("neox", False),
        ("gptj", False),
        ("granite", True),
    ],
)
def test_the_readout_gives_the_models_own_logits(kind, tied):
    network, ids = tiny.network(kind, tied), torch.arange(40).view(2, 20)
    if kind == "gptj":
        torch.nn.init.normal_(network.lm_head.bias)
    head = bottleneck.readout(network, tiny.fast_tokenizer(), ids)
    data = bottleneck.examples(network, torch.cat([ids, ids[:, :1]], 1), head.bias)
    with torch.inference_mode():
        logits = network(ids).logits[..., : len(head.weight)].flatten(0, 1)
    mine = torch.from_numpy(np.array(data.hidden_states)) @ head.weight.T
    assert head.missed < 1e-5
    assert head.bias == (kind == "gptj")
    torch.testing.assert_close(logits.log_softmax(1), mine.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_logits_that_a_model_bends_are_noticed():
    network = tiny.network("gemma2", True)
    assert (
        bottleneck.readout(network, tiny.fast_tokenizer(), torch.arange(40).view(2, 20)).missed
        > 1e-3
    )


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no LM head; use a causal language model"):
        bottleneck.readout(tiny.network("bert"), tiny.fast_tokenizer(), torch.arange(4).view(1, 4))


def test_passages_come_from_different_texts_and_begin_as_the_tokenizer_begins():
    network, plain = tiny.network("llama"), tiny.fast_tokenizer()
    learn, judge = bottleneck.sample(network, plain, PARAGRAPHS, (12, 4), 30)
    assert learn.shape == (12, 31)
    assert judge.shape == (4, 31)
    assert not {tuple(row.tolist()) for row in learn} & {tuple(row.tolist()) for row in judge}
    starting = tiny.starting_tokenizer()
    assert (
        bottleneck.sample(network, starting, PARAGRAPHS, (12, 4), 30)[0][:, 0].tolist() == [0] * 12
    )


def test_a_text_or_model_too_short_is_named():
    network, tokenizer = tiny.network("llama"), tiny.fast_tokenizer()
    with pytest.raises(ValueError, match="give more text, or ask for fewer or shorter ones"):
        bottleneck.sample(network, tokenizer, PARAGRAPHS[:3], (12, 4), 30)
    with pytest.raises(ValueError, match="no LM head; use a causal language model"):
        bottleneck.sample(tiny.network("bert"), tokenizer, PARAGRAPHS, (12, 4), 30)
    with pytest.raises(ValueError, match="length = 65: this model reads 64 tokens at most"):
        bottleneck.sample(network, tokenizer, PARAGRAPHS, (12, 4), 65)


def test_the_target_rank_says_what_it_reduced():
    tokenizer = tiny.fast_tokenizer()
    rank, read, merged = bottleneck.target_rank(tokenizer, PARAGRAPHS, vocab=24, groups=3)
    counts = np.bincount(np.concatenate(tokenizer(PARAGRAPHS)["input_ids"]))
    assert read == counts.sum()
    assert merged == pytest.approx(1 - np.sort(counts)[-23:].sum() / counts.sum())
    # Words drawn one by one: within a word its letters follow each other, between words nothing does.
    assert 1 <= rank.value <= 24
    assert rank.n == 3


SMALL = [
    "length=24",
    "passages=48",
    "judged=16",
    "rank_vocab=64",
    "rank_tokens=20000",
    "gradient_tokens=200",
]


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """The command, in a folder of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "companion.diagnosis", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "llama.gguf"])
def test_the_report_on_a_folder_and_a_file_opens_with_the_network_cut(kind, tmp_path):
    if kind.endswith(".gguf"):
        tiny.save_gguf(tmp_path / kind)
    else:
        tiny.save(tmp_path / kind, kind, tied=kind != "llama")
    (tmp_path / "mine.txt").write_text("\n\n".join(PARAGRAPHS))
    done = run(tmp_path, kind, "--text", "mine.txt", "--set", *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    made = str(nbformat.read(tmp_path / "report.ipynb", 4))
    assert any(f"**{verdict.capitalize()}.**" in made for verdict in bottleneck.VERDICTS)
    assert "<script" not in (tmp_path / "report.html").read_text()
    if pages.CHROMIUM:
        with pages.browser() as chromium, pages.served(tmp_path) as address:
            assert pages.problems(chromium, address, "report.html", 1280) == []


def test_what_does_not_fit_ends_in_one_line(tmp_path):
    tiny.save(tmp_path / "bert", "bert")
    done = run(tmp_path, "bert")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no LM head; use a causal language model" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_the_bundled_references_hold_the_planted_cases():
    known = bottleneck.references().drop_duplicates("reference").set_index("reference")["verdict"]
    assert set(known.index) == set(references.PARAMETERS)
    assert known[f"{references.SMOL}, head cut to 64"] == "bottleneck"
    assert known[references.SMOL] != "bottleneck"


def test_a_bundled_reference_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{references.TUNNEL}, d = 64, untrained"
    kept = bottleneck.references().query("reference == @name").set_index("quantity")
    again = references.measure(name).set_index("quantity")
    assert set(kept.index) == set(again.index)
    if (kept["fingerprint"] != again["fingerprint"]).any():
        pytest.skip(
            "other package versions, so another text: only requirements.lock's can be compared"
        )
    for quantity, row in kept.iterrows():
        spread = 0 if np.isnan(row["low"]) else (row["high"] - row["low"]) / 2
        assert abs(again["value"][quantity] - row["value"]) <= 0.02 * abs(row["value"]) + spread, (
            quantity
        )
