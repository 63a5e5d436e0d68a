"""Text files: read with clear refusals, and cut in two where one file must serve for both.

A .txt file is one running text, used as it is. A .jsonl file holds one document a line, in the
field `text`. Either may be packed with gzip. A single file is cut into its first 80 % and last
20 % of documents, paragraphs (parted by blank lines) or, where there is only one paragraph, lines.
"""

import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 64 * 2**20  # of unpacked text; tokenising takes many times as much memory

Content = str | list[str]  # a running text, or documents


@dataclass(frozen=True)
class Text:
    """One of the two texts of a name. split: "test", "lines 2697-3370 of 3370", ..."""

    text: str
    split: str

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 bytes; equals that of the file where a file is used whole."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(path: Path) -> Content:
    """The text of a file, or its documents. Raises ValueError naming the file and the place."""
    raw = unpacked(path, " of text; use a part of it")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        where = f"{path}: byte {error.start} is not UTF-8"
        raise ValueError(f"{where}; save the file as UTF-8") from error
    is_jsonl = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    content = _documents(path, text) if is_jsonl else text
    if not join(content).strip():
        raise ValueError(f"{path} holds no text")
    return content


def unpacked(path: Path, too_much: str) -> bytes:
    """The content of a file, packed with gzip (.gz) or not, of at most MAX_BYTES.

    too_much: ends the message for a larger one. Raises ValueError naming the file.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} holds more than {MAX_BYTES >> 20} MiB{too_much}")
    return raw


def join(content: Content) -> str:
    """One text: documents are parted by a blank line."""
    return content if isinstance(content, str) else "\n\n".join(content)


def split_in_two(content: Content, name: str) -> tuple[Text, Text]:
    """Evaluation (the last fifth of the units, rounded up) and calibration (those before).

    Raises ValueError if there is only one unit. name: of the data, for that message.
    """
    units, noun = content, "documents"
    if isinstance(content, str):
        units, noun = _cut(content, r"\n\s*\n"), "paragraphs"
        if len(units) == 1:
            units, noun = _cut(content, r"\n"), "lines"
    total, border = len(units), len(units) * 4 // 5
    if border == 0:
        raise ValueError(f"data {name!r} is one {noun[:-1]}: too little to split in two")
    joint = "\n\n" if noun == "documents" else ""
    return (
        Text(joint.join(units[border:]), f"{noun} {border + 1}-{total} of {total}"),
        Text(joint.join(units[:border]), f"{noun} 1-{border} of {total}"),
    )


def _documents(path: Path, text: str) -> list[str]:
    """The field `text` of each line; lines and documents without text are passed over."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            document.encode()  # refuses half a surrogate pair, which no tokenizer takes
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error.msg})") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number}: no field 'text' with a string") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: unusable ({error})") from error
        if document.strip():
            documents.append(document)
    return documents


def _cut(text: str, border: str) -> list[str]:
    """`text` cut after each match of `border`; the pieces joined give `text` again."""
    end = len(text.rstrip())  # blank lines at the end start no further piece
    starts = [0] + [match.end() for match in re.finditer(border, text) if match.end() < end]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
