"""checkpoint: the same bytes back, folders that transformers reads, bad files refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compress
from compress import checkpoint
from compress.base import TorchRunner
from compress.layers import LinearFromConv1D, conv1d_to_linear


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(model, ids):
    return TorchRunner(model).logits(ids)


def test_conv1d_becomes_linear_exactly(tiny_gpt2, token_ids):
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    expected = logits(plain, token_ids)
    assert sum(isinstance(module, Conv1D) for module in plain.modules()) == 8
    converted = conv1d_to_linear(plain)
    assert sum(isinstance(module, LinearFromConv1D) for module in converted.modules()) == 8
    torch.testing.assert_close(logits(converted, token_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_gpt2"])
def test_a_plain_save_is_what_transformers_reads(folder, request, token_ids, tmp_path):
    source = request.getfixturevalue(folder)
    model = checkpoint.load(source)
    checkpoint.save(model, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ours = checkpoint.load(tmp_path / "plain")
    assert torch.equal(logits(ours, token_ids), logits(model, token_ids))
    torch.testing.assert_close(logits(theirs, token_ids), logits(ours, token_ids))
    assert (
        load_file(tmp_path / "plain" / "model.safetensors").keys()
        == load_file(source / "model.safetensors").keys()
    )


def test_a_tied_head_is_stored_once_and_comes_back_tied(gpt2, tmp_path):
    checkpoint.save(gpt2, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    again = checkpoint.load(tmp_path / "tied")
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("name", compress.names())
def test_saved_twice_gives_the_same_bytes(name, model, token_ids, tmp_path):
    settings = {"group_size": 32} if hasattr(compress.get(name), "group_size") else {}
    method = compress.get(name, **settings)
    small = method.compress(model, token_ids if method.needs_calibration else None)
    method.save(small, tmp_path / "a")
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "b", method)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_sharded_and_unprefixed_files_load(tiny_gpt2, token_ids, tmp_path):
    tensors = load_file(tiny_gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a buffer that old checkpoints carry
    names = sorted(bare)
    (tmp_path / "config.json").write_bytes((tiny_gpt2 / "config.json").read_bytes())
    save_file({n: bare[n] for n in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: bare[n] for n in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    expected = logits(checkpoint.load(tiny_gpt2), token_ids)
    assert torch.equal(logits(checkpoint.load(tmp_path), token_ids), expected)


def test_rotary_angles_stay_in_float32(llama, tmp_path):
    small = compress.apply("cast", llama)
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    assert small.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a 4-bit model."""
    checkpoint.save(compress.apply("rtn(group_size=32)", llama), tmp_path / "saved")
    return tmp_path / "saved"


def test_truncated_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or cut short"):
        checkpoint.load(saved)


@pytest.mark.parametrize("length", [2**60, 10, 0])
def test_a_header_that_lies_about_its_length(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        checkpoint.load(saved)


@pytest.mark.parametrize("file", ["config.json", "compression.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_broken_json(saved, file, text):
    (saved / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda layers: layers["model.layers.0.mlp.up_proj"].update(bits=3), "wrong shape"),
        (lambda layers: layers["model.layers.0.mlp.up_proj"].update(kind="evil"), "unknown kind"),
        (lambda layers: layers["model.layers.0.mlp.up_proj"].update(in_features=2**40), "whole"),
        (lambda layers: layers["model.layers.0.mlp.up_proj"].update(in_features=32), "not fit"),
        (lambda layers: layers["model.layers.0.mlp.up_proj"].update(dtype="float32"), "wrong type"),
        (lambda layers: layers.update(nowhere={"kind": "quant"}), "nowhere"),
        (lambda layers: layers.pop("model.layers.0.mlp.up_proj"), "weights do not fit"),
    ],
)
def test_layers_that_do_not_fit_the_file(saved, change, message):
    about = json.loads((saved / "compression.json").read_text())
    change(about["layers"])
    (saved / "compression.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_other_programs_folders(saved, tmp_path, llama):
    about = json.loads((saved / "compression.json").read_text())
    (saved / "compression.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(ValueError, match="not of this program's format"):
        checkpoint.load(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    (saved / "compression.json").unlink()
    with pytest.raises(ValueError, match="model_type 'bert'; supported: llama, gpt2"):
        checkpoint.load(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    with pytest.raises(ValueError, match=r"config\.json does not describe a model"):
        checkpoint.load(saved)
    (saved / "config.json").write_text(json.dumps(config | {"quantization_config": {"x": 1}}))
    with pytest.raises(ValueError, match="quantized already"):
        checkpoint.load(saved)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"not a model folder: config\.json is missing"):
        checkpoint.load(empty)
    (empty / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a model folder"):
        checkpoint.save(llama, empty)
    assert (empty / "notes.txt").read_text() == "mine"
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="convert its pickled weights"):
        checkpoint.load(saved)


def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(llama, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_replaces_its_own_older_save(llama, tmp_path, token_ids):
    checkpoint.save(compress.apply("rtn(group_size=32)", llama), tmp_path / "m")
    expected = bytes_of(tmp_path / "m")
    checkpoint.save(checkpoint.load(tmp_path / "m"), tmp_path / "m")
    assert bytes_of(tmp_path / "m") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
