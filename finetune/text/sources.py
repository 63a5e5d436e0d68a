"""Input files of `prepare`: found, put in order, and known by their content."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.embedded import sha256_of
from bench.errors import UsageError
from finetune.text import documents

KINDS = ".txt, .raw, .json, .jsonl or .xml (also .gz, .bz2)"


@dataclass(frozen=True)
class Source:
    """An input file. name: that of the file, with its folders below the folder that was given."""

    name: str
    path: Path
    sha256: str
    size: int  # bytes

    def about(self) -> dict[str, str]:
        """What the headers of token files say of it."""
        return {"name": self.name, "sha256": self.sha256}


def find(inputs: tuple[str, ...], out: Path, report: Callable[[int, int], None]) -> list[Source]:
    """The files given, in that order, and those within folders by name; all of them are hashed.

    A folder may hold other files, which are passed over. report: (files done, files in all).
    Raises UsageError for a path that is not there, holds nothing to read, or has `out` within.
    """
    found: list[tuple[str, Path]] = []
    for given in inputs:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise UsageError(f"--out {out} lies within the input {given}; choose another one")
            inside = [file for file in sorted(path.rglob("*")) if documents.kind(file)]
            if not inside:
                raise UsageError(f"{given} holds no {KINDS}")
            found += [(str(file.relative_to(path)), file) for file in inside if file.is_file()]
        elif not path.is_file():
            raise UsageError(f"{given}: no such file or folder")
        elif documents.kind(path) is None:
            raise UsageError(f"{given}: not a kind that can be read; give {KINDS}")
        else:
            found.append((path.name, path))
    sources = []
    for number, (name, path) in enumerate(found):
        report(number, len(found))
        sources.append(Source(name, path, sha256_of(path), path.stat().st_size))
    return sources
