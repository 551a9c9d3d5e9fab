import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from headbound import pythia

SHARED = Path(__file__).parents[2] / "shared" / "pythia" / "evals" / "pythia-v1"
CHECKSUMS = {
    "paper-figures.csv": "c9fc8ef24badc6c1ad408290abd71466b6c7143ff5525b6255cea4fcdc1473f9",
    "pythia-evals.csv": "7bb31952076eead8d7ddf67db2da78600e568ac7519bd56fefa7f8cadf0ee8e7",
    "pythia-audit.csv": "58622221d9df82c1eeb0c438a932f536520635e9ddba12c82de7444984a164bb",
}


@pytest.mark.parametrize("name", CHECKSUMS)
def test_the_cited_data_are_as_they_were_checked(name):
    path = pythia.DATA / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == CHECKSUMS[name]
    assert path.stat().st_size < 2e6


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="EleutherAI's own files do not lie beside the repository"
)
def test_fifty_cells_agree_with_the_published_files_to_the_last_digit():
    files = published_files()
    for row in pythia.evaluations().sample(50, random_state=7).itertuples():
        results = files[row.model, row.batch, row.step, row.shots]
        assert results[row.task][row.metric] == row.value
        assert results[row.task][f"{row.metric}_stderr"] == row.stderr


def published_files():
    """The results of each file, by what its own configuration says that it measured."""
    found = {}
    for path in SHARED.rglob("*.json"):
        content = json.loads(path.read_text())
        arguments = dict(part.split("=") for part in content["config"]["model_args"].split(","))
        name = arguments["pretrained"].removeprefix("EleutherAI/pythia-v1.1-").removesuffix("-bf16")
        size, _, small = name.partition("-")
        batch = float(small.removesuffix("MtokBS") or 2) * 2**20
        step = int(arguments["revision"].removeprefix("step"))
        found[f"pythia-{size}", batch, step, content["config"]["num_fewshot"]] = content["results"]
    return found


def test_the_table_holds_what_its_readme_says():
    table = pythia.evaluations()
    assert not table.duplicated(["model", "batch", "step", "shots", "task", "metric"]).any()
    assert (table["tokens"] == table["step"] * table["batch"]).all()
    runs = table[["model", "batch", "shots"]].drop_duplicates()
    assert runs.groupby(["shots", runs["batch"] == 2**21]).size().to_dict() == {
        (0, True): 8,
        (5, False): 5,
        (5, True): 5,
    }
    final = table[table["step"] == table.groupby(["model", "batch"])["step"].transform("max")]
    assert final["tokens"].between(299.8e9, 299.9e9 + 1e8).all()


def test_accuracies_typed_in_from_the_published_files():
    def best_and_final(model):
        rows = pythia.evaluations(model=model, shots=0, task="lambada_openai", metric="acc")
        return round(rows["value"].max(), 3), round(rows.sort_values("step")["value"].iloc[-1], 3)

    assert best_and_final("pythia-70m") == (0.253, 0.185)
    assert best_and_final("pythia-160m") == (0.399, 0.328)
    assert best_and_final("pythia-1b") == (0.574, 0.562)


def test_parameters_and_names():
    assert pythia.parameters("pythia-70m") == 70_426_624
    assert pythia.parameters("pythia-70m", embeddings=False) == 18_915_328
    assert (
        pythia.parameters("EleutherAI/pythia-1b-0.5MtokBS")
        == pythia.parameters("1B")
        == 1_011_781_632
    )
    assert pythia.nominal("pythia-1.4b") == 1.4e9
    for read in (pythia.nominal, pythia.parameters):
        with pytest.raises(ValueError, match="its size is unknown"):
            read("gpt2")


def test_figures_read_twice_agree():
    """Table 1 prints two points of Figure 3; figures that show one thing twice must agree."""
    wikitext = pythia.figures("3", curve="160M", y_name="Wikitext word perplexity")
    assert wikitext["y"].min() == pytest.approx(30.47, abs=0.05)
    assert wikitext["y"].iloc[-1] == pytest.approx(33.4, abs=0.1)

    curves = pythia.figures("1a").groupby("curve")["y"]
    for series, read in {"best": curves.min(), "final": curves.last()}.items():
        points = pythia.figures("1b", series=series).set_index("curve")["y"]
        for model, loss in read.items():
            assert points[model] == pytest.approx(loss, abs=0.008)

    ranked = pythia.figures("6b", curve="Pythia-1B", how="vertex").set_index("x")["y"]
    for row in pythia.figures("8").itertuples():
        rank = int(row.series.removeprefix("rank "))
        assert ranked[rank] == pytest.approx(row.y, abs=0.005)


def test_the_axis_of_figure_1b_counts_the_numbers_in_the_models_names():
    """6 N T of the final checkpoints, N = 70e6 for 70M, T at step 140,000, to a pixel."""
    final = pythia.figures("1b", series="final")
    tokens = 140_000 * pythia.STEP_TOKENS
    named = final["x"] / (6 * final["curve"].map(pythia.nominal) * tokens)
    counted = final["x"] / (6 * final["curve"].map(pythia.parameters) * tokens)
    assert np.abs(named - 1).max() < 0.006
    assert np.abs(counted - 1).max() > 0.012


def test_a_figure_or_a_checkout_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no such curve"):
        pythia.figures("4")
    monkeypatch.setattr(pythia, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="in a checkout"):
        pythia.evaluations()
