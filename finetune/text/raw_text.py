r"""Where documents begin and end in a text file, read line by line.

Plain text is one document unless a pattern parts it; what lies outside of Project Gutenberg's
markers (its header and its licence) is left out. Two forms hold many documents and are told by
the first line: WikiExtractor's `<doc ...>` ... `</doc>`, and WikiText with ` = Title = ` lines.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_DOCUMENT = 16 << 20  # bytes of a line, characters of a document: what memory depends on
GUTENBERG_HEADER = 1 << 16  # characters among which its end is looked for

START = re.compile(
    r"\s*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG|\*END\*\s*THE SMALL PRINT)", re.I
)
END = re.compile(r"\s*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.I)
LAST_LINE = re.compile(r"\s*End of (?:the )?Project Gutenberg", re.I)  # nothing may follow it
OUTSIDE = "lines of Project Gutenberg's own"
EXTRACTED = re.compile(r"<doc id=.*>\s*")
ARTICLE = re.compile(r" = [^=\s](?:.*[^=\s])? = \s*")

Lines = Iterator[tuple[int, str]]  # (number, line)


class Text(NamedTuple):
    """A document as found in a file. form: "plain", "extracted" (WikiExtractor) or "as is"."""

    text: str
    form: str = "plain"


def lines(stream: BinaryIO, path: Path) -> Lines:
    """(number, line with its end) of a UTF-8 text."""
    for number in itertools.count(1):
        line = stream.readline(MAX_DOCUMENT + 1)
        if not line:
            return
        if len(line) > MAX_DOCUMENT:
            raise ValueError(f"{path} line {number}: longer than 16 MiB; break it up")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{path} line {number}: byte {error.start} of it is not UTF-8"
            raise ValueError(f"{where}; save the file as UTF-8") from error
        yield number, text


def texts(numbered: Lines, path: Path, split_on: str, counts: Counter[str]) -> Iterator[Text]:
    """Documents of a text file; its first line with anything on it tells the form.

    split_on: pattern for the borders between documents of plain text; "" for none. counts: the
    lines outside of Project Gutenberg's markers are added to it.
    """
    opening: list[tuple[int, str]] = []
    for entry in numbered:
        opening.append(entry)
        if entry[1].strip() or len(opening) > 1000:
            break
    first = opening[-1][1] if opening else ""
    numbered = itertools.chain(opening, numbered)
    if EXTRACTED.fullmatch(first):
        return _extracted(numbered, path)
    if ARTICLE.fullmatch(first):
        return _parted(numbered, path, re.compile(rf"^(?={ARTICLE.pattern}$)"), "as is")
    border = re.compile(split_on) if split_on else None
    return _parted(_without_gutenberg(numbered, counts), path, border, "plain")


def _parted(
    numbered: Lines, path: Path, border: re.Pattern[str] | None, form: str
) -> Iterator[Text]:
    """Documents between the matches of `border`, each looked for within a line."""
    pieces: list[str] = []
    size = 0
    for number, line in numbered:
        text = line.rstrip("\r\n")
        at = 0
        for match in border.finditer(text) if border else ():
            pieces.append(text[at : match.start()])
            at, size = match.end(), 0
            if (whole := "".join(pieces)).strip():
                yield Text(whole, form)
            elif form == "as is":  # the blank line that opens a WikiText file
                continue
            pieces = []
        pieces.append(line[at:])
        size += len(line) - at
        if size > MAX_DOCUMENT:
            raise ValueError(f"{path} line {number}: a document over 16 MiB; give --split-on")
    if (whole := "".join(pieces)).strip():
        yield Text(whole, form)


def _without_gutenberg(numbered: Lines, counts: Counter[str]) -> Lines:
    """The lines of the books alone; all lines where no marker of Project Gutenberg stands.

    A last line ends a book that had a start. In one whose header was cut off by others it goes
    alone, for texts that were put behind each other may follow.
    """
    head: list[tuple[int, str]] = []
    size = 0
    for entry in numbered:
        head.append(entry)
        size += len(entry[1])
        if size > GUTENBERG_HEADER:
            break
    first_book = itertools.takewhile(lambda entry: not END.match(entry[1]), head)
    starts = [place for place, (_, line) in enumerate(first_book) if START.match(line)]
    inside, started = not starts, False
    wrapped = False  # the title in the marker goes on in the next line
    if starts:
        counts[OUTSIDE] += starts[-1]
        del head[: starts[-1]]
    for number, line in itertools.chain(head, numbered):
        if START.match(line):
            inside = started = True
            wrapped = not line.rstrip().endswith("*")
        elif END.match(line) or LAST_LINE.match(line):
            inside = inside and not started and LAST_LINE.match(line) is not None
            started = False
        elif wrapped:
            wrapped = bool(line.strip()) and not line.rstrip().endswith("*")
        elif inside:
            yield number, line
        else:
            counts[OUTSIDE] += 1


def _extracted(numbered: Lines, path: Path) -> Iterator[Text]:
    """The documents of WikiExtractor: each between a line <doc ...> and a line </doc>."""
    pieces: list[str] | None = None
    size = number = 0
    for number, line in numbered:
        if line.startswith("<doc "):
            if pieces is not None:
                raise ValueError(f"{path} line {number}: <doc> within <doc>; extract it again")
            pieces, size = [], 0
        elif line.strip() == "</doc>" and pieces is not None:
            yield Text("".join(pieces), "extracted")
            pieces = None
        elif pieces is not None:
            pieces.append(line)
            size += len(line)
            if size > MAX_DOCUMENT:
                raise ValueError(f"{path} line {number}: a document over 16 MiB; extract it again")
        elif line.strip():
            raise ValueError(f"{path} line {number}: text outside of <doc>; extract it again")
    if pieces is not None:
        raise ValueError(f"{path} line {number}: the last <doc> does not end; extract it again")
