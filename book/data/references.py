"""Make references.csv, the known models of chapter 9: measure some again, or all.

Use: python book/data/references.py [NAME…]
"""

import json
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GPTNeoXForCausalLM

from companion import diagnosis
from headbound import cache, pythia
from headbound.train import archive, changes, tunnel
from headbound.train.step import Trainer

NOTEBOOK = Path("notebooks/09_diagnose.ipynb")
TABLE = Path("book/data/references.csv")
SMOL = "SmolLM2-135M-Instruct, 4-bit"
TUNNEL = "wind tunnel"
CITED = "cited"
PACKAGES = ("headbound", "torch", "transformers")
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
    """A reference as `models.load` takes it, trained here where need be."""
    if name.startswith(SMOL):
        return "smollm2-135m"
    width = int(re.search(r"d = (\d+)", name)[1])
    share = 1.0  # of the training
    if "early" in name:
        share = EARLY
    if "untrained" in name:
        share = 0.0
    if "long run" in name:
        return long_run(width, share)
    table = tunnel.train([8, 16, 32, 64], 2000)
    own = table[table["hidden_size"] == width]
    return own.loc[own["step"] >= share * own["step"].max(), "path"].iloc[0]


def long_run(width: int, share: float) -> str:
    """The archive's baseline of seed 0, trained here to this share of its steps."""
    recipe = changes.recipe("baseline", width, 0)
    name = f"long-run-{width}" if share == 1 else f"long-run-{width}-early"
    folder = cache.cache_dir() / "references" / name
    until = round(share * recipe.steps)
    archive.run("baseline", width, 0, folder / "tables", folder / "state", until)
    shape = (recipe.vocab_size, recipe.context, recipe.held_out_texts)
    tokenizer = tunnel.corpus(recipe.source, *shape).tokenizer
    trainer = Trainer(GPTNeoXForCausalLM(recipe.config(tokenizer.eos_token_id)), recipe)
    (state,) = folder.glob("state/*/training.pt")
    trainer.restore(torch.load(state)[1])
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(name: str) -> pd.DataFrame:
    """A reference's rows: a number of its report each, with its origin."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "report.json"
        asked = {"model": model(name), **PARAMETERS[name]}
        diagnosis.report(NOTEBOOK, data.with_suffix(".html"), asked, data)
        found = json.loads(data.read_text(encoding="utf-8"))
    made = found["provenance"]
    rows = []
    for finding in found["findings"]:
        number = finding["measured"]
        if finding["key"] == "diagnose.verdict":
            verdict = number
            continue
        parts = number if isinstance(number, dict) else {"value": number}
        rows.append({"quantity": finding["quantity"], **parts})
    return pd.DataFrame(rows).assign(
        reference=name,
        verdict=verdict,
        text=found["parameters"]["text"],
        fingerprint=made["sample: fingerprint of the text"],
        tokens=int(made["sample: tokens learnt from"].replace(",", "")),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        source=f'python book/data/references.py "{name}"',
        **{package: made[package] for package in PACKAGES},
    )


def cited() -> pd.DataFrame:
    """The paper's models: the end of Figure 5, the last layers of Figure 2, half ranks of 6b."""
    entropy = "singular entropy of the head (nats)"
    heads = pythia.figures("5").assign(series="Pythia", quantity=entropy)
    cosines = pythia.figures("2").assign(quantity="mean cosine, last layer")
    curves = pd.concat([heads, cosines], ignore_index=True)
    groups = curves.groupby(["figure", "series", "curve"], sort=False)
    last = curves.loc[groups["x"].idxmax()]
    table = last.assign(reference=last["series"] + "-" + last["curve"], value=last["y"])
    for name, curve in pythia.figures("6b").groupby("curve", sort=False):
        ordered = curve.sort_values("x")
        at_half = np.interp(ordered["x"].max() / 2, ordered["x"], ordered["y"])
        end = ordered.iloc[-1:]
        end = end.assign(reference=name, quantity="nats lost, head cut to half")
        # Both ends of the difference are read, each with the error of one.
        end = end.assign(value=at_half - end["y"], error=np.sqrt(2) * end["error"])
        table = pd.concat([table, end])
    table["low"] = table["value"] - table["error"]
    table["high"] = table["value"] + table["error"]
    table["source"] = "Godey et al. 2024, Figure " + table["figure"]
    columns = ["reference", "quantity", "value", "low", "high", "source"]
    return table[columns].reset_index(drop=True).assign(verdict=CITED, n=1)


def main() -> None:
    """Measure the references named, or all, and put their rows in the place of the old ones."""
    names = sys.argv[1:] or list(PARAMETERS)
    wrong = [name for name in names if name not in PARAMETERS]
    if wrong:
        raise SystemExit(f"headbound: {wrong} are none of {', '.join(PARAMETERS)}")
    for name in names:
        rows = measure(name)
        known = pd.read_csv(TABLE)
        others = known[known["reference"].ne(name) & known["verdict"].ne(CITED)]
        own = pd.concat([others, rows])
        places = own["reference"].map(list(PARAMETERS).index)
        own = own.iloc[np.argsort(places, kind="stable")]
        with cache.replacing(TABLE) as temporary:
            pd.concat([own, cited()]).to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
