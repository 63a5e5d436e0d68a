"""Where the rows of a task come from: files below $SLIMBENCH_DATA, else the hub, else a refusal.

The local file is used if it is there; else the hub, through the optional package `datasets`. What
is missing is named together with what would help. A row is a dict; a file or a row that is not
what the task expects is refused with its place.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.data_sets import UnknownData, from_hub, local, missing
from bench.text_files import unpacked

T = TypeVar("T")


class Rows(NamedTuple):
    """Rows of one split. where: the file or the hub's name of it, for messages."""

    where: str
    rows: list[dict[str, Any]]

    def build(self, make: Callable[[dict[str, Any]], T]) -> list[T]:
        """make(row) of every row. Raises ValueError naming the row that does not fit."""
        made = []
        for number, row in enumerate(self.rows, start=1):
            try:
                made.append(make(row))
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                what = f"row {number} is not of this task ({type(error).__name__}: {error})"
                raise ValueError(f"{self.where}: {what}") from error
        return made


def rows(
    task: str,
    file: str,
    parse: Callable[[Path], list[dict[str, Any]]],
    hub: dict[str, str] | None,
) -> Rows:
    """The rows of `file`, or those of the hub.

    hub: arguments of datasets.load_dataset, `split` among them; None where the hub has no copy
    that can be read without running code. Raises UnknownData if neither can be had.
    """
    if (path := local(file)) is not None:
        return Rows(str(path), parse(path))
    what = f"data of task {task!r}"
    if hub is None:
        raise UnknownData(f"{what} is not here: {missing(file)}; put {file} there")
    found = from_hub(
        what, file, lambda: [dict(row) for row in import_module("datasets").load_dataset(**hub)]
    )
    return Rows(f"{hub['path']} ({hub['split']})", found)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, packed with gzip or not; a byte order mark is dropped.

    Raises ValueError naming the file if it is damaged, too large or not UTF-8.
    """
    raw = unpacked(path, "; that is not this data set")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; fetch it again") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines are passed over."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: not a JSON object")
        found.append(row)
    return found


def comma_separated(path: Path) -> list[dict[str, Any]]:
    """A .csv file with a header; fields may be quoted and then hold commas."""
    return _with_header(path, csv.reader(io.StringIO(read_text(path), newline=""), strict=True))


def tab_separated(path: Path) -> list[dict[str, Any]]:
    """A tab-separated file with a header, in which quotation marks quote nothing."""
    lines = (line.rstrip("\r") for line in read_text(path).split("\n"))
    return _with_header(path, (line.split("\t") for line in lines if line))


def _with_header(path: Path, lines: Iterable[list[str]]) -> list[dict[str, Any]]:
    try:
        header, *rest = [line for line in lines if line]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table with a header ({error})") from error
    for number, line in enumerate(rest, start=1):
        if len(line) != len(header):
            raise ValueError(f"{path}: row {number} has {len(line)} fields, not {len(header)}")
    return [dict(zip(header, line, strict=True)) for line in rest]


def held_out(keys: Iterable[str], share: float = 0.1) -> set[str]:
    """A share of the distinct keys, at least one: those whose SHA-256 is greatest.

    The choice depends on the keys alone, not on their order; equal keys stay together.
    """
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return set(ordered[-max(1, round(share * len(ordered))) :])
