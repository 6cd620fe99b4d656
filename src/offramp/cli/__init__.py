"""The command line, ``offramp VERB MODEL [options]``: starts without torch, imports late."""

from __future__ import annotations

import sys

import typer

from offramp import __version__
from offramp.cli.generate import generate
from offramp.cli.inspect import inspect
from offramp.cli.trace import trace
from offramp.errors import OfframpError, UsageError

app = typer.Typer(
    name="offramp",
    help="Run a Hugging Face causal language model only as deep as each token needs.",
    epilog="Status: 0 did it, 1 could not, 2 wrong usage. With --json the last line of stdout is "
    "one JSON object.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (inspect, generate, trace):
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


def main() -> None:
    """Run the command line; users' errors end in one line, never in a traceback."""
    try:
        app()
    except OfframpError as error:
        print(f"offramp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("offramp: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
