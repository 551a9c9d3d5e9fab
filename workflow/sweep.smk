# The sweep: one job audits a model, one measures a checkpoint. Included by the Snakefile; by itself:
#     snakemake --snakefile workflow/sweep.smk --cores 2 --keep-going
import os
from pathlib import Path

import headbound
import yaml
from headbound.cache import cache_dir

SWEEP_FILE = os.environ.get("HEADBOUND_SWEEP", "workflow/sweep.yaml")
SWEEP = yaml.safe_load(Path(SWEEP_FILE).read_text())
SWEEP_MODELS = {model.replace("/", "--"): model for model in SWEEP["models"]}
SWEEP_FOLDER = cache_dir() / "sweeps" / SWEEP.get("name", "paper")
SWEEP_MADE_BY = {"version": headbound.__version__, **{k: v for k, v in SWEEP.items() if k not in ("models", "steps")}}
SWEEP_RESULTS = [
    str(SWEEP_FOLDER / model / f"step{step}.json") for model in SWEEP_MODELS for step in sorted(SWEEP["steps"])
]


wildcard_constraints:
    revision=r"step\d+",


rule sweep:
    input:
        SWEEP_RESULTS,


rule audit_model:
    output:
        str(SWEEP_FOLDER / "{model}" / "audit.json"),
    params:
        model=lambda wildcards: SWEEP_MODELS[wildcards.model],
        steps=SWEEP["steps"],
    retries: 2
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "python -m sweep {SWEEP_FILE} audit {params.model}"


# A kill leaves no half file (they are moved into place), so a result is either whole or to be made again.
rule measure_checkpoint:
    input:
        str(SWEEP_FOLDER / "{model}" / "audit.json"),
    output:
        str(SWEEP_FOLDER / "{model}" / "{revision}.json"),
    params:
        model=lambda wildcards: SWEEP_MODELS[wildcards.model],
        made_by=SWEEP_MADE_BY,
        keep="--keep" if os.environ.get("HEADBOUND_KEEP") else "",
    retries: 2
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 12000 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,
        gpu=1 if SWEEP.get("whole", True) else 0,
    shell:
        "python -m sweep {SWEEP_FILE} measure {params.model} {wildcards.revision} {params.keep}"
