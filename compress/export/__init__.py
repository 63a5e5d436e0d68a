"""Compressed models in the formats of other runtimes, both directions, code for code.

A format is one file here: `NAME`; `HOLDS`, one line for people; `refusal(model)`, the reason why
the format cannot mean exactly what `model` means, or None; `write(model, folder, tokenizer)`;
`recognises(path)`, from the file's first bytes or its config; `read(path)`. Nothing is rounded on
the way: what a format cannot hold is refused. Files come from anywhere, so a reader checks sizes,
offsets, counts, types and shapes before it allocates, and raises ValueError, one line.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.block_shapes import unsaid
from compress.model_files import write_whole
from compress.registry import UnknownName, did_you_mean


def formats() -> dict[str, ModuleType]:
    """Name -> module of every format."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        format = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(format, "NAME"):
            found[format.NAME] = format
    return dict(sorted(found.items()))


def export(
    model: Any, folder: Path | str, format: str, tokenizer: Path | str | None = None
) -> None:
    """Write `model` to a new `folder` in `format`, whole or not at all.

    tokenizer: a folder with the tokenizer's files, for formats that carry one (GGUF) or lie beside
    one. Raises UnknownName for a format that is not there, ValueError, with the reason and the
    formats that would do, for a model that `format` cannot hold exactly, OSError if the disk says
    so.
    """
    known = formats()
    if format not in known:
        raise UnknownName(f"no format {format!r}; {did_you_mean(format, known)}")
    if unsaid(model):
        raise ValueError(
            f"{format} cannot hold this model: its blocks have sizes that config.json cannot say; "
            "prune with spread=uniform, and GPT-2 with heads=false"
        )
    if reason := known[format].refusal(model):
        others = [name for name, other in known.items() if other.refusal(model) is None]
        cure = f"formats that can: {', '.join(others)}" if others else "no format here can"
        raise ValueError(f"{format} cannot hold this model: {reason}; {cure}")
    source = None if tokenizer is None else Path(tokenizer)
    write_whole(Path(folder), lambda made: known[format].write(model, made, source), set())


def format_of(path: Path) -> str:
    """The format of the file or folder at `path`. Raises ValueError if it is none of ours."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for name, format in formats().items():
        if format.recognises(path):
            return name
    known = ", ".join(formats())
    raise ValueError(f"{path} is in none of the formats {known}")


def read(path: Path | str) -> Any:
    """The model in a file or folder of any format here, ready for inference, codes kept as codes.

    Raises ValueError, one line naming the file, for whatever is missing, malformed or unknown.
    """
    path = Path(path)
    return formats()[format_of(path)].read(path)
