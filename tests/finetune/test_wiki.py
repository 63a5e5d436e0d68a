"""wiki: markup to text by hand, which pages are read, attacks refused, constant memory."""

import bz2
import io
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from finetune.text import wiki
from finetune.text.documents import Cleaning, clean, documents
from finetune.text.wiki import Page, pages, plain_text

USER_DATA = os.environ.get("SLIMBENCH_DATA")  # before the fixtures of the session hide it


def body(markup: str) -> str:
    text = clean(Page("T", markup))
    assert text.startswith("T\n\n") or not text
    return text[3:]


@pytest.mark.parametrize(
    "markup, text",
    [
        ("'''Anarchism''' is a [[political philosophy]].", "Anarchism is a political philosophy."),
        ("[[self-governance|self-governed]] [[cat]]s", "self-governed cats"),
        ("a<ref>''x''. [http://y Z]</ref><ref name=b/> b.<ref\nname=c>d</ref>", "a b."),
        ("an {{convert|5|km}} road, {{x}}, {{y}}.", "an road,,."),
        ("Ada ({{IPA|a}}; born {{x}}) is ({{y}}) here (e.g., {{z}})", "Ada (born) is here (e.g.,)"),
        ("[[File:a.jpg|thumb|A [[cat]] <ref>x</ref>]]b[[Category:C|*]]", "b"),
        ("[[:Category:Cats]] [[:fr:Chat|Chat]] [[wikt:cat|cat]]", "Category:Cats Chat cat"),
        ("cat\n[[fr:Chat]]\n[[zh-yue:\u8c93]]\n[[simple:Cat]]", "cat"),
        ("[http://a.b Site] [http://a.b] see http://a.b/c now", "Site see now"),
        ("x &ndash; 3&nbsp;km &amp;amp; &#x3a3;", "x \u2013 3 km &amp; \u03a3"),
        ("one<br>two<br />three<!-- [[no]] -->!", "one\ntwo\nthree!"),
        ("* one\n* [[two]]\n# three\n: four\n; five", "one\ntwo\nthree\nfour\nfive"),
        ("H<sub>2</sub>O x<sup>2</sup> <math>\\frac{1}{2}</math> y", "H2O x2 y"),
        ("<blockquote>said</blockquote><gallery>a.jpg|b</gallery>", "said"),
        ("{| class=x\n! a !! b\n|-\n| [[c]] || {{d}}\n|}\nafter", "after"),
        ("{|\n| a\n{|\n| nested\n|}\n| b\n|}\nafter", "after"),
        ("{|\n|-\n| never closed\n! h !! i\nafter", "after"),
        ("a<ref>never closed\n\nb</span> 3 < 4 > 2", "anever closed\n\nb 3 < 4 > 2"),
        ("__NOTOC__ ''it'' '''''both''''' o'clock", "it both o'clock"),
        ("<nowiki>[[x]]</nowiki> <code>f()</code> and main()", "[[x]] f() and main()"),
        ("{{Infobox\n| a = {{b|[[c]]}}\n}}\ntext", "text"),
    ],
)  # fmt: skip
def test_markup_by_hand(markup, text):
    assert body(markup) == text


def test_headings_are_plain_lines_and_empty_sections_go():
    markup = (
        "Lead.\n== History ==\n=== Early [[x|years]] ===\nOld.\n=== Gap ===\n{{main|z}}\n"
        "== Empty ==\n=== Also empty ===\n== Last ==\nEnd.\n== References ==\n<references/>\n"
    )
    assert body(markup) == "Lead.\n\nHistory\n\nEarly years\n\nOld.\n\nLast\n\nEnd."


def test_nothing_but_a_title_is_no_text():
    assert plain_text(Page("T", "{{stub}}\n[[Category:X]]\n== See also ==\n")) == ""


def dump(inside: str, head: str = "", names: str = "") -> bytes:
    return (
        f'{head}<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de">'
        f"<siteinfo><namespaces>{names}</namespaces></siteinfo>{inside}</mediawiki>"
    ).encode()


def page(text: str, title: str = "T", ns: int = 0, extra: str = "", model: str = "wikitext") -> str:
    return (
        f"<page><title>{title}</title><ns>{ns}</ns><id>1</id>{extra}<revision><id>2</id>"
        f"<comment>text</comment><model>{model}</model><text>{text}</text></revision></page>\n"
    )


def read(data: bytes) -> tuple[list[Page], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(pages(io.BytesIO(data), "dump.xml", counts)), counts


def test_only_articles_are_read():
    inside = [
        page("first &lt;b&gt; &amp;amp;", "A &amp; B"),
        page("talk", ns=1),
        page("see", extra='<redirect title="x" />'),
        page("#redirect [[x]]"),
        page("{}", model="json"),
        page(" "),
        # A full history: the last revision counts; further slots of a revision do not.
        "<page><title>H</title><ns>0</ns><revision><text>old</text></revision><revision>"
        "<text>new</text><content><text>slot</text></content></revision></page>",
    ]
    found, counts = read(dump("".join(inside)))
    assert [(p.title, p.markup) for p in found] == [("A & B", "first <b> &amp;"), ("H", "new")]
    assert counts == {
        "pages": 7, "pages of other namespaces": 1, "redirects": 2,
        "pages that are not wiki markup": 1, "empty or oversized pages": 1,
    }  # fmt: skip


def test_the_dump_names_its_own_namespaces():
    names = '<namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace>'
    names += '<namespace key="0" /><namespace key="4">Wikipedia</namespace>'
    markup = "[[Datei:a.jpg|mini|x]][[kategorie:C]][[Image:b.png]][[Wikipedia:Hilfe|Hilfe]]"
    [found], _ = read(dump(page(markup), names=names))
    assert clean(found) == "T\n\nHilfe"


@pytest.mark.parametrize(
    "data, message",
    [
        (
            dump(page("&a;"), '<!DOCTYPE m [<!ENTITY a "x"><!ENTITY b "&a;&a;&a;">]>'),
            "dump.xml holds a DTD, which no MediaWiki dump has",
        ),
        (
            dump(page("&a;"), '<!DOCTYPE m [<!ENTITY a SYSTEM "file:///etc/passwd">]>'),
            "dump.xml holds a DTD",
        ),
        (
            (b"<!--" + b"x" * 99_999 + b"-->" + dump("", "<!DOCTYPE m>")),
            "dump.xml holds a DTD",
        ),
        (
            dump("", '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE m>')
            .decode()
            .encode("utf-16"),
            "dump.xml holds a DTD",
        ),
        (dump("\n\n<page><title>x</page>"), "dump.xml line 3: not well-formed XML"),
        (dump(page("a"))[:-20], "not well-formed XML"),
        (b"<html></html>", "dump.xml: the root is <html>, not <mediawiki>"),
        (b"", "not well-formed XML"),
    ],
)
def test_refusals(data, message):
    with pytest.raises(ValueError) as caught:
        read(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_page_that_fails_is_counted_and_the_next_is_read(tmp_path, monkeypatch):
    real = wiki.plain_text

    def failing(page: Page) -> str:
        if page.title == "bad":
            raise RecursionError("too deep")
        return real(page)

    monkeypatch.setattr(wiki, "plain_text", failing)
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(bz2.compress(dump(page("x" * 200, "bad") + page("y" * 200, "good"))))
    counts: Counter[str] = Counter()
    assert list(documents(path, counts=counts)) == ["good\n\n" + "y" * 200]
    assert counts == {"pages": 2, "pages that failed to parse": 1}


@pytest.mark.parametrize("unit", ["{{a|", "<div>", "[http://a ", "[[a|<ref>[http://b ", '<b a="'])
def test_markup_that_would_take_hours_fails_at_once(unit):
    plain_text(Page("T", unit * 40))
    with pytest.raises(ValueError, match="page 'T': 201 brackets open at once"):
        plain_text(Page("T", unit * 100_000))


@pytest.mark.parametrize("unit", ["{|\n|", "''", "\n==a", "*", "<br>", "<li>", "]]", "{{x}}"])
def test_strange_markup_ends(unit):
    plain_text(Page("T", unit * 3000))


def test_oversized_page_is_passed_over(monkeypatch):
    monkeypatch.setattr(wiki, "MAX_PAGE", 100)
    found, counts = read(dump(page("x" * 101) + page("y" * 100)))
    assert [p.markup for p in found] == ["y" * 100]
    assert counts["empty or oversized pages"] == 1


def test_memory_does_not_grow_with_the_dump():
    def peak(count: int) -> int:
        class Endless(io.RawIOBase):
            parts = iter([dump("")[:-12], *[page("x" * 10_000).encode()] * count, b"</mediawiki>"])

            def read(self, size: int = -1) -> bytes:
                return next(self.parts, b"")

        tracemalloc.start()
        assert sum(1 for _ in pages(Endless(), "d", Counter())) == count
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    peak(10)
    assert peak(2000) < peak(100) + 100_000  # 20 MB of XML against 1 MB


@pytest.mark.skipif(not USER_DATA, reason="SLIMBENCH_DATA is not set")
def test_real_pages_leave_no_markup():
    folder = Path(str(USER_DATA)) / "wikipedia-xml"
    counts: Counter[str] = Counter()
    [tables] = folder.glob("enwiki-table-markup*")
    texts = list(documents(tables, Cleaning(), counts))
    assert len(texts) == 5 and counts["pages that failed to parse"] == 0
    for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "<ref", "'''", "\n|", "thumb|"):
        assert not any(mark in text for text in texts), mark
