"""Make pythia-evals.csv from the result files that EleutherAI published for its Pythia runs.

Use: python book/data/compile.py PATH/TO/pythia/evals
The folder is `evals` of EleutherAI/pythia at commit a19eecb807ec2c79a39ebf18108816e6ffffc1d5.
"""

import csv
import json
import re
import sys
from pathlib import Path

COLUMNS = ["model", "batch", "step", "tokens", "shots", "task", "metric", "value", "stderr"]
SIZES = ["70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
# Those that the chapters use: LAMBADA and the multiple-choice tasks, without MMLU's 57 and
# CrowS-Pairs' 22.
TASKS = [
    "lambada_openai",
    "sciq",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "winogrande",
    "logiqa",
    "wsc",
]
METRICS = ["acc", "acc_norm", "ppl"]
FULL_BATCH = 2**21  # tokens a step of the main runs; a name such as 160m-0.5MtokBS tells another
FOLDER = re.compile(r"pythia-(?P<size>[\d.]+[mb])(?:-bf16)?(?:-(?P<batch>[\d.]+)MtokBS)?")


def rows(path: Path, run: re.Match) -> list[list]:
    """The table's rows of one result file; numbers stay the text that the file has."""
    content = json.loads(path.read_text(), parse_float=str, parse_int=str)
    step = int(re.search(r"step(\d+)\.json", path.name)[1])
    batch = int(float(run["batch"]) * 2**20) if run["batch"] else FULL_BATCH
    origin = [f"pythia-{run['size']}", batch, step, step * batch, content["config"]["num_fewshot"]]
    found = []
    for task in TASKS:
        measured = content["results"][task]
        for metric in METRICS:
            if metric in measured:
                found.append(
                    [*origin, task, metric, measured[metric], measured[f"{metric}_stderr"]]
                )
    return found


def order(row: list) -> tuple:
    """Runs by size, the larger batch first, then by shots, task, metric and step."""
    model, batch, step, _, shots, task, metric, *_ = row
    size = SIZES.index(model.removeprefix("pythia-"))
    return size, -batch, shots, TASKS.index(task), METRICS.index(metric), step


def main(folder: Path, target: Path) -> int:
    """Write the table. Deduplicated runs are left out; returns the number of rows."""
    table = []
    for path in sorted(folder.glob("pythia-v1/*/**/*.json")):
        run = FOLDER.fullmatch(path.relative_to(folder).parts[1])
        if run:
            table += rows(path, run)
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(table, key=order))
    return len(table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1]), Path(__file__).with_name("pythia-evals.csv")), "rows")
