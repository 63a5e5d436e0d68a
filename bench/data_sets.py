"""The known data sets: which files below $SLIMBENCH_DATA, and which rows of the hub, they are.

The local file is used if it is there; else the hub, through the optional package `datasets`,
whose rows are turned back into the same file, byte for byte, so that both ways give equal ids.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TypeVar

from bench.text_files import Content, read

T = TypeVar("T")
ASSETS = Path(__file__).parent / "assets"
C4_DOCUMENTS = 1000  # the opening of the first shard, locally and from the hub


class UnknownData(ValueError):
    """A name that leads to no data on this machine; the message says what would."""


@dataclass(frozen=True)
class Source:
    """Where a known data set lies.

    files: evaluation and calibration, or one file that is split; below $SLIMBENCH_DATA.
    splits: what each file is called on the hub and in records.
    hub: arguments of `datasets.load_dataset`, besides the split.
    """

    about: str
    files: tuple[str, ...]
    splits: tuple[str, ...]
    hub: dict[str, str]


SOURCES = {
    "sample": Source(
        "original English text in this package, 72 kB and 44 kB to calibrate: for smoke runs",
        ("sample_evaluation.txt", "sample_calibration.txt"), ("evaluation", "calibration"), {},
    ),
    "wikitext2": Source(
        "WikiText-2 raw: whole test split; calibrates on validation",
        ("wikitext-2-raw/wiki.test.raw", "wikitext-2-raw/wiki.valid.raw"), ("test", "validation"),
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    ),
    "wikitext103": Source(
        "WikiText-103 raw: the same test and validation articles as wikitext2",
        ("wikitext-103-raw/wiki.test.raw", "wikitext-103-raw/wiki.valid.raw"),
        ("test", "validation"), {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
    ),
    "c4": Source(
        "C4 en, first 1000 documents: evaluates on the last 200, calibrates on the others",
        ("c4/c4-en-train-first1000.jsonl.gz",), ("train",),
        {"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"},
    ),
    "ptb": Source(
        "Penn Treebank validation split: last 20 % of lines; calibrates on the others",
        ("ptb/ptb.valid.txt",), ("validation",),
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
    ),
}  # fmt: skip


def contents(name: str) -> list[Content]:
    """The files of the known data set `name`, in the order of `Source.files`.

    Raises UnknownData if one is neither local nor to be had from the hub.
    """
    source = SOURCES[name]
    return [_content(name, *where) for where in zip(source.files, source.splits, strict=True)]


def _content(name: str, file: str, split: str) -> Content:
    if name == "sample":
        return read(ASSETS / file)
    if path := local(file):
        return read(path)
    return from_rows(name, from_hub(f"data {name!r}", file, lambda: _hub_rows(name, split)))


def local(file: str) -> Path | None:
    """$SLIMBENCH_DATA/file, if it is there."""
    folder = os.environ.get("SLIMBENCH_DATA", "")
    path = Path(folder) / file
    return path if folder and path.is_file() else None


def missing(file: str) -> str:
    """Why `local` does not find the file, for messages."""
    folder = os.environ.get("SLIMBENCH_DATA", "")
    return f"no {file} in SLIMBENCH_DATA={folder}" if folder else "SLIMBENCH_DATA is not set"


def from_hub(what: str, file: str, load: Callable[[], T]) -> T:
    """load(), which asks the hub since `file` is not local. what: names the data in the message.

    Raises UnknownData, saying why neither way works.
    """
    try:
        return load()
    except ImportError:
        reason = "the package `datasets` is missing (pip install 'slimbench[hub]')"
    except Exception as error:  # the library passes on whatever its network stack raises
        reason = f"the hub gave {type(error).__name__}"
    raise UnknownData(f"{what} is not here: {missing(file)}, and {reason}")


@cache  # C4 is streamed: without this, every look at it would fetch it again
def _hub_rows(name: str, split: str) -> tuple[str, ...]:
    column = "sentence" if name == "ptb" else "text"
    rows = import_module("datasets").load_dataset(
        **SOURCES[name].hub, split=split, streaming=name == "c4"
    )
    return tuple(row[column] for row in islice(rows, C4_DOCUMENTS if name == "c4" else None))


def from_rows(name: str, rows: Sequence[str]) -> Content:
    """The hub's rows turned back into the original file, so that both ways give equal ids.

    The hub strips the sentences of `ptb` and empties the blank lines of WikiText.
    """
    if name == "c4":
        return list(rows)
    if name == "ptb":
        return "".join(f" {row} \n" for row in rows)
    return "".join(row or " \n" for row in rows)
