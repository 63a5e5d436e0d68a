"""data: windows by hand, the draw's promises, disjointness between names, refusals."""

import logging
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench import data
from bench.data import UnknownData, calibration_blocks, check_disjoint, evaluation_blocks


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, ids by code point for ASCII; puts <s> in front unless told not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {char: ord(char) for char in alphabet if ord(char) < 128} | {"Ġ": 32, "Ċ": 10}
    rest = (char for char in alphabet if char not in visible)
    vocab = visible | {char: 200 + index for index, char in enumerate(rest)} | {"<s>": 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=8)


def prose(seed: int, words: int) -> str:
    """Random words of 3 to 8 letters in lines of 12 words: texts that share nothing."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    out = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(words)]
    return "\n".join(" ".join(out[i : i + 12]) for i in range(0, words, 12))


def positions(text: str, **_) -> dict[str, list[int]]:
    """A tokenizer whose ids tell where each character stood."""
    return {"input_ids": list(range(len(text)))}


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """Writes a made-up WikiText-2 folder; the two texts are given as arguments."""
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()

    def write(test: str, valid: str = "v" * 100) -> None:
        (folder / "wiki.test.raw").write_bytes(test.encode())
        (folder / "wiki.valid.raw").write_bytes(valid.encode())

    return write


def write_paragraphs(path, seed: int, count: int = 10) -> str:
    path.write_text("\n\n".join(prose(seed * 1000 + n, 60) for n in range(count)))
    return str(path)


def test_the_known_names():
    assert list(data.names()) == ["sample", "wikitext2", "wikitext103", "c4", "ptb"]
    assert all(about and "\n" not in about for about in data.names().values())


def test_windows_by_hand(wikitext, tokenizer):
    wikitext(" = A = \n \n bcdef")
    blocks = evaluation_blocks("wikitext2", tokenizer, window=5)
    assert blocks.ids.tolist() == [list(b" = A "), list(b"= \n \n"), list(b" bcde")]  # no "f"
    assert blocks.ids.dtype == torch.int64
    assert (blocks.data, blocks.split, blocks.tokens) == ("wikitext2", "test", 16)
    assert blocks.sha256 == "4f164b9b919a8c518bff8cb4d21f7e495247d97f7b3bcd86899e06c61d85aa7b"


def test_limit_keeps_the_first_windows(wikitext, tokenizer):
    wikitext("abcdefghij")
    assert evaluation_blocks("wikitext2", tokenizer, 3, limit=2).ids.tolist() == [
        list(b"abc"),
        list(b"def"),
    ]
    assert len(evaluation_blocks("wikitext2", tokenizer, 3, limit=99).ids) == 3


def test_a_text_longer_than_the_model_gives_no_warning(wikitext, tokenizer, caplog):
    wikitext("a" * 100)  # the tokenizer names 8 tokens as the model's maximum
    with caplog.at_level(logging.WARNING):
        evaluation_blocks("wikitext2", tokenizer, 10)
    assert not caplog.records and not tokenizer.deprecation_warnings


def test_refuses_windows_that_cannot_be_cut(wikitext, tokenizer):
    wikitext("abcdefghij")
    assert evaluation_blocks("wikitext2", tokenizer, 10).ids.shape == (1, 10)
    with pytest.raises(ValueError, match=r"'wikitext2' \(test\) holds 10 tokens.* window of 11;"):
        evaluation_blocks("wikitext2", tokenizer, 11)
    with pytest.raises(ValueError, match="window must be at least 2, not 1"):
        evaluation_blocks("wikitext2", tokenizer, 1)
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        evaluation_blocks("wikitext2", tokenizer, 5, limit=0)


def test_calibration_is_drawn_from_the_other_text(wikitext, tokenizer):
    wikitext("t" * 50, valid="v" * 60)
    blocks = calibration_blocks("wikitext2", tokenizer, samples=3, length=4, seed=0)
    assert blocks.ids.tolist() == [list(b"vvvv")] * 3
    assert (blocks.split, blocks.tokens) == ("validation", 60)


def test_the_draw_repeats_with_its_seed(wikitext):
    wikitext("t", valid="v" * 5000)
    draws = [calibration_blocks("wikitext2", positions, 8, 100, seed).ids for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(5)  # the global generator plays no part
    assert torch.equal(calibration_blocks("wikitext2", positions, 8, 100, 0).ids, draws[0])


@pytest.mark.parametrize("tokens, samples", [(200, 10), (203, 10), (219, 10), (205, 3)])
def test_windows_do_not_overlap_in_a_long_text(wikitext, tokens, samples):
    wikitext("t", valid="v" * tokens)
    seen = torch.zeros(tokens, dtype=torch.bool)
    for seed in range(500):
        ids = calibration_blocks("wikitext2", positions, samples, 20, seed).ids
        assert ids.shape == (samples, 20)
        assert torch.equal(ids, ids[:, :1] + torch.arange(20)), "a window is consecutive tokens"
        assert len(ids.unique()) == samples * 20
        seen[ids.flatten()] = True
    assert seen.all(), "every token can be drawn"


def test_a_short_text_gives_windows_that_overlap_and_differ(wikitext):
    wikitext("t", valid="v" * 400)
    ids = calibration_blocks("wikitext2", positions, 64, 100, seed=0).ids
    assert torch.equal(ids, calibration_blocks("wikitext2", positions, 64, 100, seed=0).ids)
    starts = ids[:, 0]
    assert len(starts.unique()) == 64 and starts.min() >= 0 and ids.max() < 400
    assert starts.max() - starts.min() > 200, "starts range over the text"
    assert len(calibration_blocks("wikitext2", positions, 301, 100, 0).ids) == 301
    with pytest.raises(ValueError, match="too few to draw 302 samples of 100"):
        calibration_blocks("wikitext2", positions, 302, 100, 0)  # 301 places to start from


def test_refuses_a_text_too_short_to_draw_from(wikitext):
    wikitext("t", valid="v" * 399)
    assert calibration_blocks("wikitext2", positions, 3, 100, 0).ids.shape == (3, 100)
    message = r"'wikitext2' \(validation\) holds 399 tokens, too few to draw 4 samples of 100"
    with pytest.raises(ValueError, match=message):
        calibration_blocks("wikitext2", positions, 4, 100, 0)
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        calibration_blocks("wikitext2", positions, 0, 100, 0)
    with pytest.raises(ValueError, match="length must be at least 1, not 0"):
        calibration_blocks("wikitext2", positions, 1, 0, 0)


def test_sample_serves_the_usual_sizes(tokenizer):
    assert evaluation_blocks("sample", tokenizer, 1024).ids.shape == (70, 1024)
    assert calibration_blocks("sample", tokenizer, 64, 512, 0).ids.shape == (64, 512)


def test_fingerprint_covers_both_texts(wikitext):
    prints = []
    for texts in (("a", "b"), ("a", "c"), ("d", "b"), ("b", "a"), ("a", "b")):
        wikitext(*texts)
        prints.append(data.fingerprint("wikitext2"))
    assert len(set(prints)) == 4 and prints[0] == prints[4]
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in prints)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UnknownData, match="no data and no file 'wikitex2'; did you mean wikitext2"):
        data.check("wikitex2")
    with pytest.raises(UnknownData, match="known: c4, ptb, sample, wikitext103, wikitext2"):
        data.check("")


@pytest.mark.parametrize("name", ["no/such/file.txt", "none.jsonl", "https://example.org/a.txt"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(UnknownData, match=f"data file '{name}' does not exist"):
        data.check(name)


def test_only_regular_files_of_a_known_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "folder.txt").mkdir()
    for name in ("notes.md", "./notes.md", "folder.txt", str(tmp_path), "/dev/null"):
        with pytest.raises(ValueError, match=r"is not a file ending in \.txt, \.jsonl") as caught:
            data.check(name)
        assert not isinstance(caught.value, UnknownData)


def test_every_name_is_disjoint_from_itself(wikitext, tmp_path):
    wikitext(prose(1, 500), prose(2, 500))
    for name in ("sample", "wikitext2", write_paragraphs(tmp_path / "a.txt", seed=3)):
        check_disjoint(name, name)
    check_disjoint("sample", "wikitext2")
    check_disjoint("wikitext2", str(tmp_path / "a.txt"))


def test_refuses_a_copy_of_the_file_under_another_path(tmp_path):
    first = write_paragraphs(tmp_path / "a.txt", seed=1)
    copy = str(shutil.copy(first, tmp_path / "b.txt"))
    (tmp_path / "link.txt").symlink_to(first)
    for other in (copy, str(tmp_path / "link.txt"), f"{tmp_path}/./a.txt"):
        with pytest.raises(ValueError, match=r"holds 100\.0% of the evaluation text") as caught:
            check_disjoint(first, other)
        assert "--calibration" in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_calibration_split_of_a_known_name_counts(wikitext, tmp_path):
    wikitext(prose(1, 500), prose(2, 500))
    shutil.copytree(tmp_path / "wikitext-2-raw", tmp_path / "wikitext-103-raw")
    check_disjoint("wikitext103", "wikitext2")  # one test split, calibrated on validation


@pytest.mark.parametrize("place", [0, 5, 10])
def test_refuses_a_file_that_holds_the_evaluation_text(wikitext, tmp_path, place):
    wikitext(prose(1, 500), prose(2, 500))
    paragraphs = [prose(100 + n, 60) for n in range(10)]
    paragraphs.insert(place, prose(1, 500).replace("\n", " "))
    (tmp_path / "all.txt").write_text("\n\n".join(paragraphs))
    with pytest.raises(ValueError, match=r"all\.txt' holds 100\.0% of the evaluation text of"):
        check_disjoint("wikitext2", str(tmp_path / "all.txt"))


def test_refuses_splits_that_share_a_paragraph(wikitext, tmp_path):
    leaked = prose(9, 120)
    wikitext(prose(1, 5000) + "\n" + leaked, prose(2, 5000) + leaked)
    with pytest.raises(ValueError, match=leaked[:30]):
        check_disjoint("wikitext2", "wikitext2")
