"""What every `python -m ...` of the project shares: how it looks, how errors end it."""

import sys
import traceback
from typing import Annotated

import typer

from bench.errors import UsageError, one_line
from bench.terminal import err
from results import store

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def new_app(about: str) -> typer.Typer:
    """A program without commands yet. about: what it is for, in one sentence."""
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )


def run_app(commands: typer.Typer, program: str, arguments: list[str] | None) -> None:
    """Run one of `commands`; an error becomes one line and an exit code. arguments: None: given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        commands(arguments, prog_name=program)
    except Exception as error:  # whatever its type, a person gets one line
        if "--debug" in arguments:
            traceback.print_exc()
        err.print(f"error: {one_line(error)}", markup=False)
        sys.exit(2 if is_usage(error) else 1)


def is_usage(error: Exception) -> bool:
    """Whether the command line is wrong, as opposed to what it led to."""
    if isinstance(error, (UsageError, store.UnknownKey)):
        return True
    from bench.data import UnknownData
    from bench.models import UnknownModel
    from compress.registry import UnknownName

    return isinstance(error, (UnknownName, UnknownModel, UnknownData))
