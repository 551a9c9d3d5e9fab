import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import GPTNeoXForCausalLM

from headbound.measure import checkpoint, spectrum
from headbound.train import archive, changes, tunnel

ARCHIVE = Path("book/archive")
TINY = {
    "vocab_size": 300,
    "layers": 1,
    "context": 16,
    "batch_size": 4,
    "checkpoints": 6,
    "held_out_texts": 8,
    "tokens_a_parameter": 0.3,
}
RUNS = sorted(ARCHIVE.glob("*-s*.csv"))


@pytest.mark.parametrize("arm", changes.ARMS)
def test_every_arm_trains_and_is_measured(source, tmp_path, arm):
    options = {"source": source} | TINY
    if "epochs" in changes.ARMS[arm]:
        options["tokens_a_parameter"] = 2.0  # more passes than windows make no sense
    table = archive.run(arm, 8, 0, tmp_path / "tables", tmp_path / "state", **options)
    assert table["arm"].unique() == [arm]
    assert np.isfinite(table.drop(columns="arm").to_numpy(float)).all()
    assert table["rise"].min() >= 0
    assert table["step"].is_monotonic_increasing
    (kept,) = tmp_path.glob("tables/*.json")
    record = json.loads(kept.read_text())
    assert record["finished"]
    assert record["steps_done"] == table["step"].iloc[-1] == record["recipe"]["steps"]


def test_a_broken_run_ends_as_an_unbroken_one(source, tmp_path, stopped):
    def run(name):
        return archive.run("float16", 8, 3, tmp_path / name, tmp_path / name, source=source, **TINY)

    whole = run("whole")
    stopped(lambda: run("broken"), at=19)
    record = json.loads((tmp_path / "broken" / "float16-d8-s3.json").read_text())
    assert not record["finished"]
    assert run("broken").equals(whole)


def test_numbers_are_what_they_say(source):
    recipe = changes.recipe("baseline", 8, 0, source=source, **TINY)
    text = tunnel.corpus(source, 300, 16, 8)
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(recipe.config(text.tokenizer.eos_token_id))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    numbers, texts = archive._measure(model, text.held_out)
    reference = checkpoint.measure(model, text.held_out)
    assert numbers["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    each = [checkpoint.measure(model, row[None])["loss"] for row in text.held_out]
    assert texts == pytest.approx(each, rel=1e-5)
    assert numbers["output_rank"] == pytest.approx(reference["output_rank"], rel=1e-4)
    assert numbers["entropy"] == pytest.approx(reference["singular_entropy"], rel=1e-5)
    for where in ("before", "after"):
        expected = reference[f"anisotropy_{where}_norm"]
        assert numbers[f"cosine_{where}_norm"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weight = model.lm_head.weight.detach()
    states = model.base_model(text.held_out[:, :-1]).last_hidden_state.detach().flatten(0, 1)
    logits = (states @ weight.T).double()
    centred = weight - weight.mean(0)
    assert numbers["logit_mean"] == pytest.approx(float(logits.mean()), rel=1e-4)
    assert numbers["logit_sd"] == pytest.approx(float(logits.var(1).mean().sqrt()), rel=1e-2)
    share = 1 - float(centred.square().sum() / weight.square().sum())
    assert numbers["mean_share"] == pytest.approx(share, rel=1e-4)
    expected = spectrum.singular_entropy(spectrum.singular_values(centred))
    assert numbers["entropy_centred"] == pytest.approx(expected, rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(states.mean(0), weight.mean(0), 0)
    assert numbers["mean_alignment"] == pytest.approx(float(cosine), abs=1e-5)


def test_steps_are_dense_early_and_even_late():
    steps = archive._mixed_steps(35439, 60)
    assert len(steps) in (60, 61)
    assert steps[0] == 0
    assert steps[-1] == 35439
    late = [step for step in steps if step > 18000]
    assert max(np.diff(late)) < 1000
    assert sum(step < 400 for step in steps) > 8


def test_every_arm_has_a_prediction_of_every_account():
    kept = yaml.safe_load((ARCHIVE / "predictions.yaml").read_text())
    assert set(kept["predictions"]) == set(changes.ARMS)
    words = {"more", "less", "same", "appears", "absent", "open"}
    for of_arm in kept["predictions"].values():
        assert set(of_arm) == set(kept["accounts"])
        assert {word for signs in of_arm.values() for word in signs.values()} <= words


def archived(path):
    """A table, what stands beside it, and the recipe that its arm has today."""
    table = pd.read_csv(path)
    record = json.loads(path.with_suffix(".json").read_text())
    arm, d, seed = table[["arm", "hidden_size", "seed"]].iloc[0]
    return table, record, changes.recipe(arm, int(d), int(seed))


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_an_archived_table_is_whole(path):
    table, record, recipe = archived(path)
    assert record["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert table["step"].iloc[-1] == record["steps_done"]
    assert record["finished"] == (record["steps_done"] == recipe.steps)
    steps = archive._mixed_steps(recipe.steps, recipe.checkpoints)
    assert list(table["step"]) == [step for step in steps if step <= record["steps_done"]]
    expected = [recipe.learning_rate(step) for step in table["step"]]
    assert table["rate"].to_numpy() == pytest.approx(expected, rel=1e-4)
    assert table["loss"].iloc[0] == pytest.approx(math.log(1024 / (1 - recipe.unused)), abs=0.05)


def test_every_archived_run_says_where_it_comes_from():
    origins = archive.load().drop_duplicates("command")
    assert len(origins) == len(RUNS)
    assert origins["command"].str.fullmatch(r"headbound tunnel ('[^']+'|[\w-]+) \d+ \d").all()
    assert origins["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert (origins["core_hours"] > 0.02).all()


SLICE = 16  # steps that are trained again
TOLERANCE = 1e-3  # of each column's largest number; rounding differs between processors
ONE_OF_A_KIND = {path.stem[: -len("-s0")]: path for path in RUNS if path.stem.endswith("-s0")}


@pytest.mark.parametrize("path", ONE_OF_A_KIND.values(), ids=list(ONE_OF_A_KIND))
def test_a_slice_of_each_kind_comes_out_again(path, tmp_path):
    table, _, recipe = archived(path)
    text = archive.first_text()
    steps = SLICE if recipe.batch_size <= 16 else SLICE // 2
    arm = table["arm"].iloc[0]
    found = archive.run(arm, recipe.hidden_size, 0, tmp_path, tmp_path, steps, text)
    assert len(found) > 1
    assert archive.differences(found, table).max() < TOLERANCE
    changed = table.assign(loss=table["loss"] * (1 + 2 * TOLERANCE))
    assert archive.differences(found, changed).max() > TOLERANCE


def test_tables_without_a_common_step_cannot_be_compared():
    one, other = (pd.DataFrame({"step": [step], "loss": [1.0]}) for step in (1, 2))
    with pytest.raises(ValueError, match="no step in common"):
        archive.differences(one, other)


def test_the_first_text_is_what_the_first_steps_read():
    text = archive.first_text()
    assert len(text.tokenizer) == changes.VOCAB
    assert text.held_out.shape == (256, 129)
    for arm in ("baseline", "batch x 8, equal tokens", "100 epochs"):
        recipe = changes.recipe(arm, 8, 0)
        windows = tunnel.batch(text.stream, 5, recipe)
        # Real text has no long runs of token 0, which stands for what was not kept.
        assert (windows == 0).float().mean() < 0.05
    later = tunnel.batch(text.stream, 20_000, changes.recipe("baseline", 8, 0))
    assert (later == 0).float().mean() > 0.5
