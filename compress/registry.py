"""The one registry: method name -> Compressor value. Own methods and peers share it.

A method is written `name(setting=value, ...)` wherever a person names one: the command
line, the leaderboard, a record. `parse` reads that form and `describe` writes it. Methods joined by
+ are one method too (pipeline.py), whose one setting is `stages`: the settings of each. One method
is named by what it reads as well: `file:PATH`.
"""

import ast
import difflib
import importlib
import pkgutil
import re
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from compress.base import Compressor
from compress.pipeline import JOIN, Pipeline

FILE = "file"  # the method that reads a file: `file:PATH` is `file(path=PATH)`
_METHODS: dict[str, Compressor] = {}


class UnknownName(ValueError):
    """A method or a setting that does not exist, with the nearest names that do."""


def register(name: str, compressor: Compressor) -> None:
    """Make `compressor` available as `name` ("gptq"; peers: "library:method")."""
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered twice")
    _METHODS[name] = compressor


def discover(*packages: str) -> None:
    """Import every module of `packages`, so that each registers what it defines."""
    for package in packages:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def names() -> list[str]:
    """All registered method names, sorted."""
    return sorted(_METHODS)


def get(name: str, /, **settings: Any) -> Compressor:
    """The method `name`, with some settings changed. The registered value never changes.

    name: "a+b" with stages=[settings of a, settings of b] for a pipeline. Raises UnknownName (with
    "did you mean") for a name or setting that is not there, and ValueError for a setting of the
    wrong type or one that the method itself refuses.
    """
    if JOIN in name:
        return _pipeline(name, settings)
    if name not in _METHODS:
        raise UnknownName(f"no method {name!r}; {did_you_mean(name, _METHODS)}")
    method = _METHODS[name]
    known = {field.name for field in fields(method)}
    hints = get_type_hints(type(method))
    for key, value in settings.items():
        if key not in known:
            hint = did_you_mean(key, known) if known else "it has none"
            raise UnknownName(f"method {name!r} has no setting {key!r}; {hint}")
        settings[key] = _coerce(f"{name}.{key}", value, hints[key])
    return replace(method, **settings)


def _pipeline(name: str, settings: dict[str, Any]) -> Pipeline:
    """See `get`. A record's settings hold the name as well."""
    names = name.split(JOIN)
    stages = settings.get("stages", [{}] * len(names))
    if settings.keys() - {"name", "stages"} or len(stages) != len(names):
        raise ValueError(f"{name}: settings of a stage stand in its own brackets")
    return Pipeline(name, tuple(get(each, **own) for each, own in zip(names, stages, strict=True)))


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Read one method: "gptq(bits=3, symmetric=true)" -> ("gptq", {"bits": 3, "symmetric": True}).

    Values are Python or JSON literals; a bare word is a string. "file:PATH" is file(path=PATH),
    whatever PATH holds; quotes around it are dropped. "a(x=1)+b" is ("a+b", {"stages": [{"x": 1},
    {}]}). Raises ValueError on bad syntax; whether the name and settings exist is `get`'s business.
    """
    prefix, colon, path = text.strip().partition(":")
    if prefix == FILE and colon:
        return FILE, {"path": _unquoted(path.strip())}
    if len(parts := split_outside_brackets(text, JOIN)) > 1:
        stages = [parse(part) for part in parts]
        return JOIN.join(name for name, _ in stages), {"stages": [own for _, own in stages]}
    match = re.fullmatch(r"\s*([\w:.-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"cannot read method {text!r}; write name or name(setting=value,...)")
    settings = {}
    for part in split_outside_brackets(match[2] or ""):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip():
            raise ValueError(
                f"cannot read {part.strip()!r} in {text.strip()!r}; write setting=value"
            )
        if key.strip() in settings:
            raise ValueError(f"setting {key.strip()!r} is given twice in {text.strip()!r}")
        settings[key.strip()] = read_value(value)
    return match[1], settings


def parse_list(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read "gptq,gptq(bits=3),rtn(bits=4,group_size=32)": methods parted by commas."""
    return [parse(part) for part in split_outside_brackets(text)]


def describe(name: str, settings: dict[str, Any]) -> str:
    """The shortest text that `parse` and `get` read back: settings that differ from the default."""
    if name == FILE and settings.get("path"):
        return f"{FILE}:{_quoted(settings['path'])}"
    if JOIN in name:
        return JOIN.join(describe(*stage) for stage in stages_of(name, settings))
    inside = changed(name, settings)
    return f"{name}({inside})" if inside else name


def changed(name: str, settings: dict[str, Any]) -> str:
    """Those of `settings` that differ from the method's defaults, as `setting=value,...`.

    settings: as methods or as records have them, whose tuples are lists. Of a pipeline the stages
    that have some, as `name(setting=value,...)`.
    """
    if JOIN in name:
        stages = (describe(*stage) for stage in stages_of(name, settings) if changed(*stage))
        return " ".join(stages)
    default = _METHODS.get(name)
    written = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    shown = {
        key: value
        for key, value in written.items()
        if default is None or getattr(default, key, None) != value
    }
    return ",".join(f"{key}={_write(value)}" for key, value in shown.items())


def stages_of(name: str, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The (name, settings) of each stage of a pipeline."""
    return list(zip(name.split(JOIN), settings["stages"], strict=True))


def read_value(text: str) -> Any:
    """A literal as typed by a person: 3, 0.5, true, none, [1, 2], "text" or a bare word."""
    text = text.strip()
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_outside_brackets(text: str, separator: str = ",") -> list[str]:
    """Split at `separator` outside (), [] and quotes; empty parts are dropped."""
    parts, depth, quote, start = [], 0, "", 0
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:index])
            start = index + 1
        if depth < 0:
            break
    if depth or quote:
        raise ValueError(f"brackets or quotes do not close in {text!r}")
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def did_you_mean(name: str, known: Any) -> str:
    """The ending of an error message: the nearest of `known`, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def _unquoted(text: str) -> str:
    """`text` without the quotes that it stands in."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _quoted(path: str) -> str:
    """`path` as a list of methods takes it: in quotes where a comma or bracket would end it."""
    if not set(path) & set(",()[]\"'"):
        return path
    return f"'{path}'" if "'" not in path else f'"{path}"'


def _write(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return str(list(value)).replace(" ", "")
    return str(value)


def _coerce(where: str, value: Any, wanted: Any) -> Any:
    """`value` as the type of its field, or ValueError: 4 is not a bool and "4" is not an int."""
    allowed = get_args(wanted) if type(None) in get_args(wanted) else (wanted,)
    for kind in allowed:
        origin = getattr(kind, "__origin__", kind)
        if origin is tuple and isinstance(value, (list, tuple, str)):
            parts = (value,) if isinstance(value, str) else tuple(value)
            if all(isinstance(part, get_args(kind)[0]) for part in parts):
                return parts
            continue
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and type(value) is origin:
            return value
    name = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise ValueError(f"{where} must be {name}, not {value!r}")
