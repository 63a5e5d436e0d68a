r"""Documents out of raw files: .txt, .raw, .json, .jsonl and MediaWiki .xml, also .gz and .bz2.

`raw_documents` reads a file as a stream and finds where documents begin and end; `clean` does the
work on one of them and can run in another process; `documents` is both, with short documents and
exact duplicates dropped. Memory: one document (at most 16 MiB), and for `documents` about 70
bytes for each document already seen. A .json file alone is read whole, and so refused above 1 GiB.

- .txt, .raw: one document. What matches `split_on`, tried line by line, is taken out and parts
  documents: `^\s*$` paragraphs, `$` lines, `(?=CHAPTER )` chapters with their headings. Project
  Gutenberg's header and licence are cut off. WikiExtractor's `<doc ...>` files and WikiText files
  (` = Title = `) are told by their first line, hold many documents, and WikiText stays as it is.
- .jsonl: a document a line; .json: a list or one. Each is a string or an object with a text field.
- .xml: the articles of a dump, see wiki.py; a page that its parser fails on is counted.

Cleaning: Unicode NFC, LF line ends, no control characters, single spaces, single blank lines.
"""

import bz2
import gzip
import hashlib
import html
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from bench.errors import UsageError
from finetune.text import wiki
from finetune.text.raw_text import MAX_DOCUMENT, Lines, Text, lines, texts
from finetune.text.wiki import Page

VERSION = 1  # of everything that decides which text comes out; see parts.py
MAX_JSON_BYTES = 1 << 30
KIND = re.compile(r"\.(txt|raw|jsonl|json|xml)(-p\d+p\d+[\w-]*)?(\.(gz|bz2))?\Z", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>")

LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\ufeff]")  # soft hyphens, marks of order
SPACES = re.compile(r"[^\S\n ][^\S\n]*| [^\S\n]+")  # all that is not one plain space
LINE_TAILS = re.compile(r" +$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Cleaning:
    """What decides, besides the file, which documents come out."""

    field: str = "text"  # of the objects in .json and .jsonl files
    split_on: str = r"<\|endoftext\|>"  # how TinyStories and its like part documents
    minimum: int = 100  # characters of a document after cleaning

    def __post_init__(self) -> None:
        """Raises UsageError for a pattern that is none."""
        try:
            re.compile(self.split_on)
        except re.error as error:
            raise UsageError(f"split_on {self.split_on!r} is no pattern: {error}") from None


Raw = Text | Page


def kind(path: Path) -> str | None:
    """txt, raw, jsonl, json or xml; None for a file that holds no documents that we can read."""
    found = KIND.search(path.name)
    return found[1].lower() if found else None


def documents(
    path: Path, cleaning: Cleaning | None = None, counts: Counter[str] | None = None
) -> Iterator[str]:
    """The clean documents of a file, each once. counts: what was dropped is added to it.

    Raises ValueError naming the file and the line for what cannot be read.
    """
    cleaning = cleaning or Cleaning()
    counts = Counter() if counts is None else counts
    seen: set[int] = set()
    for raw in raw_documents(path, cleaning, counts):
        text = cleaned(raw, cleaning.minimum, counts)
        if text is None:
            continue
        key = digest(text)
        if key in seen:
            counts["duplicates"] += 1
        else:
            seen.add(key)
            yield text


def digest(text: str) -> int:
    """64 bits that stand for a document: among ten million, two agree once in 400,000 times."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def cleaned(raw: Raw, minimum: int, counts: Counter[str]) -> str | None:
    """The text of a document, or None if it is too short or the wiki parser fails on it."""
    try:
        text = clean(raw)
    except Exception:  # the parser of wiki markup: a page in a million must not end a run
        if not isinstance(raw, Page):
            raise
        counts["pages that failed to parse"] += 1
        return None
    if len(text) < minimum:
        counts["short"] += 1
        return None
    return text


def clean(raw: Raw) -> str:
    """The text of a document, tidied; WikiText comes tidied and stays as it is."""
    if isinstance(raw, Page):
        text = wiki.plain_text(raw)
    elif raw.form == "as is":
        return raw.text
    elif raw.form == "extracted":
        text = TAG.sub("", html.unescape(raw.text))
    else:
        text = raw.text
    text = LINE_ENDS.sub("\n", unicodedata.normalize("NFC", text))
    text = SPACES.sub(" ", CONTROLS.sub("", text))
    return BLANK_LINES.sub("\n\n", LINE_TAILS.sub("", text)).strip()


def raw_documents(
    path: Path,
    cleaning: Cleaning,
    counts: Counter[str],
    reached: Callable[[int], None] = lambda position: None,
) -> Iterator[Raw]:
    """The documents of a file as they are. reached: told how many bytes of the file were read."""
    form = kind(path)
    with path.open("rb") as file, closing(_unpacked(file, path)) as stream:
        try:
            if form == "xml":
                wiki.parser_version()  # or each page would fail
                found: Iterator[Raw] = wiki.pages(stream, str(path), counts)
            elif form == "jsonl":
                found = _json_lines(lines(stream, path), path, cleaning.field)
            elif form == "json":
                found = _json(stream, path, cleaning.field)
            elif form:
                found = texts(lines(stream, path), path, cleaning.split_on, counts)
            else:
                raise ValueError(f"{path}: cannot read this; give .txt, .json, .jsonl or .xml")
            for raw in found:
                reached(file.tell())
                yield raw
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a disk, not a format
                raise
            raise ValueError(f"{path}: damaged ({error}); fetch the file again") from error


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return cast(BinaryIO, bz2.BZ2File(file)) if name.endswith(".bz2") else file


def _json_lines(numbered: Lines, path: Path, field: str) -> Iterator[Text]:
    for number, line in numbered:
        if line.strip():
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ValueError(f"{where}: not JSON ({reason}); mend or delete it") from error
            yield Text(_field(entry, field, where))


def _json(stream: BinaryIO, path: Path, field: str) -> Iterator[Text]:
    raw = stream.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"{path} is over 1 GiB; convert it to .jsonl, which is read line by line")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        cure = "rename it to .jsonl" if error.msg == "Extra data" else "mend it"
        raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg}); {cure}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unusable ({error})") from error
    for number, entry in enumerate(value if isinstance(value, list) else [value], start=1):
        yield Text(_field(entry, field, f"{path} entry {number}"))


def _field(entry: Any, field: str, where: str) -> str:
    """The text of an entry. Raises ValueError if there is none that a tokenizer takes."""
    text = entry.get(field) if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        names = ", ".join(list(entry)[:9]) if isinstance(entry, dict) else ""
        has = f" among {names}; give --field" if names else ""
        raise ValueError(f"{where}: no field {field!r} with a string{has}")
    if len(text) > MAX_DOCUMENT:
        raise ValueError(f"{where}: a document over 16 MiB; break it up")
    try:
        text.encode()  # refuses half a surrogate pair
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: unusable ({error.reason})") from error
    return text
