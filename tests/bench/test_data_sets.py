"""data_sets: the hub's rows give the local file's bytes; the sample and its card; refusals."""

import gzip
import hashlib
import json
import re
import sys

import pytest

from bench.data_sets import ASSETS, SOURCES, UnknownData, contents
from bench.overlap import shared_passages

# As in the raw file: a space before and after each line, blank lines hold one space.
WIKI = " \n = Robert = \n \n Robert is an actor . He had a role @-@ twice . \n \n"
WIKI_ROWS = ["", " = Robert = \n", "", " Robert is an actor . He had a role @-@ twice . \n", ""]


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103"])
def test_wikitext_is_the_same_text_from_file_and_hub(name, hub, tmp_path, monkeypatch):
    hub.rows = {
        "test": [{"text": row} for row in WIKI_ROWS],
        "validation": [{"text": row} for row in WIKI_ROWS[1:]],
    }
    from_hub = contents(name)
    assert from_hub == [WIKI, WIKI[2:]]
    assert [call["split"] for call in hub.calls] == ["test", "validation"]

    for file, text in zip(SOURCES[name].files, from_hub, strict=True):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(text.encode())
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    assert contents(name) == from_hub
    assert len(hub.calls) == 2, "the local files come first"


def test_ptb_is_the_same_text_from_file_and_hub(hub, tmp_path, monkeypatch):
    hub.rows = {"validation": [{"sentence": "the <unk> fell N points"}, {"sentence": "it rose"}]}
    assert contents("ptb") == [" the <unk> fell N points \n it rose \n"]
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb.valid.txt").write_text(" another text \n")
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    assert contents("ptb") == [" another text \n"]


def test_c4_streams_the_first_thousand_documents(hub, tmp_path, monkeypatch):
    hub.rows = {"train": [{"text": f"document {n}", "url": "u"} for n in range(1500)]}
    [documents] = contents("c4")
    assert documents == [f"document {n}" for n in range(1000)]
    assert hub.calls[0]["streaming"] is True
    contents("c4")
    assert len(hub.calls) == 1, "fetched once a process"

    (tmp_path / "c4").mkdir()
    with gzip.open(tmp_path / SOURCES["c4"].files[0], "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    assert contents("c4") == [documents]
    assert len(hub.calls) == 1


def test_data_that_is_nowhere_says_what_would_help(hub, tmp_path, monkeypatch):
    hub.rows = {}  # load_dataset raises KeyError
    with pytest.raises(UnknownData, match="SLIMBENCH_DATA is not set, and the hub gave KeyError"):
        contents("wikitext2")
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(UnknownData) as caught:
        contents("wikitext2")
    assert str(caught.value) == (
        "data 'wikitext2' is not here: no wikitext-2-raw/wiki.test.raw in "
        f"SLIMBENCH_DATA={tmp_path}, and the package `datasets` is missing "
        "(pip install 'slimbench[hub]')"
    )


def test_sample_is_what_its_card_says():
    card = (ASSETS / "README.md").read_text()
    for name in SOURCES["sample"].files:
        raw = (ASSETS / name).read_bytes()
        pieces = len(re.findall(rb"^# ", raw, re.MULTILINE))
        facts = f"| `{name}` | {pieces} | {len(raw):,} | {len(raw.split()):,} |"
        assert facts in card
        assert hashlib.sha256(raw).hexdigest() in card


def test_sample_is_large_enough_clean_and_repeats_nothing():
    evaluation, calibration = contents("sample")
    assert isinstance(evaluation, str) and isinstance(calibration, str)
    assert len(evaluation) >= 60_000 and len(calibration) >= 20_000
    for text in (evaluation, calibration):
        assert text.isascii() and "\t" not in text
        assert not re.search(r" \n|\n\n\n|\r", text) and text.endswith("\n")
        assert all(re.match(r"# [A-Z]", line) for line in text.splitlines() if line[:1] == "#")
    long = [line for line in (evaluation + calibration).splitlines() if len(line) > 40]
    assert len(set(long)) == len(long) > 250
    assert shared_passages(evaluation, calibration).fraction == 0
