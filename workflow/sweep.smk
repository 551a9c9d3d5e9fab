# The sweep: one job audits a model, one measures a checkpoint. Included by the Snakefile; by itself:
#     snakemake --snakefile workflow/sweep.smk --cores 2 --keep-going
import os

import sweep

SWEEP_FILE = os.environ.get("HEADBOUND_SWEEP", "workflow/sweep.yaml")
SWEEP, SWEEP_SETTINGS = sweep.read(SWEEP_FILE)
SWEEP_MODELS = {SWEEP_SETTINGS.folder(model).name: model for model in SWEEP}
SWEEP_FOLDER = SWEEP_SETTINGS.folder("").as_posix()
SWEEP_RESULTS = [f"{SWEEP_FOLDER}/{name}/{revision}.json" for name, model in SWEEP_MODELS.items() for revision in SWEEP[model]]


wildcard_constraints:
    revision=r"step\d+",


rule sweep:
    input:
        SWEEP_RESULTS,


rule audit_model:
    output:
        SWEEP_FOLDER + "/{model}/audit.json",
    params:
        file=SWEEP_FILE,
        model=lambda wildcards: SWEEP_MODELS[wildcards.model],
        steps=lambda wildcards: SWEEP[SWEEP_MODELS[wildcards.model]],
    retries: 2
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "python -m headbound.cli sweep {params.file:q} audit {params.model}"


# A kill leaves no half file (they are moved into place), so a result is either whole or to be made again.
rule measure_checkpoint:
    input:
        SWEEP_FOLDER + "/{model}/audit.json",
    output:
        SWEEP_FOLDER + "/{model}/{revision}.json",
    params:
        file=SWEEP_FILE,
        model=lambda wildcards: SWEEP_MODELS[wildcards.model],
        made_by=SWEEP_SETTINGS.made_by(),
        keep="--keep" if os.environ.get("HEADBOUND_KEEP") else "",
    retries: 2
    resources:
        mem_mb=lambda wildcards, attempt: 12000 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,
        gpu=1 if SWEEP_SETTINGS.whole else 0,
    shell:
        "python -m headbound.cli sweep {params.file:q} measure {params.model} {wildcards.revision} {params.keep}"
