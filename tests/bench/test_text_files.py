"""text_files: the cut in two by hand, what is read byte for byte, refusals that name the place."""

import gzip
import json
import tracemalloc

import pytest

from bench import text_files
from bench.text_files import read, split_in_two


def test_documents_are_cut_at_four_fifths():
    evaluation, calibration = split_in_two([f"document {n}" for n in range(1, 8)], "d")
    assert evaluation.text == "document 6\n\ndocument 7"
    assert evaluation.split == "documents 6-7 of 7"
    assert calibration.text == "\n\n".join(f"document {n}" for n in range(1, 6))
    assert calibration.split == "documents 1-5 of 7"


def test_paragraphs_keep_every_byte():
    text = "\n one\r\n\r\ntwo\nlines\n \t\n\n\n  three\n\nfour\n\nfive\n\n \n"
    evaluation, calibration = split_in_two(text, "d")
    assert calibration.text + evaluation.text == text
    assert evaluation.text == "five\n\n \n"
    assert (evaluation.split, calibration.split) == ("paragraphs 5-5 of 5", "paragraphs 1-4 of 5")


def test_a_text_without_blank_lines_is_cut_at_lines():
    evaluation, calibration = split_in_two(" a \n b \n c \n", "d")
    assert (calibration.text, evaluation.text) == (" a \n b \n", " c \n")
    assert evaluation.split == "lines 3-3 of 3"


@pytest.mark.parametrize(
    "content, unit", [(["one"], "document"), ("a\n", "line"), ("a\n\n \n", "line")]
)
def test_one_unit_cannot_be_cut(content, unit):
    with pytest.raises(ValueError, match=f"^data 'd' is one {unit}: too little"):
        split_in_two(content, "d")


def test_text_is_read_as_it_is(tmp_path):
    text = "\ufeffline\r\n\x85 = caf\u00e9 = \u2028\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(text.encode())
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.txt.gz") == text


def test_jsonl_gives_the_documents(tmp_path):
    rows = ["one\n", "", "caf\u00e9 \u2028 two"]
    lines = "\n".join(json.dumps({"text": row, "url": 1}, ensure_ascii=False) for row in rows)
    (tmp_path / "A.JSONL").write_text(lines + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(lines.encode())
    assert read(tmp_path / "A.JSONL") == ["one\n", "caf\u00e9 \u2028 two"]
    assert read(tmp_path / "a.jsonl.gz") == ["one\n", "caf\u00e9 \u2028 two"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"abc\xffdef", "byte 3 is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "byte 0 is not UTF-8"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", b'{"text": " "}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3: no field 'text' with a string"),
        ("a.jsonl", b'{"text": null}\n', "line 1: no field 'text' with a string"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: no field 'text' with a string"),
        ("a.jsonl", b'["text"]\n', "line 1: no field 'text' with a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: unusable"),
        ("a.jsonl", b"9" * 5000, "line 1: unusable"),
        ("a.jsonl", b"[" * 100_000, "line 1: unusable"),
        ("a.txt.gz", b"no gzip at all", "damaged gzip file"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:-9], "damaged gzip file"),
        ("a.txt.gz", gzip.compress(b"")[:10] + b"\xff" * 40, "damaged gzip file"),
    ],
)
def test_refuses_what_cannot_be_used(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_more_than_the_limit_and_unpacks_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"a" * 1000)
    assert read(tmp_path / "a.txt") == "a" * 1000
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a" * 20_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"b\.txt\.gz holds more than"):
        read(tmp_path / "b.txt.gz")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5_000_000
