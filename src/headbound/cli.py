"""The command `headbound`: what `companion.cli` offers every book, and this book's measurements."""

from pathlib import Path
from typing import Annotated

import typer

from companion.cli import Set, app, assigned, done, main

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSIS = ROOT / "notebooks" / "09_diagnose.ipynb"
SWEEP = Path("workflow/sweep.yaml")
Model = Annotated[
    str,
    typer.Argument(help="A folder, a .gguf file, a Hub id, or smollm2-135m.", show_default=False),
]
Text = Annotated[str, typer.Option(help="A UTF-8 file, docstrings, or hf:NAME.")]
Revision = Annotated[str, typer.Option(help="A branch, tag or commit of a Hub id.")]
File = Annotated[Path, typer.Argument(help="The sweep: models, steps and settings (YAML).")]


@app.command()
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

    def work() -> None:
        given = {"model": model, "text": text, "revision": revision, **assigned(values)}
        diagnosis.report(DIAGNOSIS, output, given, data)
        print(f"The report is ready: open {output}")

    raise typer.Exit(done(work, DIAGNOSIS.stem))


@app.command()
def measure(
    model: Model,
    text: Text = "docstrings",
    revision: Revision = "",
    texts: Annotated[int, typer.Option(help="Held-out passages.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
) -> None:
    """Print a model's held-out loss, last-layer anisotropy, head entropy and output rank."""

    def work() -> None:
        from headbound import corpus, hidden, models
        from headbound.measure import checkpoint

        network, tokenizer = models.load(model, revision or None)
        held_out = corpus.split(corpus.load(text))[1]
        rows = hidden.sequences(tokenizer, held_out, texts, length)
        for name, value in checkpoint.measure(network, rows, tokenizer).items():
            print(f"{name:<28}{value:.6g}")

    raise typer.Exit(done(work))


@app.command()
def tunnel(
    values: Set = None,
    parameters: Annotated[str, typer.Option(help="Parameters as a JSON object.")] = "{}",
) -> None:
    """Train what is missing of the wind tunnel's suite, with its chapter's parameters."""

    def work() -> None:
        import json

        from companion.execute import check_parameters, defaults
        from headbound.train import tunnel

        notebook = ROOT / "notebooks" / "01_wind_tunnel.ipynb"
        given = check_parameters(notebook, json.loads(parameters) | assigned(values))
        chosen = defaults(notebook) | given
        names = ("vocab_size", "checkpoints", "held_out_texts", "seed")
        options = {name: chosen[name] for name in names}
        tunnel.train(chosen["hidden_sizes"], chosen["steps"], source=chosen["text"], **options)

    raise typer.Exit(done(work))


@app.command()
def sweep(
    file: File,
    task: Annotated[str, typer.Argument(help="left, audit or measure.")] = "left",
    model: Annotated[str, typer.Argument(help="For audit and measure.")] = "",
    revision: Annotated[str, typer.Argument(help="For measure.")] = "",
    keep: Annotated[bool, typer.Option(help="Leave the checkpoint in the cache.")] = False,
) -> None:
    """What is left of a sweep over checkpoints, or one job of it; Snakemake runs them all."""

    def work() -> None:
        from sweep import measure, read

        table, settings = read(file)
        if task == "left":
            todo = measure.left(table, settings)
            total = sum(len(revisions) for revisions in table.values())
            print(f"{total - len(todo)} of {total} checkpoints measured")
            print(*(f"left: {model} {revision}" for model, revision in todo), sep="\n")
            return
        if task not in ("audit", "measure") or model not in table:
            raise ValueError(
                f"{task} {model}: give left, or audit or measure and a model of {file}"
            )
        rows = measure.audited(model, table[model], settings)
        if task == "measure":
            measure.measure(model, revision, settings, rows, keep)

    raise typer.Exit(done(work))


@app.command()
def plan(
    file: File = SWEEP,
    tflops: Annotated[float, typer.Option(help="Sustained, in the sweep's dtype.")] = 20,
    tflops64: Annotated[float, typer.Option(help="Sustained in float64.")] = 5,
    megabytes: Annotated[
        float, typer.Option(help="A second from the Hub, all jobs together.")
    ] = 200,
    jobs: Annotated[int, typer.Option(help="At once.")] = 2,
) -> None:
    """What a sweep costs before it starts: jobs, bytes, GPU hours, disk."""

    def work() -> None:
        from sweep import hub, plan, read

        hub.TRIES = 2
        rates = plan.Rates(tflops, tflops64, megabytes, jobs)
        print(plan.words(*read(file), rates))

    raise typer.Exit(done(work))


if __name__ == "__main__":
    main()
