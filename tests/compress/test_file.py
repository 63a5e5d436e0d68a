"""file: the very bytes, the codes kept, what is refused; how it is written on a command line."""

import hashlib
import json
import os

import pytest
import torch

import compress
from compress import registry
from compress.base import TorchRunner
from compress.methods.file import File, checksum


@pytest.fixture
def artefact(llama, tiny_llama, tmp_path):
    """(model, folder with model.gguf) of a Llama in 4-bit codes."""
    small = compress.apply("rtn(group_size=32)", llama)
    compress.export(small, tmp_path / "theirs", format="gguf", tokenizer=tiny_llama)
    return small, tmp_path / "theirs"


def test_the_same_bytes_the_same_codes_the_same_logits(artefact, tiny_llama, token_ids, tmp_path):
    small, theirs = artefact
    for path in (theirs, theirs / "model.gguf"):
        method = File(path=str(path)).pinned()
        assert method.format == "gguf"
        saved = tmp_path / path.name / "saved"
        saved.mkdir(parents=True)
        method.save(method.compress(method.read(tiny_llama)), saved)
        assert [file.name for file in saved.iterdir()] == ["model.gguf"]
        assert os.path.samefile(saved / "model.gguf", theirs / "model.gguf"), "a hard link"
        assert not (saved / "model.gguf").is_symlink()
        runner = method.load(saved)
        name = "model.layers.1.mlp.up_proj"
        layer, mine = runner.model.get_submodule(name), small.get_submodule(name)
        assert torch.equal(layer.weight(torch.float32), mine.weight(torch.float32))
        expected = TorchRunner(small.float()).logits(token_ids)
        torch.testing.assert_close(runner.logits(token_ids), expected, rtol=1e-4, atol=1e-4)


def test_a_link_is_followed_and_pickles_and_code_stay_behind(artefact, tmp_path):
    _, theirs = artefact
    for name in ("pytorch_model.bin", "modeling.py", "config.txt"):
        (theirs / name).write_text(name)
    hub = tmp_path / "hub"
    hub.mkdir()
    for file in theirs.iterdir():
        (hub / file.name).symlink_to(file)
    saved = tmp_path / "saved"
    saved.mkdir()
    File().save(hub, saved)
    assert sorted(file.name for file in saved.iterdir()) == ["config.txt", "model.gguf"]
    assert not any(file.is_symlink() for file in saved.iterdir())


def test_bytes_are_copied_where_links_cannot_be(artefact, tmp_path, monkeypatch):
    _, theirs = artefact

    def refuse(*paths):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "saved").mkdir()
    File().save(theirs, tmp_path / "saved")
    copy = tmp_path / "saved" / "model.gguf"
    assert copy.read_bytes() == (theirs / "model.gguf").read_bytes()
    assert not os.path.samefile(copy, theirs / "model.gguf")


def test_checksums_by_hand(tmp_path):
    for name, content in {"b.json": b"B", "a.gguf": b"A", "c.py": b"C"}.items():
        (tmp_path / name).write_bytes(content)
    a, b = hashlib.sha256(b"A").hexdigest(), hashlib.sha256(b"B").hexdigest()
    assert checksum(tmp_path / "a.gguf") == a
    both = hashlib.sha256(f"{a}  a.gguf\n{b}  b.json\n".encode()).hexdigest()
    assert checksum(tmp_path) == both
    (tmp_path / "b.json").write_bytes(b"b")
    assert checksum(tmp_path) != both


def test_what_is_refused(artefact, tiny_gpt2, tmp_path):
    _, theirs = artefact
    path = str(theirs / "model.gguf")
    cases = {
        "file needs a path: file:PATH, a GGUF file or a folder": File(),
        f"{tmp_path}/no.gguf: no such file or folder": File(f"{tmp_path}/no.gguf"),
        f"{path} is in the format gguf, not 'awq'": File(path, format="awq"),
        f"{path} has the sha256 {checksum(theirs / 'model.gguf')}, not 00": File(path, "00"),
    }
    for message, method in cases.items():
        with pytest.raises(ValueError) as caught:
            method.pinned()
        assert str(caught.value) == message
    pinned = File(path).pinned()
    with open(path, "ab") as file:
        file.write(b"\0" * 32)
    with pytest.raises(ValueError, match="has the sha256"):
        pinned.read(tiny_gpt2)


def test_another_vocabulary_is_refused(artefact, tiny_llama, tmp_path):
    _, theirs = artefact
    config = json.loads((tiny_llama / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"theirs knows 257 tokens, the parent model 300$"):
        File(str(theirs)).pinned().read(tmp_path)


@pytest.mark.parametrize(
    "text, path",
    [
        ("file:model.gguf", "model.gguf"),
        ("file:/some/where/model.Q4_0.gguf", "/some/where/model.Q4_0.gguf"),
        (" file:my models/a-b_c ", "my models/a-b_c"),
        ("file:~/a(1).gguf", "~/a(1).gguf"),
        ("file:'a, b.gguf'", "a, b.gguf"),
        ("file(path=some/model.gguf)", "some/model.gguf"),
        ('file(path="a, b.gguf")', "a, b.gguf"),
    ],
)
def test_how_it_is_written(text, path):
    [(name, settings)] = registry.parse_list(text)
    assert (name, settings) == ("file", {"path": path})
    pinned = {"path": path, "sha256": "0" * 64, "format": "gguf"}
    written = registry.describe("file", pinned)
    assert registry.parse_list(f"rtn,{written},cast")[1] == ("file", {"path": path})
    assert written.startswith("file:")


def test_it_is_no_method_of_a_program_that_compresses(llama):
    assert "file" in registry.names() and "file" not in compress.names()
    with pytest.raises(ValueError, match=r"^method 'file' does not compress a model; known: awq"):
        compress.apply("file:model.gguf", llama)
