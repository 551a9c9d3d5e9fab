"""The command `headbound`: what `companion.cli` offers every book, and this book's measurements."""

from pathlib import Path
from typing import Annotated

import typer

from companion.cli import Preset, Set, assigned, command, main

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSIS = ROOT / "notebooks" / "09_diagnose.ipynb"
SWEEP = Path("workflow/sweep.yaml")
Model = Annotated[
    str,
    typer.Argument(help="A folder, a .gguf file, a Hub id, or smollm2-135m.", show_default=False),
]
Text = Annotated[str, typer.Option(help="A UTF-8 file, docstrings[:PACKAGE], or hf:NAME.")]
Revision = Annotated[str, typer.Option(help="A branch, tag or commit of a Hub id.")]
File = Annotated[Path, typer.Argument(help="The sweep: models, steps and settings (YAML).")]


@command
def diagnose(
    model: Model,
    text: Text = "docstrings",
    revision: Revision = "",
    values: Set = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    data: Annotated[Path | None, typer.Option("--json", help="The numbers too, as JSON.")] = None,
) -> None:
    """Is the head the bottleneck of this model on this text? A page with measures and verdict."""
    from companion import diagnosis

    asked = {"model": model, "text": text, "revision": revision, **assigned(values)}
    diagnosis.report(DIAGNOSIS, output, asked, data)
    print(f"The report is ready: open {output}")


@command
def measure(
    model: Annotated[list[str], typer.Argument(help="Each: a folder, a .gguf file, a Hub id.")],
    revisions: Annotated[str, typer.Option(help="Of each Hub id, such as step1,step512.")] = "",
    text: Text = "docstrings",
    texts: Annotated[int, typer.Option(min=1, help="Held-out passages.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    head_only: Annotated[bool, typer.Option(help="The head alone: little to fetch.")] = False,
    data: Annotated[Path | None, typer.Option("--json", help="The rows, and their schema.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The rows as a table.")] = None,
) -> None:
    """Measure many checkpoints alike, a line each: loss, anisotropy, head, gradient.

    What is measured is kept: the same command goes on where it was stopped.
    """
    from companion import execute
    from headbound.measure import many

    for place in filter(None, (data, csv)):
        execute.check_place(place.expanduser())
    if data and csv and data.expanduser().resolve() == csv.expanduser().resolve():
        raise ValueError(f"json = {data}, csv = {csv}: one place for both; name another")
    asked = revisions.replace(",", " ").split()
    frame = many.run(model, asked, None if head_only else text, texts, length, _head_on_hub)
    if data:
        execute.write_whole(data.expanduser(), many.to_json(frame))
    if csv:
        execute.write_whole(csv.expanduser(), frame.to_csv(index=False))


def _head_on_hub(model: str, revision: str):
    """A Hub id's head without rows that no token has; its own bytes alone are fetched."""
    from sweep import hub

    found = hub.head(model, revision, tries=3)  # a reader soon learns of a silent hub
    return found.weight[: hub.tokenizer(found.listed).get_vocab_size()]


@command
def suite(preset: Preset = "laptop", values: Set = None) -> None:
    """Train what is missing of the wind tunnel's small models, with its chapter's parameters."""
    from companion import execute
    from headbound.train import tunnel

    notebook = ROOT / "notebooks" / "01_wind_tunnel.ipynb"
    asked = execute.of_preset(notebook, preset) | assigned(values)
    chosen = execute.defaults(notebook) | execute.check_parameters(notebook, asked)
    names = ("vocab_size", "checkpoints", "held_out_texts", "seed")
    options = {name: chosen[name] for name in names}
    tunnel.train(chosen["hidden_sizes"], chosen["steps"], source=chosen["text"], **options)


@command
def tunnel(
    arm: Annotated[str, typer.Argument(help="What is changed, such as 'weight decay 0'.")],
    width: Annotated[int, typer.Argument(min=1, help="The hidden size: 8, 16, 32.")],
    seed: Annotated[int, typer.Argument(min=0)],
    folder: Annotated[Path, typer.Option(help="For the table.")] = ROOT / "book" / "archive",
) -> None:
    """Make a long run of the archive again, or go on where it was stopped."""
    from headbound.cache import cache_dir
    from headbound.train import archive, changes

    if arm not in changes.ARMS:
        raise ValueError(f"arm = {arm}: must be one of {'; '.join(changes.ARMS)}")
    archive.run(arm, width, seed, folder, cache_dir() / "tunnel")


@command
def sweep(
    file: File,
    task: Annotated[str, typer.Argument(help="left, audit or measure.")] = "left",
    model: Annotated[str, typer.Argument(help="For audit and measure.")] = "",
    revision: Annotated[str, typer.Argument(help="For measure.")] = "",
    keep: Annotated[bool, typer.Option(help="Leave the checkpoint in the cache.")] = False,
) -> None:
    """What is left of a sweep over checkpoints, or one job of it; Snakemake runs them all."""
    from sweep import measure, read

    table, settings = read(file)
    if task == "left":
        todo = measure.left(table, settings)
        total = sum(len(revisions) for revisions in table.values())
        print(f"{total - len(todo)} of {total} checkpoints measured")
        print(*(f"left: {model} {revision}" for model, revision in todo), sep="\n")
        return
    known = model in table and (task == "audit" or revision in table[model])
    if task not in ("audit", "measure") or not known:
        fix = f"give left, or audit or measure, and what {file} has"
        raise ValueError(f"{task} {model} {revision}: {fix}")
    rows = measure.audited(model, table[model], settings)
    if task == "measure":
        measure.measure(model, revision, settings, rows, keep)


@command
def plan(
    file: File = SWEEP,
    tflops: Annotated[float, typer.Option(min=1e-3, help="Sustained, in the sweep's dtype.")] = 20,
    tflops64: Annotated[float, typer.Option(min=1e-3, help="Sustained in float64.")] = 5,
    megabytes: Annotated[
        float, typer.Option(min=1e-3, help="A second from the Hub, all jobs together.")
    ] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="At once.")] = 2,
) -> None:
    """What a sweep costs before it starts: jobs, bytes, GPU hours, disk."""
    from sweep import plan, read

    rates = plan.Rates(tflops, tflops64, megabytes, jobs)
    print(plan.words(*read(file), rates))


if __name__ == "__main__":
    main()
