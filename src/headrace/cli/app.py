"""The program: its commands, its version, and how an error is shown."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headrace import __version__
from headrace.cli.bench import bench
from headrace.cli.compare import compare
from headrace.cli.doctor import doctor
from headrace.cli.evaluate import evaluate
from headrace.cli.methods import methods
from headrace.cli.quantize import quantize
from headrace.cli.run import run
from headrace.cli.serve import serve
from headrace.errors import HeadraceError


class ErrorReporting(TyperGroup):
    """Shows an error that Headrace raised on purpose as one line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the chosen command."""
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            if ctx.params["debug"]:
                raise
            print(f"headrace: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headrace {__version__}")
        raise typer.Exit


Version = typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)
Debug = typer.Option("--debug", help="Show tracebacks of errors.")


def _program(
    version: Annotated[bool, Version] = False, debug: Annotated[bool, Debug] = False
) -> None:
    """Headrace runs and serves language models. Without --model it uses the embedded one."""


app = typer.Typer(
    cls=ErrorReporting, callback=_program, no_args_is_help=True, pretty_exceptions_enable=False
)
app.command()(run)
app.command()(serve)
app.add_typer(bench, name="bench")
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(methods)
app.command()(doctor)
