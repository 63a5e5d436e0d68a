"""byte_bpe: merges by hand, any text back byte for byte, the same files from the same text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.text.byte_bpe import save, train

TEXT = ["low lower lowest low low", "new newer newest new"] * 3
ROOT = Path(__file__).parents[2]


def test_merges_by_hand():
    # Words: low 3x, new 2x (with their blank), lower, lowest, newer, newest: all times three.
    # The commonest pairs are lo and ow, of low and of its kin; then what they make.
    tokenizer = train(["low low low lot"] * 2, 1 + 256 + 3)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Pairs in (low)x2 (\u0120low)x4 (\u0120lot)x2: lo 8, ow 6, \u0120l 6, ot 2.
    assert model["merges"][0] == ["l", "o"]
    # Now lo w 6, \u0120 lo 6, lo t 2: of two as common the one with the smaller ids comes first.
    ids = tokenizer.get_vocab()
    later = sorted([["lo", "w"], ["\u0120", "lo"]], key=lambda pair: [ids[part] for part in pair])
    assert model["merges"][1] == later[0]
    assert len(tokenizer) == 260


def test_any_text_comes_back():
    tokenizer = train(TEXT, 270, ("<a>", "<b>"))
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<a>", "<b>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert len(tokenizer) == 270
    for text in (
        "low",
        "  two  blanks\n\n\ttab ",
        "caf\u00e9 \u4e2d\u6587 \U0001f600 \u0000",
        "it's 100%",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < 270
    assert len(tokenizer("low lower lowest")["input_ids"]) < len("low lower lowest") / 2


def test_saved_folder_is_what_transformers_reads(tmp_path):
    made = train(TEXT, 265, ("<a>",))
    save(made, tmp_path / "t")
    settings = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(settings)
    read = AutoTokenizer.from_pretrained(tmp_path / "t", local_files_only=True)
    assert isinstance(read, PreTrainedTokenizerFast)
    text = "low lower <a> newest<|endoftext|> caf\u00e9"
    assert read(text)["input_ids"] == made(text)["input_ids"]
    assert read.get_vocab() == made.get_vocab() and read.eos_token_id == 0
    save(read, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


def test_another_process_trains_the_same(tmp_path):
    save(train((text for text in TEXT), 265), tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from finetune.text.byte_bpe import save, train;"
        f"save(train({TEXT!r}, 265), Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "there"], check=True, cwd=ROOT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_a_size_that_cannot_be_is_refused(vocabulary):
    with pytest.raises(ValueError, match=rf"this text makes \d+ tokens, not {vocabulary}; ask for"):
        train(TEXT, vocabulary)


def test_what_the_documents_raise_comes_through():
    def broken():
        yield from TEXT
        raise ValueError("a.jsonl line 3: not JSON")

    with pytest.raises(ValueError, match=r"a\.jsonl line 3"):
        train(broken(), 270)
