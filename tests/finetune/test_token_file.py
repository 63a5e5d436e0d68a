"""token_file: the bytes of the format by hand, round trips, whole files or none, refusals."""

import copy
import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from finetune.text import token_file
from finetune.text.token_file import TokenFile, TokenWriter, tokenizer_sha256

SOURCES = [{"name": "a.txt", "sha256": "0" * 64}]


def write(path, tokens, vocabulary=300, **about):
    with TokenWriter(path, vocabulary, "abc", SOURCES, **about) as writer:
        writer.append(tokens)
    return path


def test_the_bytes_are_as_described(tmp_path):
    path = write(tmp_path / "a.tokens", [1, 2, 258], end=0)
    raw = path.read_bytes()
    magic, length = struct.unpack("<8sQ", raw[:16])
    assert (magic, length, len(raw)) == (b"SLIMTOKS", 4080, 4096 + 6)
    assert raw[4096:] == b"\x01\x00\x02\x00\x02\x01"
    assert json.loads(raw[16:4096]) == {
        "format": "slimbench tokens", "version": 1, "dtype": "uint16", "tokens": 3, "documents": 1,
        "vocabulary": 300, "tokenizer_sha256": "abc", "sources": SOURCES, "end": 0,
        "content_sha256": hashlib.sha256(raw[4096:]).hexdigest(),
    }  # fmt: skip
    file = TokenFile(path)
    assert file.header == json.loads(raw[16:4096])
    assert file.sha256() == hashlib.sha256(raw[16:4096].rstrip()).hexdigest()
    assert write(tmp_path / "b.tokens", [1, 2, 258], end=0).read_bytes() == raw


@pytest.mark.parametrize("vocabulary, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_round_trip_at_the_border_of_uint16(tmp_path, vocabulary, dtype, monkeypatch):
    monkeypatch.setattr(token_file, "CHUNK", 1000)
    tokens = np.random.default_rng(0).integers(0, vocabulary, 12345)
    tokens[0] = vocabulary - 1
    with TokenWriter(tmp_path / "a.tokens", vocabulary) as writer:
        writer.append(tokens[:5000], 3)
        writer.append(tokens[5000:].tolist(), 2)
    file = TokenFile(tmp_path / "a.tokens")
    assert file.tokens.dtype == dtype and isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable and file.tokens.offset % 4096 == 0
    assert np.array_equal(file.tokens, tokens) and len(file) == 12345
    assert file.header["documents"] == 5
    file.verify()
    window = file.window(4990, 20)
    assert window.dtype == torch.int64 and torch.equal(window, torch.tensor(tokens[4990:5010]))
    window += 1  # a copy: the file stays
    assert torch.equal(file.window(4990, 20), window - 1)
    assert file.window(12345, 0).shape == (0,)


def test_many_sources_make_a_longer_header(tmp_path):
    sources = [{"name": f"{n}.txt", "sha256": "f" * 64} for n in range(500)]
    with TokenWriter(tmp_path / "a.tokens", 10, "abc", sources) as writer:
        writer.append([1, 2, 3])
    file = TokenFile(tmp_path / "a.tokens")
    assert file.header["sources"] == sources and file.tokens.tolist() == [1, 2, 3]
    assert file.tokens.offset > 4096 and file.tokens.offset % 4096 == 0


def test_a_file_without_tokens(tmp_path):
    with TokenWriter(tmp_path / "a.tokens", 10):
        pass
    assert len(TokenFile(tmp_path / "a.tokens")) == 0
    assert TokenFile(tmp_path / "a.tokens").window(0, 0).shape == (0,)


def test_whole_or_not_at_all(tmp_path):
    path = write(tmp_path / "a.tokens", [1])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenWriter(path, 10) as writer:
        writer.append([2, 3])
        assert path.read_bytes() == before
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.tokens"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [300, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=rf"a\.tokens: id {bad} with 300 tokens in all"):
        write(tmp_path / "a.tokens", [1, bad, 2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start, length", [(-1, 2), (0, 4), (3, 1), (2, -1)])
def test_a_window_outside_is_refused(tmp_path, start, length):
    file = TokenFile(write(tmp_path / "a.tokens", [1, 2, 3]))
    with pytest.raises(ValueError, match="has 3 tokens: none from"):
        file.window(start, length)


def damaged(raw: bytes, **changes: object) -> bytes:
    header = json.loads(raw[16:4096]) | changes
    return raw[:16] + json.dumps(header).encode().ljust(4080) + raw[4096:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: b"", "is not a token file"),
        (lambda raw: b"PK" + raw[2:], "is not a token file"),
        (lambda raw: raw[:12], "is cut short"),
        (lambda raw: raw[:1000], "a header of 4080 bytes"),
        (lambda raw: raw[:8] + struct.pack("<Q", 4081) + raw[16:], "a header of 4081 bytes"),
        (lambda raw: raw[:8] + struct.pack("<Q", 2**63 + 4080) + raw[16:], "a header of 92233"),
        (lambda raw: raw[:8] + struct.pack("<Q", 8176) + raw[16:], "a header of 8176 bytes"),
        (lambda raw: raw[:-1], "has 4101 bytes where 3 tokens of 2 bytes need 4102"),
        (lambda raw: raw + b"\0", "has 4103 bytes"),
        (lambda raw: raw[:20] + b"\xff" + raw[21:], "damaged header"),
        (lambda raw: raw[:16] + b"[" * 4080 + raw[4096:], "damaged header"),
        (lambda raw: raw[:16] + b"[]".ljust(4080) + raw[4096:], "is not a token file's"),
        (lambda raw: damaged(raw, format="x"), "is not a token file's"),
        (lambda raw: damaged(raw, version=2), "version 2, not 1"),
        (lambda raw: damaged(raw, dtype="object"), "dtype 'object'; one of uint16, uint32"),
        (lambda raw: damaged(raw, dtype=["uint16"]), "dtype"),
        (lambda raw: damaged(raw, dtype="uint32"), "has 4102 bytes where 3 tokens of 4 bytes"),
        (lambda raw: damaged(raw, tokens=2**62), "bytes where"),
        (lambda raw: damaged(raw, tokens=-1), "tokens is -1"),
        (lambda raw: damaged(raw, tokens=True), "tokens is True"),
        (lambda raw: damaged(raw, documents="1"), "documents is '1'"),
        (lambda raw: damaged(raw, content_sha256=None), "no content_sha256"),
        (lambda raw: damaged(raw, sources=None), "no sources"),
    ],
)
def test_damage_is_refused(tmp_path, change, message):
    path = write(tmp_path / "a.tokens", [1, 2, 3])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        TokenFile(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changed_tokens_are_found_by_verify(tmp_path):
    path = write(tmp_path / "a.tokens", [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="its tokens have changed"):
        TokenFile(path).verify()


def test_a_copy_opens_the_file_again(tmp_path):
    file = TokenFile(write(tmp_path / "a.tokens", [1, 2, 3]))
    assert file.__reduce__() == (TokenFile, (file.path,)), "what is sent to another process"
    assert np.array_equal(copy.copy(file).tokens, file.tokens)


def test_tokenizer_sha256_is_of_the_vocabulary():
    class Stub:
        def __init__(self, vocab):
            self.get_vocab = lambda: vocab

    one = tokenizer_sha256(Stub({"a": 0, "b": 1}))
    assert one == hashlib.sha256(b'[["a", 0], ["b", 1]]').hexdigest()
    assert tokenizer_sha256(Stub({"b": 1, "a": 0})) == one
    assert tokenizer_sha256(Stub({"b": 0, "a": 1})) != one
