"""Measure the models that chapter 9 compares with: runs its notebook on each, keeps its findings as a table."""

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import transformers
from diagnosis import NOTEBOOK, ROOT
from execute import execute

from headbound import cache
from headbound.train import tunnel

TABLE = ROOT / "src" / "headbound" / "references.csv"
SMOL, TUNNEL = "SmolLM2-135M-Instruct, 4-bit", "wind tunnel"
PARAMETERS: dict[str, dict[str, Any]] = {
    SMOL: {},
    f"{SMOL}, head cut to 64": {"planted_rank": 64},
    **{f"{TUNNEL}, d = {d}": {} for d in (16, 64)},
    f"{TUNNEL}, d = 64, head cut to 8": {"planted_rank": 8},
    f"{TUNNEL}, d = 64, untrained": {},
}


def model(name: str) -> str:
    """A reference as `models.load` takes it, trained or drawn at random here where need be."""
    if name.startswith(SMOL):
        return "smollm2-135m"
    if "untrained" not in name:
        width = int(name.split("d = ")[1].split(",")[0])
        return tunnel.train([8, 16, 32, 64], 2000).query(f"hidden_size == {width}")["path"].iloc[-1]
    folder = cache.cache_dir() / "references" / "tunnel-untrained"
    if not folder.exists():
        config = transformers.GPTNeoXConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
            },
            **{
                "vocab_size": 2048,
                "max_position_embeddings": 128,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
        )
        transformers.set_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tunnel.corpus()[0].save_pretrained(folder)
    return str(folder)


def measure(name: str) -> pd.DataFrame:
    """A reference's rows: a line a finding of its report, each with its provenance."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "report.ipynb"
        execute(NOTEBOOK, output, "laptop", {"model": model(name), **PARAMETERS[name]})
        cells = nbformat.read(output, 4).cells
    about = [
        o.metadata["headbound"]
        for c in cells
        for o in c.get("outputs", [])
        if "headbound" in o.get("metadata", {})
    ]
    (findings,) = (kept["findings"] for kept in about if "findings" in kept)
    (made,) = (kept["provenance"] for kept in about if "provenance" in kept)
    source = {"text": "docstrings", "fingerprint": made["sample: fingerprint of the text"]}
    source |= {"tokens": made["sample: tokens learnt from"].replace(",", "")}
    source |= {key: made[key] for key in ("headbound", "torch", "transformers")}
    source |= {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f'python workflow/references.py "{name}"',
    }
    verdict = next(f["measured"] for f in findings if f["key"] == "diagnose.verdict")
    numbers = [
        {"quantity": f["quantity"], **f["measured"]}
        for f in findings
        if isinstance(f["measured"], dict)
    ]
    return pd.DataFrame(
        [{"reference": name, "verdict": verdict, **row, **source} for row in numbers]
    )


def main() -> None:
    """Measure the references named, or all, and put their rows in the place of the old ones."""
    for name in sys.argv[1:] or PARAMETERS:
        if name not in PARAMETERS:
            raise SystemExit(f"headbound: {name!r} is none of {', '.join(PARAMETERS)}")
        rows, known = measure(name), pd.read_csv(TABLE)
        table = pd.concat([known[known["reference"] != name], rows])
        order = {reference: place for place, reference in enumerate(PARAMETERS)}
        table = table.sort_values("reference", key=lambda column: column.map(order), kind="stable")
        with cache.replacing(TABLE) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
