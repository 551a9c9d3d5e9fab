"""`headbound measure`: checkpoints from folders, a file and a hub in one table, resumable."""

import json

import jsonschema
import pandas as pd
import pytest
import tiny
import torch
from huggingface_hub import constants
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import headbound.cli  # noqa: F401 (its commands join the app)
from companion.cli import app
from headbound import corpus, hidden, models
from headbound.measure import checkpoint, many, spectrum

ASKED = ["--texts", "4", "--length", "32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tiny.save(tmp_path / "llama")
    tiny.save(tmp_path / "gpt2", "gpt2", tied=True)
    tiny.save_gguf(tmp_path / "one.gguf")
    texts = (f"{place} {tiny.TEXT * 30}" for place in range(400))
    (tmp_path / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measure(*arguments: str):
    return CliRunner().invoke(app, ["measure", *arguments])


def test_folders_and_a_file_give_the_chapters_numbers(folder):
    names = ["llama", "gpt2", "one.gguf"]
    places = ["--json", "out.json", "--csv", "out.csv"]
    done = measure(*names, "--text", "text.txt", *ASKED, *places)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == names
    said = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(said["schema"])
    jsonschema.validate(said, said["schema"])
    table = pd.read_csv(folder / "out.csv")
    assert list(table) == many.COLUMNS
    held_out = corpus.split(corpus.load("text.txt"))[1]
    for place, name in enumerate(names):
        network, tokenizer = models.load(name, device="cpu")
        rows = hidden.sequences(tokenizer, held_out, 4, 32)
        row = said["rows"][place]
        expected = checkpoint.measure(network, rows, tokenizer)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            logits = network(rows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["logit_mean"] == pytest.approx(logits.mean().item(), abs=1e-5)
        assert table.loss[place] == pytest.approx(row["loss"])


def test_a_second_run_measures_nothing_and_a_new_model_alone(folder, monkeypatch):
    first = measure("llama", "--text", "text.txt", *ASKED)
    asked = []
    monkeypatch.setattr(checkpoint, "head", lambda weight: asked.append(len(weight)) or {})
    again = measure("llama", "--text", "text.txt", *ASKED)
    assert (again.output, asked) == (first.output, [])


def test_what_fails_is_named_and_what_was_measured_is_kept(folder):
    (folder / "out.csv").write_text("earlier")
    done = measure("nothing", "llama", "--text", "text.txt", *ASKED, "--csv", "out.csv")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "1 of 2 not measured: nothing: model = 'nothing'" in done.stderr
    assert "no table is written, what was measured is kept" in done.stderr
    assert (folder / "out.csv").read_text() == "earlier"
    assert len(list((folder / "cache" / "measured").glob("*.json"))) == 1


def test_heads_alone(folder):
    done = measure("llama", "--head-only", "--json", "out.json")
    assert done.exit_code == 0, done.output
    said = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    jsonschema.validate(said, said["schema"])
    (row,) = said["rows"]
    weight = models.head_weight(*models.load("llama", device="cpu"))
    values = torch.linalg.svdvals(weight.double()).numpy()
    assert row["singular_entropy"] == pytest.approx(spectrum.singular_entropy(values), abs=1e-6)
    mean = weight.double().mean(0)
    share = len(weight) * mean.square().sum() / weight.double().square().sum()
    assert row["mean_row_share"] == pytest.approx(share.item(), rel=1e-5)
    assert (row["vocabulary"], row["d"], row["loss"]) == (tiny.VOCAB, 16, None)


def test_the_json_and_the_csv_have_a_place_each(folder):
    done = measure("llama", "--json", "out", "--csv", "./out")
    expected = "headbound: json = out, csv = out: one place for both; name another\n"
    assert (done.exit_code, done.output) == (2, expected)


def test_revisions_are_of_hub_ids(folder):
    done = measure("llama", "--revisions", "step1", "--text", "text.txt", *ASKED)
    assert (done.exit_code, done.output) == (
        2,
        "headbound: revisions = step1: of Hub ids only, none is given\n",
    )


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows(folder):
    wide = tiny.fast_tokenizer()
    wide.add_tokens([f"<t{number}>" for number in range(40)])
    tiny.save(folder / "wide")
    wide.save_pretrained(folder / "wide")
    texts = (f"{place} <t39> {tiny.TEXT * 30}" for place in range(400))
    (folder / "wide.txt").write_text("\n\n".join(texts), encoding="utf-8")
    done = measure("wide", "--text", "wide.txt", *ASKED)
    assert done.exit_code == 2
    assert "1 of 1 not measured: wide: token ids from" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_gradient_is_that_of_the_models_own_logits(folder):
    """Granite divides its logits by eight."""
    tiny.save(folder / "granite", "granite")
    done = measure("granite", "--text", "text.txt", *ASKED, "--json", "out.json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads((folder / "out.json").read_text(encoding="utf-8"))["rows"]
    network, tokenizer = models.load("granite", device="cpu")
    rows = hidden.sequences(tokenizer, corpus.split(corpus.load("text.txt"))[1], 4, 32)
    with torch.no_grad():
        logits = network(rows[:, :-1]).logits.double().flatten(0, 1)
    g = logits.softmax(1)
    g[torch.arange(len(g)), rows[:, 1:].flatten()] -= 1
    basis = torch.linalg.svd(network.lm_head.weight.double(), full_matrices=False).U
    share = (g @ basis).square().sum() / g.square().sum()
    assert row["gradient_kept"] == pytest.approx(share.item(), rel=1e-4)


def test_a_model_reads_all_of_a_passage_but_its_last_token(folder):
    limit = models.load("llama", device="cpu")[0].config.max_position_embeddings
    options = ["--text", "text.txt", "--texts", "1", "--length"]
    assert measure("llama", *options, str(limit + 1)).exit_code == 0
    told = measure("llama", *options, str(limit + 2))
    assert told.exit_code == 2
    assert f"llama: length = {limit + 2}: the model reads {limit} tokens at most" in told.stderr
