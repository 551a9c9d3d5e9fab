"""The diagnosis: its rule, its experiment on planted cases, the report on new architectures."""

import json
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pages
import pandas as pd
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from companion import diagnosis
from headbound import pythia
from headbound.measure import bottleneck, lowrank
from headbound.stats import Estimate

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "09_diagnose.ipynb"
REFERENCES = runpy.run_path(str(pythia.DATA / "references.py"))  # makes the table
SMOL = REFERENCES["SMOL"]

WORDS = [tiny.TEXT.split()[i % 18] for i in np.random.default_rng(0).integers(0, 18, 60_000)]
PARAGRAPHS = [" ".join(WORDS[i : i + 500]) for i in range(0, len(WORDS), 500)]


def planted(
    useful: int, seed: int = 0, d: int = 16, vocab: int = 60
) -> tuple[lowrank.Examples, lowrank.Examples, lowrank.Head]:
    """States of which `useful` dimensions decide the next token, in two parts, and the head."""
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
    blind = Estimate(-0.1, -0.2, 0.1, 9)
    assert bottleneck.verdict(SURE, SURE, blind, 1.0, 0.01)[0] == "undecided"


def lifted(train, test, head, pairs):
    return bottleneck.lift(train, test, head, pairs, batch=64)


@pytest.mark.parametrize("seed", range(3))
def test_a_head_cut_on_purpose_is_a_bottleneck_and_the_same_head_uncut_is_not(seed):
    train, test, head = planted(useful=16, seed=seed)
    whole, control = lifted(train, test, head, [(16, 24), (4, 12)])
    assert control.low > 0.01
    assert whole.high < 0.01
    assert bottleneck.verdict(whole, control, SURE, 1.0, 0.01)[0] == "no bottleneck found"
    cut = lowrank.Head(head.A * (torch.arange(16) < 4), head.B)
    (gain,) = lifted(train, test, cut, [(4, 12)])
    assert bottleneck.verdict(gain, control, SURE, 0.25, 0.01)[0] == "bottleneck"


def test_a_narrow_head_that_leaves_out_nothing_useful_is_no_bottleneck():
    train, test, head = planted(useful=4)
    (gain,) = lifted(train, test, head, [(4, 12)])
    assert gain.high < 0.01


def test_states_that_say_nothing_gain_nothing():
    train, test, head = planted(useful=16)
    rng, silent = np.random.default_rng(1), lowrank.Head(torch.zeros_like(head.A), head.B)
    noise = [x._replace(hidden_states=rng.permutation(x.hidden_states)) for x in (train, test)]
    (gain,) = lifted(*noise, silent, [(4, 12)])
    assert gain.high < 0.01


def test_the_same_rank_twice_gains_exactly_nothing():
    train, test, head = planted(useful=16)
    (gain,) = bottleneck.lift(train, test, head, [(8, 8)])
    assert gain[:3] == (0, 0, 0)


@given(st.tuples(*[st.floats(-1, 1)] * 4), st.floats(0, 1))
def test_the_verdict_follows_its_rule(bounds, used):
    gain, control = (
        Estimate((a + b) / 2, min(a, b), max(a, b), 9) for a, b in (bounds[:2], bounds[2:])
    )
    found, why = bottleneck.verdict(gain, control, SURE, used, 0.01)
    assert (found == "bottleneck") == (gain.low > 0.01)
    assert (found == "no bottleneck found") == (
        gain.high < 0.01 and control.low > 0.01 and used >= 0.9
    )
    assert why.endswith(".")
    assert bottleneck.verdict(gain, control, SURE, used, 0.01, possible=False)[0] == (
        "no rank bottleneck is possible"
    )


@given(st.floats(0.001, 0.05), st.floats(-0.2, 0.2), st.floats(0.001, 0.1))
def test_the_margins_that_the_reason_names_give_the_same_verdict(margin, middle, half):
    gain = Estimate(middle, middle - half, middle + half, 9)
    control = Estimate(0.3, 0.25, 0.35, 9)
    found, _ = bottleneck.verdict(gain, control, SURE, 1.0, margin)
    bounds = {
        "bottleneck": (0, gain.low),
        "no bottleneck found": (max(gain.high, 0), control.low),
    }
    if found in bounds:
        low, high = bounds[found]
        for share in (0.01, 0.5, 0.99):
            moved = low + share * (high - low)
            assert bottleneck.verdict(gain, control, SURE, 1.0, moved)[0] == found


def test_an_interval_that_is_unknown_decides_nothing():
    nan = Estimate(1.0, float("nan"), float("nan"), 1)
    assert bottleneck.verdict(nan, nan, SURE, 1.0, 0.01)[0] == "undecided"
    assert bottleneck.verdict(SURE, SURE, nan, 1.0, 0.01)[0] == "undecided"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_working_rank_is_the_planted_one_whatever_the_weights_are_rounded_to(dtype):
    train, _, head = planted(useful=6)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    weight = (head.A @ turn).to(dtype).float()
    train = train._replace(hidden_states=train.hidden_states @ turn.numpy())
    assert int(torch.linalg.matrix_rank(weight)) == (6 if dtype == torch.float32 else 16)
    whole = lowrank.low_rank(weight, 16, lowrank.covariance(train.hidden_states))
    found = bottleneck.working_rank(whole, train.spread(2000))
    assert found.value == 6
    assert found.low <= 6 <= found.high
    assert found.n == 5


def test_tokens_are_spread_over_all_texts():
    data, _, _ = planted(useful=4)
    some = data.spread(240)
    assert len(some.targets) == 240
    assert set(some.texts) == set(data.texts)
    assert len(data.spread(10**6).targets) == len(data.targets)


def test_the_target_rank_says_what_it_reduced():
    tokenizer = tiny.fast_tokenizer()
    rank, read, merged = bottleneck.target_rank(tokenizer, PARAGRAPHS, vocab=24, groups=3)
    counts = np.bincount(np.concatenate(tokenizer(PARAGRAPHS)["input_ids"]))
    assert read == counts.sum()
    assert merged == pytest.approx(1 - np.sort(counts)[-23:].sum() / counts.sum())
    # Words drawn one by one: letters of a word follow each other, between words nothing does.
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


def report(folder: Path, model: str, **parameters: int) -> dict:
    """The report's facts; the page is `report.html` there."""
    settings = dict(part.split("=") for part in SMALL)
    numbers = {name: int(value) for name, value in settings.items()} | parameters
    text = folder / "mine.txt"
    text.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    asked = {"model": str(folder / model), "text": str(text), **numbers}
    diagnosis.report(NOTEBOOK, folder / "report.html", asked, folder / "report.json")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "llama.gguf", "m|b<i>c$d$"])
def test_the_report_on_a_folder_and_a_file_opens_with_the_network_cut(kind, tmp_path):
    if kind.endswith(".gguf"):
        tiny.save_gguf(tmp_path / kind)
    else:
        tiny.save(tmp_path / kind, "llama" if "|" in kind else kind, tied=kind == "gpt2")
    found = report(tmp_path, kind)
    (verdict,) = (x for x in found["findings"] if x["key"] == "diagnose.verdict")
    assert verdict["measured"] in bottleneck.VERDICTS
    assert found["answer"].startswith(f"**{verdict['measured'].capitalize()}.**")
    assert {x["key"] for x in found["findings"]} >= {"diagnose.perplexity", "diagnose.verdict"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<i>c" not in page
    assert page.index('class="first"') < page.index("<details>")
    if pages.CHROMIUM:
        with pages.browser() as chromium, pages.served(tmp_path) as address:
            for width in (1280, 390):
                assert pages.problems(chromium, address, "report.html", width) == []


@pytest.mark.slow
def test_a_vocabulary_smaller_than_the_width_has_no_rank_bottleneck(tmp_path):
    config = transformers.LlamaConfig(
        **{**tiny.ROTARY, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 64}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tiny.fast_tokenizer().save_pretrained(tmp_path / "wide")
    found = report(tmp_path, "wide")
    assert found["findings"][0]["measured"] == "no rank bottleneck is possible"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("report.ipynb", "executed notebook .* need a place each"),
        ("folder", "it is a folder; name a file"),
        ("file/report.html", "name another file"),
        ("/proc/report.html", "name another file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_run(
    output, message, tmp_path, monkeypatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnosis.execute, "execute", None)
    with pytest.raises(ValueError, match=message):
        diagnosis.report(NOTEBOOK, Path(output), {})
    with pytest.raises(ValueError, match="it is a folder; name a file"):
        diagnosis.report(NOTEBOOK, Path("a.html"), {}, Path("folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def cell(kind: str, source: str, *tags: str, **outputs: dict) -> nbformat.NotebookNode:
    made = nbformat.v4.new_markdown_cell(source)
    if kind == "code":
        data, metadata = outputs["data"], {"companion": outputs.get("about", {})}
        shown = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
        made = nbformat.v4.new_code_cell(source, outputs=[shown])
    made.metadata["tags"] = list(tags)
    return made


def test_the_page_puts_the_summary_first_and_folds_the_rest():
    said = {"data": {"text/markdown": "All is well."}, "about": {"answer": "All is well."}}
    notebook = nbformat.v4.new_notebook(
        cells=[
            cell("markdown", "# Is it?\n\nWe ask."),
            cell("markdown", "for the book alone", "book"),
            cell("markdown", "Some words.\n\n## How <fast>?\n\nSee {term}`this <that>`."),
            cell("code", "x", "summary", **said),
        ]
    )
    page = diagnosis.page(notebook)
    places = [page.index(words) for words in ("Is it?</h1>", "All is well.", "We ask.")]
    assert places == sorted(places)
    assert page.count("<details>") == 2
    assert "How &lt;fast&gt;?</h2>" in page
    assert "See this." in page
    assert "for the book alone" not in page
    assert diagnosis.facts(notebook)["answer"] == "All is well."


def test_the_bundled_references_hold_the_planted_cases_and_the_papers_models():
    known = bottleneck._references("", 0.0)
    cited = known["verdict"] == "cited"
    verdicts = known[~cited].drop_duplicates("reference").set_index("reference")["verdict"]
    assert set(verdicts.index) <= set(REFERENCES["PARAMETERS"])
    assert verdicts[f"{SMOL}, head cut to 64"] == "bottleneck"
    assert verdicts[SMOL] != "bottleneck"
    shown = known[cited].reset_index(drop=True)[["reference", "quantity", "value"]]
    cited = REFERENCES["cited"]()[["reference", "quantity", "value"]]
    pd.testing.assert_frame_equal(shown, cited, rtol=1e-5)


def test_a_model_is_not_its_own_company():
    known = bottleneck._references("", 0.0)
    row = known[(known["reference"] == SMOL) & (known["quantity"] == "perplexity")]
    same = bottleneck._references(row["fingerprint"].iloc[0], row["value"].iloc[0])
    assert SMOL in set(known["reference"])
    assert SMOL not in set(same["reference"])
    other = bottleneck._references("another text", row["value"].iloc[0])
    assert SMOL in set(other["reference"])


def test_a_number_lies_between_its_neighbours(monkeypatch):
    known = pd.DataFrame({"reference": ["a", "b"], "verdict": "", "quantity": "x", "value": [1, 3]})
    monkeypatch.setattr(bottleneck, "_references", lambda *_: known)
    mine = {"x": 2.0, "perplexity": Estimate(5.0, 4.0, 6.0, 3)}
    row = bottleneck.places(mine, "").set_index("quantity").loc["x"]
    assert row["known models"] == "1 of 2"
    assert row["neighbours"] == "above a (1), below b (3)"
    assert row["the paper's neighbours"] == "none is known"
