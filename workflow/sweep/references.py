"""`python -m sweep.references [NAME…]` makes book/data/references.csv, read in chapter 9."""

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import torch
import transformers

from companion import diagnosis
from companion.execute import execute
from headbound import cache, pythia
from headbound.train import archive, changes, tunnel
from headbound.train.step import Recipe, Trainer

NOTEBOOK = Path("notebooks/09_diagnose.ipynb")
TABLE = Path("book/data/references.csv")
SMOL = "SmolLM2-135M-Instruct, 4-bit"
TUNNEL = "wind tunnel"
CITED = "cited"
PARAMETERS: dict[str, dict[str, Any]] = {
    SMOL: {},
    f"{SMOL}, head cut to 64": {"planted_rank": 64},
    f"{TUNNEL}, d = 16": {},
    f"{TUNNEL}, d = 64": {},
    f"{TUNNEL}, d = 64, early": {},
    f"{TUNNEL}, d = 64, head cut to 8": {"planted_rank": 8},
    f"{TUNNEL}, d = 64, untrained": {},
    f"{TUNNEL}, long run, d = 8": {},
    f"{TUNNEL}, long run, d = 8, early": {},
    f"{TUNNEL}, long run, d = 16": {},
}
EARLY = 0.1  # of the training's steps


def model(name: str) -> str:
    """A reference as `models.load` takes it, trained or drawn at random here where need be."""
    if name.startswith(SMOL):
        return "smollm2-135m"
    if "untrained" in name:
        return untrained()
    width = int(name.split("d = ")[1].split(",")[0])
    if "long run" in name:
        return long_run(width, "early" in name)
    table = tunnel.train([8, 16, 32, 64], 2000)
    own = table[table["hidden_size"] == width]
    early = own[own["step"] >= EARLY * own["step"].max()]
    return own["path"].iloc[-1] if "early" not in name else early["path"].iloc[0]


def untrained() -> str:
    """A model of the wind tunnel as it was drawn, with its tokenizer."""
    folder = cache.cache_dir() / "references" / "tunnel-untrained"
    if not folder.exists():
        config = Recipe(hidden_size=64, steps=1).config(end_of_text=0)
        transformers.set_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tunnel.corpus()[0].save_pretrained(folder)
    return str(folder)


def long_run(width: int, early: bool) -> str:
    """The archive's baseline of seed 0, trained here to its end or to the first tenth of it."""
    recipe = changes.recipe("baseline", width, 0)
    name = f"long-run-{width}"
    until = None
    if early:
        name += "-early"
        until = round(EARLY * recipe.steps)
    folder = cache.cache_dir() / "references" / name
    archive.run("baseline", width, 0, folder / "tables", folder / "state", until)
    shape = (recipe.vocab_size, recipe.context, recipe.held_out_texts)
    tokenizer = tunnel.corpus(recipe.source, *shape).tokenizer
    network = changes.build("baseline")(recipe.config(tokenizer.eos_token_id))
    trainer = Trainer(network, recipe)
    (state,) = folder.glob("state/*/training.pt")
    trainer.restore(torch.load(state)[1])
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(name: str) -> pd.DataFrame:
    """A reference's rows, from its report."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "report.ipynb"
        parameters = {"model": model(name), **PARAMETERS[name]}
        execute(NOTEBOOK, output, "laptop", parameters)
        report = nbformat.read(output, as_version=4)
        return told(name, diagnosis.facts(report))


def told(name: str, found: dict[str, Any]) -> pd.DataFrame:
    """A line a number of a report, each with its origin."""
    made = found["provenance"]
    rows = []
    for finding in found["findings"]:
        number = finding["measured"]
        if finding["key"] == "diagnose.verdict":
            verdict = number
        elif isinstance(number, dict):
            rows.append({"quantity": finding["quantity"], **number})
        else:
            rows.append({"quantity": finding["quantity"], "value": number})
    return pd.DataFrame(rows).assign(
        reference=name,
        verdict=verdict,
        text=found["parameters"]["text"],
        fingerprint=made["sample: fingerprint of the text"],
        tokens=int(made["sample: tokens learnt from"].replace(",", "")),
        headbound=made["headbound"],
        torch=made["torch"],
        transformers=made["transformers"],
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        source=f'python -m sweep.references "{name}"',
    )


def cited() -> pd.DataFrame:
    """The paper's models: the end of Figure 5, the last layers of Figure 2, half ranks of 6b."""
    entropy = "singular entropy of the head (nats)"
    heads = pythia.figures("5").assign(series="Pythia", quantity=entropy, figure="5")
    cosines = pythia.figures("2").assign(quantity="mean cosine, last layer", figure="2")
    curves = pd.concat([heads, cosines], ignore_index=True)
    groups = curves.groupby(["figure", "series", "curve"], sort=False)
    last = curves.loc[groups["x"].idxmax()]
    named = last["series"] + "-" + last["curve"]
    rows = [*zip(named, last["quantity"], last["y"], last["error"], last["figure"], strict=True)]
    for name, curve in pythia.figures("6b").groupby("curve", sort=False):
        ordered = curve.sort_values("x")
        at_half = np.interp(ordered["x"].max() / 2, ordered["x"], ordered["y"])
        lost = at_half - ordered["y"].iloc[-1]
        reading = ordered["error"].iloc[-1]
        error = float(np.hypot(reading, reading))
        rows.append((name, "nats lost, head cut to half", lost, error, "6b"))
    table = pd.DataFrame(rows, columns=["reference", "quantity", "value", "error", "figure"])
    table["low"] = table["value"] - table["error"]
    table["high"] = table["value"] + table["error"]
    table["source"] = "Godey et al. 2024, Figure " + table["figure"]
    return table.drop(columns=["error", "figure"]).assign(verdict=CITED, n=1)


def main() -> None:
    """Measure the references named, or all, and put their rows in the place of the old ones."""
    names = sys.argv[1:] or list(PARAMETERS)
    wrong = [name for name in names if name not in PARAMETERS]
    if wrong:
        raise SystemExit(f"headbound: {wrong} are none of {', '.join(PARAMETERS)}")
    for name in names:
        rows = measure(name)
        known = pd.read_csv(TABLE)
        replaced = known["reference"].eq(name) | known["verdict"].eq(CITED)
        table = pd.concat([known[~replaced], rows, cited()])
        order = {reference: place for place, reference in enumerate(PARAMETERS)}
        places = table["reference"].map(order).fillna(len(order))
        table = table.iloc[np.argsort(places, kind="stable")]
        with cache.replacing(TABLE) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
