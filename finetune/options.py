"""Settings of a command: one frozen dataclass gives its options, its JSON keys and its defaults.

A field made by `setting` carries its help. `add_command` turns the class into a command whose
options are the fields (`learning_rate` -> `--learning-rate`). `--config FILE` reads a JSON object
with the same names; an option on the command line wins over the file.
"""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from bench.errors import UsageError
from bench.terminal import err
from compress.registry import did_you_mean

S = TypeVar("S")


def setting(
    default: Any,
    help: str,
    least: float | None = None,
    choices: tuple[str, ...] = (),
    positional: bool = False,
) -> Any:
    """A dataclass field with what `--help` says of it.

    least: smallest value allowed. choices: the only values allowed. positional: an argument
    instead of an option; it may be left out if --config names it or the default is good.
    """
    about = {"help": help, "least": least, "choices": choices, "positional": positional}
    return dataclasses.field(default=default, metadata=about)


def build(settings_type: type[S], values: dict[str, Any], where: str = "settings") -> S:
    """A checked value of the dataclass. Raises UsageError naming the field that is wrong.

    values: names to values, as JSON gives them (lists for tuples, strings for paths).
    """
    hints = typing.get_type_hints(settings_type)
    fields = {field.name: field for field in dataclasses.fields(settings_type)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise UsageError(f"{where}: no setting {name!r}; {did_you_mean(key, fields)}")
        read[key] = _as_type(value, hints[key], f"{where}: {key}")
    made = settings_type(**read)
    for name, field in fields.items():
        value = getattr(made, name)
        least, choices = field.metadata.get("least"), field.metadata.get("choices")
        if least is not None and value is not None and value < least:
            raise UsageError(f"{where}: {name} must be at least {least}, not {value}")
        if choices and value not in choices:
            raise UsageError(f"{where}: {name} must be one of {', '.join(choices)}, not {value!r}")
    return made


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values; `build` reads them back."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UsageError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--config {path} must hold one JSON object of settings")
    return value


def add_command(
    app: typer.Typer, name: str, settings_type: type[S], run: Callable[[S], Any], epilog: str = ""
) -> None:
    """Add the command `name` to `app`: its options are the fields, its help is run's docstring."""
    hints = typing.get_type_hints(settings_type)
    parameters = [
        _parameter(field, hints[field.name])
        for field in dataclasses.fields(settings_type)  # type: ignore[arg-type]
    ]
    config = typer.Option("--config", metavar="FILE", help="JSON object with these settings.")
    debug = typer.Option("--debug", help="Show the traceback of an error.")
    only_keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter(
            "config", only_keyword, default=None, annotation=Annotated[Path | None, config]
        ),
        inspect.Parameter("debug", only_keyword, default=False, annotation=Annotated[bool, debug]),
    ]

    def command(**given: Any) -> None:
        del given["debug"]  # read by main
        file = given.pop("config")
        values = read_config(file) if file else {}
        values |= {key: value for key, value in given.items() if value not in (None, [])}
        try:
            run(build(settings_type, values, str(file) if file else name))
        except KeyboardInterrupt as stop:
            said = f"{stop}; the same command goes on from there" if str(stop) else "stopped"
            err.print(said, markup=False)
            raise typer.Exit(130) from None

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = inspect.getdoc(run)
    app.command(name, epilog=epilog)(command)


def _parameter(field: Any, hint: Any) -> inspect.Parameter:
    """One option. Its default is None, so that what was given can be told from what was not."""
    about, plain = field.metadata, _plain(hint)
    shown = {"help": about["help"], "show_default": _shown(field.default)}
    if about["choices"]:
        shown["metavar"] = "|".join(about["choices"])
    kind: Any = list[str] if plain is tuple else plain
    if about["positional"]:
        option: Any = typer.Argument(**shown)
    else:
        flag = f"--{field.name.replace('_', '-')}"
        names = (f"{flag}/--no-{flag[2:]}",) if plain is bool else (flag,)
        option = typer.Option(*names, **shown)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _shown(default: Any) -> str | bool:
    if default in (None, (), ""):
        return False
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _plain(hint: Any) -> type:
    """str, int, float, bool, Path or tuple out of a hint such as `int | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _as_type(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type. Raises UsageError for another type."""
    plain = _plain(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if plain is tuple and isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    if plain is Path and isinstance(value, (str, Path)):
        return Path(value)
    if plain is float and type(value) in (int, float):
        return float(value)
    if type(value) is plain:
        return value
    raise UsageError(f"{where} must be of type {plain.__name__}, not {value!r}")
