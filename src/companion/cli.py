"""The command of a book of notebooks: build it, run a chapter, sign and check its verdicts."""

import locale
import os
import signal
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from companion import build

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
UsageError = typer.BadParameter.__base__  # of the click that typer brings along
Preset = Annotated[
    str, typer.Option(help="The scale: a file of presets/, such as smoke or laptop.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A parameter; give it again for another."),
]


@app.callback()
def about() -> None:
    """Build this book, or run one part of it. Begin with `book`; --help explains each command."""


def command(work: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make a function a command: it ends with its status, or with one clear line for a failure."""

    @app.command()
    @wraps(work)
    def run(**asked: Any) -> None:
        from companion.execute import report_failure

        raise typer.Exit(report_failure(work.__name__, partial(work, **asked)))

    return work


@command
def book(
    preset: Preset = "laptop",
    chapter: Annotated[
        list[str] | None,
        typer.Option(help="This chapter alone, by its beginning, such as 02; a page of its own."),
    ] = None,
    cores: Annotated[
        int, typer.Option(min=1, help="Chapters executed side by side.")
    ] = os.cpu_count() or 1,
) -> int:
    """Execute every chapter that is new or changed, and render the book into _build/html.

    It goes on where it was stopped. A verdict that differs from the signed one is marked and told.
    """
    return build.build(preset, chapter or [], cores)


@command
def chapter(
    notebook: Annotated[Path, typer.Argument(help="A notebook of the book, or its name.")],
    output: Annotated[Path, typer.Argument(help="The executed notebook to write.")],
    preset: Preset = "laptop",
    values: Set = None,
) -> None:
    """Execute one chapter; what you set goes before the preset. Its first code cell lists all."""
    from companion import execute

    if not notebook.exists() and notebook.suffix != ".ipynb":
        notebook = Path("notebooks") / f"{notebook}.ipynb"
    chosen = execute.of_preset(notebook, preset) | assigned(values)
    execute.execute(notebook, output, preset, chosen)


@command
def sign(preset: Preset = "laptop") -> None:
    """Accept the verdicts that the chapters now give; git's diff of verdicts.yaml shows them."""
    from companion import site

    site.sign(preset)


@command
def check(preset: Preset = "laptop") -> int:
    """Refuse what is built (exit status 1) where a verdict differs from the signed one."""
    from companion import results, site

    found = results.faults(preset, site.chapters(preset))
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return int(bool(found))


@command
def pdf() -> int:
    """Print the built book as _build/book.pdf; needs a Chromium."""
    from companion import pdf

    return pdf.print_book()


@command
def links(preset: Preset = "laptop") -> int:
    """Ask the other hosts that the book links to whether the links still answer."""
    from companion import site

    return site.publish(preset, "linkcheck")


def assigned(values: list[str] | None) -> dict[str, str]:
    """Parameters from `NAME=VALUE`, the values as text.

    **Raises:** `ValueError` for one without a name.
    """
    found = {}
    for given in values or []:
        name, equals, value = given.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"--set {given}: must be NAME=VALUE, such as seed=1")
        found[name] = value
    return found


def _end(number: int, _frame: object) -> None:
    """Leave as at a failure, so that what is half made goes."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command, in UTF-8 whatever the locale says; wrong usage is told in one line."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _end)
    plain = locale.getencoding().lower() in ("utf-8", "utf8")
    if plain or sys.flags.utf8_mode:
        try:
            sys.exit(app(standalone_mode=not sys.argv[1:]))
        except UsageError as error:
            told = " ".join(error.format_message().split())
            print(f"headbound: {told} (--help lists what there is)", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:  # nobody reads standard output, or its disk is full
            print(f"headbound: {error.strerror}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left goes there, at the end
            sys.exit(2)
    arguments = sys.orig_argv[1:]
    environment = os.environ | {"PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *arguments], environment)


if __name__ == "__main__":
    main()
