"""documents: cleaning by hand, borders of documents, every format, refusals that name the place."""

import bz2
import gzip
import json
import os
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from bench.errors import UsageError
from finetune.text import documents as module
from finetune.text.documents import Cleaning, clean, digest, documents, kind
from finetune.text.raw_text import Text

USER_DATA = os.environ.get("SLIMBENCH_DATA")  # before the fixtures of the session hide it
ALL = Cleaning(minimum=1)


def read(path: Path, data: str | bytes, cleaning: Cleaning = ALL) -> list[str]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(documents(path, cleaning))


@pytest.mark.parametrize(
    "raw, text",
    [
        ("a\r\nb\rc\vd\fe\x85f\u2028g", "a\nb\nc\nd\ne\nf\ng"),
        ("a  b\t\tc\u00a0d \t e\u3000f", "a b c d e f"),
        ("  a  \n\n \n\t\n\nb \nc\n\n\n", "a\n\nb\nc"),
        ("a\x00b\x1b[0mc\x7f\ufeffd co\u00adop", "ab[0mcd coop"),
        ("cafe\u0301 \u212b", "caf\u00e9 \u00c5"),
        ("f\u0131\ufb01 \u200d\u2122 \U0001f600", "f\u0131\ufb01 \u200d\u2122 \U0001f600"),
        (" \n\t\x00\n", ""),
    ],
)
def test_cleaning(raw, text):
    assert clean(Text(raw)) == text
    assert clean(Text(text)) == text, "what is clean stays as it is"
    assert unicodedata.is_normalized("NFC", text)


def test_wikitext_stays_as_it_is_and_is_parted_at_titles(tmp_path):
    articles = [
        " \n = Robert Boulter = \n \n Robert is  an actor @-@ . \n \n"
        " = = Career = = \n \n x = y = z \n \n",
        " = 2 + 2 = 5 = \n \n A phrase . \n",
    ]
    found = read(tmp_path / "wiki.train.raw", "".join(articles))
    assert found == articles


def test_gutenberg_leaves_the_book(tmp_path):
    header = "\ufeffThe Project Gutenberg eBook of Emma\n\nTitle: Emma\n"
    book = "VOLUME I\n\nEmma Woodhouse, handsome,\nclever, and rich"
    text = (
        f"{header}*** START OF THE PROJECT GUTENBERG EBOOK EMMA,\nA NOVEL ***\n\n{book}\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nlicence\n"
    )
    assert read(tmp_path / "a.txt", text) == [book]
    assert read(tmp_path / "a.txt", text.replace("THE P", "THIS P").replace("\n", "\r\n")) == [book]
    # Two in one file, the second with the markers of the nineties.
    old = (
        "**The Project Gutenberg Etext of Emma**\nplease read\n"
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
        "by\nJane\n\nEnd of the Project Gutenberg Etext of Emma\n"
    )
    assert read(tmp_path / "a.txt", text + old) == [f"{book}\n\nby\nJane"]
    assert read(tmp_path / "a.txt", old) == ["by\nJane"]
    cut = "one\n\nEnd of the Project Gutenberg Etext\n\ntwo\n\n*** END OF THE PROJECT GUTENBERG\nno"
    assert read(tmp_path / "a.txt", cut) == ["one\n\ntwo"], "headers gone, books put together"
    counts: Counter[str] = Counter()
    assert list(documents(tmp_path / "a.txt", ALL, counts)) and counts.total() == 1
    quoted = "He found the words START OF THE PROJECT GUTENBERG EBOOK odd."
    assert read(tmp_path / "a.txt", quoted) == [quoted]


@pytest.mark.parametrize(
    "split_on, found",
    [
        (Cleaning.split_on, ["CHAPTER I\n\none\ntwo", "CHAPTER II\nthree ***"]),
        ("", ["CHAPTER I\n\none\ntwo<|endoftext|>\nCHAPTER II\nthree ***"]),
        (r"^\s*$", ["CHAPTER I", "one\ntwo<|endoftext|>\nCHAPTER II\nthree ***"]),
        ("$", ["CHAPTER I", "one", "two<|endoftext|>", "CHAPTER II", "three ***"]),
        (r"(?=CHAPTER )", ["CHAPTER I\n\none\ntwo<|endoftext|>", "CHAPTER II\nthree ***"]),
        (r"\*{3}|<.*>", ["CHAPTER I\n\none\ntwo", "CHAPTER II\nthree"]),
    ],
)
def test_where_a_text_is_parted(tmp_path, split_on, found):
    text = "CHAPTER I\n \none\ntwo<|endoftext|>\nCHAPTER II\nthree ***"
    assert read(tmp_path / "a.txt", text, Cleaning(split_on=split_on, minimum=1)) == found


def test_wikiextractor_files_hold_many_documents(tmp_path):
    text = (
        '\n<doc id="7" url="u" title="Cat">\nCat\n\nA cat &amp; a &lt;b&gt;dog.\n\n</doc>\n'
        '<doc id="8" url="u" title="Empty">\n\n</doc>\n'
    )
    counts: Counter[str] = Counter()
    (tmp_path / "wiki_00.txt").write_text(text)
    assert list(documents(tmp_path / "wiki_00.txt", ALL, counts)) == ["Cat\n\nA cat & a dog."]
    assert counts == {"short": 1}


def test_json_forms_and_packings(tmp_path):
    rows = ["one \u2028 line", {"text": "two", "id": 2}, {"text": "caf\u00e9"}]
    found = ["one\n line", "two", "caf\u00e9"]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    assert read(tmp_path / "a.jsonl", lines) == found
    assert read(tmp_path / "A.JSONL.GZ", gzip.compress(lines.encode())) == found
    half = len(lines) // 2  # as dumps are packed: several streams in one file
    streams = bz2.compress(lines[:half].encode()) + bz2.compress(lines[half:].encode())
    assert read(tmp_path / "a.jsonl.bz2", streams) == found
    assert read(tmp_path / "a.json", json.dumps(rows, indent=1)) == found
    assert read(tmp_path / "a.json", json.dumps(rows[1])) == ["two"]
    assert read(tmp_path / "a.json", '{"body": "b"}', Cleaning("body", minimum=1)) == ["b"]


def test_short_and_repeated_documents_are_counted(tmp_path):
    rows = ["a" * 100, "b" * 99, "a" * 100 + " ", "c" * 101]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts: Counter[str] = Counter()
    found = list(documents(tmp_path / "a.jsonl", counts=counts))
    assert found == ["a" * 100, "c" * 101]
    assert counts == {"short": 1, "duplicates": 1}


def test_digest_is_blake2b():
    # RFC 7693: parameters change the hash, so this is no prefix of the 64-byte one.
    assert digest("abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little")


@pytest.mark.parametrize(
    "name, form",
    [
        ("a.txt", "txt"), ("a.TXT.gz", "txt"), ("wiki.train.raw", "raw"), ("a.txt.json", "json"),
        ("a.jsonl.bz2", "jsonl"), ("enwiki-latest-pages-articles1.xml-p10p302.bz2", "xml"),
        ("x.xml-p1p2-shortened.bz2", "xml"), ("a.md", None), ("txt", None), ("a.txt.zip", None),
    ],
)  # fmt: skip
def test_kinds(name, form):
    assert kind(Path(name)) == form


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"fine\nabc\xffdef", "line 2: byte 3 of it is not UTF-8; save the file as UTF-8"),
        ("a.txt", "text".encode("utf-16"), "line 1: byte 0 of it is not UTF-8"),
        ("a.txt", b"<doc id=1>\na\n<doc id=2>\n", "line 3: <doc> within <doc>"),
        ("a.txt", b"<doc id=1>\na\n</doc>\nb\n", "line 4: text outside of <doc>"),
        ("a.txt", b"<doc id=1>\na\n", "line 2: the last <doc> does not end"),
        ("a.jsonl", b'"a"\n{"text": "b\n', "line 2: not JSON"),
        ("a.jsonl", b'"a"\n\n{"b": "b", "id": 1}\n', "line 3: no field 'text' with a string"),
        ("a.jsonl", b'{"b": "b", "id": 1}', "line 1: no field 'text' with a string among b, id;"),
        ("a.jsonl", b'{"text": null}', "line 1: no field 'text' with a string"),
        ("a.jsonl", b"5", "line 1: no field 'text' with a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: unusable"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b'["a",\n "b"', "line 2: not JSON"),
        ("a.json", b'{"text": "a"}\n{}', "line 2: not JSON (Extra data); rename it to .jsonl"),
        ("a.json", b'["a", 3]', "entry 2: no field 'text' with a string"),
        ("a.json", b'["\xff"]', "unusable"),
        ("a.txt.gz", b"no gzip at all", "damaged (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:-9], "damaged"),
        ("a.txt.gz", gzip.compress(b"")[:10] + b"\xff" * 40, "damaged"),
        ("a.jsonl.bz2", b"no bzip2 at all", "damaged (Invalid data stream)"),
        ("a.jsonl.bz2", bz2.compress(b'"text"\n' * 999)[:-9], "damaged"),
        ("a.md", b"text", "cannot read this"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_place(tmp_path, name, data, message):
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name, data)
    assert str(tmp_path / name) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_too_long_is_refused(tmp_path, monkeypatch):
    for place in ("finetune.text.documents", "finetune.text.raw_text"):
        monkeypatch.setattr(f"{place}.MAX_DOCUMENT", 1000)
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 1000)
    assert read(tmp_path / "a.txt", ("x" * 99 + "\n") * 10) != []
    for name, text, message in [
        ("a.txt", "x" * 1001, "line 1: longer than 16 MiB"),
        ("a.txt", ("x" * 99 + "\n") * 11, "line 11: a document over 16 MiB; give --split-on"),
        ("a.txt", "<doc id=1>\n" + "y\n" * 600, "line 502: a document over 16 MiB"),
        ("a.json", json.dumps(["x" * 995, "y"]), "over 1 GiB; convert it to .jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, text)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"^split_on '\(' is no pattern"):
        Cleaning(split_on="(")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = json.dumps({"text": "word " * 2000}) + "\n" if "json" in name else "word " * 2000 + "\n"
    with gzip.open(tmp_path / name, "wt", compresslevel=1) as file:
        file.writelines([row] * 1000)  # 10 MB of text
    tracemalloc.start()
    counts: Counter[str] = Counter()
    found = sum(1 for _ in documents(tmp_path / name, Cleaning(split_on="$"), counts))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found, counts["duplicates"]) == (1, 999)
    assert peak_bytes < 1_500_000


@pytest.mark.skipif(not USER_DATA, reason="SLIMBENCH_DATA is not set")
def test_the_real_samples():
    data = Path(str(USER_DATA))
    wiki = [text for text in documents(data / "wikitext-2-raw/wiki.valid.raw", ALL)]
    assert "".join(wiki) == (data / "wikitext-2-raw/wiki.valid.raw").read_text()
    assert len(wiki) == 60  # articles in the validation split, as published
    extracted = data / "wikipedia-xml/wikiextractor-output-sample.txt.gz"
    counts: Counter[str] = Counter()
    texts = list(documents(extracted, counts=counts))
    assert len(texts) + counts.total() == 2349  # documents, as its manifest says
    assert not any("<doc" in text or "&lt;" in text for text in texts)
    [emma] = documents(data / "gutenberg/austen-emma.txt.gz")
    assert emma.startswith("[Emma by Jane Austen 1816]\n\nVOLUME I\n\nCHAPTER I\n\nEmma Woodhouse,")
    assert len(list(documents(data / "c4/c4-en-train-first1000.jsonl.gz", ALL))) == 1000
