"""The command line, ``offramp VERB MODEL [options]``: starts without torch, imports late."""

from __future__ import annotations

import sys
from typing import NoReturn, cast

import typer

from offramp import __version__
from offramp.cli.bench import bench
from offramp.cli.calibrate import calibrate
from offramp.cli.evaluate import evaluate
from offramp.cli.export import export
from offramp.cli.fit import fit
from offramp.cli.generate import generate
from offramp.cli.inspect import inspect
from offramp.cli.oracle import oracle
from offramp.cli.report import report
from offramp.cli.search import search
from offramp.cli.trace import trace
from offramp.cli.tune import tune
from offramp.errors import OfframpError, UsageError
from offramp.shown import visible

app = typer.Typer(
    name="offramp",
    help="Run a Hugging Face causal language model only as deep as each token needs.",
    epilog="Status: 0 did it, 1 could not, 2 wrong usage. With --json the last line of stdout is "
    "one JSON object.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    inspect,
    tune,
    fit,
    search,
    calibrate,
    generate,
    trace,
    oracle,
    evaluate,
    report,
    bench,
    export,
):
    app.command()(verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


# What the parser raises on wrong usage. Typer carries its own click, without a public name for it.
_ParseError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def main() -> None:
    """Run the command line; users' errors end in one line, never in a traceback."""
    try:
        status = app(standalone_mode=False)
    except _ParseError as error:
        said: str = error.format_message()  # type: ignore[attr-defined]
        end(2, f"{said} (offramp VERB --help tells more)" if said else "name a verb")
    except OfframpError as error:
        end(2 if isinstance(error, UsageError) else 1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        end(130, "interrupted")
    except BrokenPipeError:
        sys.exit(1)
    else:
        if status == 130:  # typer catches Ctrl-C itself
            end(130, "interrupted")
        sys.exit(status)


def end(status: int, message: str) -> NoReturn:
    """Say why the program ends, in one line on stderr, and end it with this status."""
    # Names out of a model's files may be in it, and a file may say anything to a terminal.
    print(f"offramp: {visible(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
