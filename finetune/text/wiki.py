"""MediaWiki dumps: articles out of the XML as a stream, and plain text out of their markup.

`pages` feeds expat in pieces and keeps one page at a time, so memory does not grow with the dump.
No tree is built on purpose: iterparse leaves every page hanging on the root, which would have to
be cleared along with the page, and offers no way to refuse a DTD. A dump has none, so a DTD is an
attack (entities that expand to gigabytes or to local files) and ends the reading.

`plain_text` parses the markup with mwparserfromhell and keeps what a reader reads: paragraphs,
list items, link texts, headings as lines of their own. Templates, tables, references, files,
categories, formulas and comments go, and so do the brackets, blanks and empty sections that they
leave. Templates are not expanded: what only a template says ({{convert|5|km}}) is lost.

Source: https://www.mediawiki.org/wiki/Help:Export#Export_format
        https://mwparserfromhell.readthedocs.io
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

READ_BYTES = 1 << 16
MAX_PAGE = 1 << 24  # characters of markup; MediaWiki itself stops at 2 MiB
LEAVES = ("title", "ns", "model", "text")
FILE, CATEGORY = "6", "14"  # numbers of the namespaces whose links show no text
HIDDEN = frozenset({"file", "image", "category"})  # their English names; the dump gives others
REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)

MAX_OPEN = 200  # brackets and tags open at once; articles have ten, vandalism thousands
BRACKETS = re.compile(
    r"(\{\{|\[|<(?!(?:br|hr|li|p|dt|dd|t[dhr]|wbr|img)\b)[a-zA-Z])|\}\}|\]|/>|</", re.IGNORECASE
)
BROKEN_TAG = re.compile(r"<[a-zA-Z][^<>\n]{0,200}\n[^<>]{0,300}>")  # over lines: the parser's limit
DROPPED = {
    *("ref", "references", "table", "gallery", "imagemap", "mapframe", "maplink", "timeline"),
    *("math", "chem", "ce", "hiero", "score", "graph", "style", "script", "section"),
    *("inputbox", "templatedata", "categorytree"),
}
BLOCKS = {"p", "div", "blockquote", "poem", "center", "li", "dd", "dt", "ul", "ol", "pre", "source"}
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]{2,8})*|simple")  # of [[fr:Chat]], a link to a sister

GAP, HEAD = "\x00", "\x01"  # where something was cut out; start of a heading, then its level
EMPTY_BRACKETS = re.compile(r" ?[(\[][\s,;:]*\x00[\s,;:\x00]*[)\]]")
BRACKET_THEN_GAP = re.compile(r"(?<=[(\[])[\s,;]*\x00[\s,;\x00]*")
GAP_BEFORE_STOP = re.compile(r"[ \t]*\x00[ \t\x00]*(?=[\s.,;:)\]]|\Z)")
QUOTES = re.compile(r"'{2,}")  # bold and italics
MAGIC_WORD = re.compile(r"__[A-Z]+__")
STRAY_TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>")  # of a tag that was never closed
TABLE_REST = re.compile(r"^[ \t:*]*(?:\{\||\|[}\-+|]?|!.*(?:!!|\|)|\}\}).*$", re.MULTILINE)


class Page(NamedTuple):
    """An article as it lies in the dump. hidden: names of namespaces whose links show nothing."""

    title: str
    markup: str
    hidden: frozenset[str] = HIDDEN


def pages(stream: BinaryIO, name: str, counts: Counter[str]) -> Iterator[Page]:
    """The articles in `stream`: namespace 0, wiki markup, no redirects; the last revision of each.

    name: of the dump, for errors. counts: what was met and passed over is added to it. Raises
    ValueError naming dump and line for broken XML, another format or a DTD.
    """
    reader = _Reader(name, counts)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.StartDoctypeDeclHandler = reader.refuse_dtd
    while True:
        data = stream.read(READ_BYTES)
        try:
            parser.Parse(data, not data)
        except expat.ExpatError as error:
            what = expat.ErrorString(error.code)
            raise ValueError(
                f"{name} line {error.lineno}: not well-formed XML ({what}); fetch the dump again"
            ) from error
        yield from reader.found
        reader.found.clear()
        if not data:
            return


class _Reader:
    """What expat calls; finished articles gather in `found`."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.found: list[Page] = []
        self._name, self._counts = name, counts
        self._depth = 0
        self._hidden = HIDDEN
        self._namespace = ""  # number of the one whose name is being read
        self._page: dict[str, str] | None = None
        self._text: list[str] | None = None  # pieces of the leaf that is being read
        self._size = 0
        self._slot = False  # inside <content>: a revision's further parts, not its text

    def refuse_dtd(self, *_: Any) -> None:
        raise ValueError(f"{self._name} holds a DTD, which no MediaWiki dump has; not read")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1 and name != "mediawiki":
            raise ValueError(f"{self._name}: the root is <{name}>, not <mediawiki>; no dump")
        if name == "page":
            self._page = {}
        elif name == "content":
            self._slot = True
        elif name == "redirect" and self._page is not None:
            self._page[name] = ""
        elif name == "namespace":
            self._namespace, self._text, self._size = attributes.get("key", ""), [], 0
        elif name in LEAVES and self._page is not None and not self._slot:
            self._text, self._size = [], 0

    def characters(self, data: str) -> None:
        if self._text is not None:
            self._size += len(data)
            if self._size <= MAX_PAGE:
                self._text.append(data)

    def end(self, name: str) -> None:
        self._depth -= 1
        if name == "content":
            self._slot = False
        elif name == "page":
            self._finish()
        elif self._text is not None:
            text = "".join(self._text)
            if name == "namespace" and self._namespace in (FILE, CATEGORY):
                self._hidden |= {text.strip().casefold()}
            elif name in LEAVES and self._page is not None:
                self._page[name] = text if self._size <= MAX_PAGE else ""
            self._text = None

    def _finish(self) -> None:
        page, self._page = self._page or {}, None
        markup = page.get("text", "")
        self._counts["pages"] += 1
        if page.get("ns", "0").strip() != "0":
            self._counts["pages of other namespaces"] += 1
        elif "redirect" in page or REDIRECT.match(markup):
            self._counts["redirects"] += 1
        elif page.get("model", "wikitext").strip() != "wikitext":
            self._counts["pages that are not wiki markup"] += 1
        elif not markup.strip():
            self._counts["empty or oversized pages"] += 1
        else:
            self.found.append(Page(page.get("title", "").strip(), markup, self._hidden))


def parser_version() -> str:
    """Of the library that reads markup. Raises ValueError, with the cure, if it is missing."""
    try:
        return version("mwparserfromhell")
    except PackageNotFoundError:
        raise ValueError("wiki markup needs mwparserfromhell: pip install it") from None


def plain_text(page: Page) -> str:
    """Title and text of an article, parted by a blank line; "" if nothing but the title is left.

    White space is not tidied. May raise anything for markup that the parser fails on, and
    ValueError for markup that is so unbalanced that it would take the parser hours.
    """
    import mwparserfromhell

    depth = 0
    for match in BRACKETS.finditer(page.markup):
        depth = depth + 1 if match[1] else max(depth - 1, 0)
        if depth > MAX_OPEN:
            raise ValueError(f"page {page.title!r}: {depth} brackets open at once")
    markup = BROKEN_TAG.sub(lambda match: match[0].replace("\n", " "), page.markup)
    # Bold and italics are taken out afterwards: the parser gives up on what they straddle.
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    text = _visible(code, page.hidden)
    text = MAGIC_WORD.sub("", QUOTES.sub("", text))
    text = STRAY_TAG.sub("", TABLE_REST.sub("", text))
    text = BRACKET_THEN_GAP.sub("", EMPTY_BRACKETS.sub("", text))
    text = GAP_BEFORE_STOP.sub("", text).replace(GAP, "")
    body = "\n".join(_filled_sections(text.split("\n")))
    return f"{page.title}\n\n{body}" if body.strip() else ""


def _visible(code: Any, hidden: frozenset[str]) -> str:
    """What a reader sees of parsed markup; GAP where something was left out."""
    from mwparserfromhell import nodes

    parts = []
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            parts.append(_link(node, hidden))
        elif isinstance(node, nodes.Tag):
            parts.append(_tag(node, hidden))
        elif isinstance(node, nodes.Heading):
            title = " ".join(_visible(node.title, hidden).split())
            parts.append(f"\n\n{HEAD}{node.level}{title}\n\n")
        elif isinstance(node, nodes.ExternalLink):
            shown = node.brackets and node.title is not None
            parts.append(_visible(node.title, hidden) if shown else GAP)
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(html.unescape(str(node)))
        else:  # templates, their arguments, comments
            parts.append(GAP)
    return "".join(parts)


def _link(node: Any, hidden: frozenset[str]) -> str:
    title = str(node.title).strip()
    space = title.partition(":")[0].strip().casefold() if ":" in title else ""
    if space in hidden or (node.text is None and LANGUAGE.fullmatch(space)):
        return GAP
    text = _visible(node.text, hidden) if node.text is not None else ""
    return text or _visible(node.title, hidden).strip().removeprefix(":")


def _tag(node: Any, hidden: frozenset[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in DROPPED:
        return GAP
    if name in ("br", "hr"):
        return "\n"
    inside = _visible(node.contents, hidden)
    return f"\n{inside}\n" if name in BLOCKS and not node.wiki_markup else inside


def _filled_sections(lines: list[str]) -> list[str]:
    """The lines, headings made plain, without headings that have no text below them."""
    kept: list[str] = []
    deepest = 0  # headings up to this level have text below them, before the next of their level
    for line in reversed(lines):
        if not line.startswith(HEAD):
            if line.strip():
                deepest = 6
            kept.append(line.strip())
            continue
        level, title = int(line[1]), line[2:].strip()
        if level <= deepest:
            deepest = level - 1
            kept.append(title)
    return kept[::-1]
