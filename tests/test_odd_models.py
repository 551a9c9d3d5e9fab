"""Chapters and the report on models as they are found: narrow, with zero rows, tokens like HTML."""

from pathlib import Path

import nbformat
import pytest
import tiny
import torch
import transformers
from test_bottleneck import PARAGRAPHS, report
from test_workflow import ROOT

from companion import execute

pytestmark = pytest.mark.slow
ODD = ["<!--", "<script>", "</table>", "<b>"]


def odd_model(folder: Path) -> Path:
    """Sixteen dimensions; a padding token's row is zero; the heaviest rows have tokens like HTML."""
    tokenizer = tiny.fast_tokenizer()
    tokenizer.add_tokens(ODD)
    network = tiny.network("llama")
    with torch.no_grad():
        network.lm_head.weight[tiny.VOCAB : tiny.VOCAB + len(ODD)] += 3
        network.get_input_embeddings().weight[5] = 0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shown(tmp_path: Path, name: str, **parameters: object) -> str:
    asked = {"model": str(odd_model(tmp_path / "odd")), **parameters}
    output = tmp_path / "out.ipynb"
    execute.execute(ROOT / "notebooks" / f"{name}.ipynb", output, "laptop", asked)
    found = [o for cell in nbformat.read(output, 4).cells for o in cell.get("outputs", [])]
    pages = [o["data"].get("text/html", "") for o in found if "data" in o]
    # An explorable is the book's own script, over numbers.
    return "".join(page for page in pages if "hb-explore" not in page)


def test_chapter_3_on_sixteen_dimensions_escapes_its_tokens(tmp_path):
    page = shown(tmp_path, "03_head_spectrum", gaussians=1, groups=2)
    assert "&lt;!--" in page
    assert not [token for token in ODD[:2] if token in page]


def test_chapter_2_goes_on_at_a_row_that_is_zero(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    sizes = {"n_texts": 16, "length": 32, "pairs": 500, "resamples": 20}
    assert "<table" in shown(tmp_path, "02_anisotropy", text=str(text), encoder="", **sizes)


def test_a_report_on_an_embedding_narrower_than_the_states(tmp_path):
    config = tiny.CONFIGS["opt"]()
    config.word_embed_proj_dim = 8
    config.do_layer_norm_before = False
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tiny.fast_tokenizer().save_pretrained(tmp_path / "opt")
    found = report(tmp_path, "opt")
    assert {x["key"] for x in found["findings"]} >= {"diagnose.perplexity", "diagnose.verdict"}
