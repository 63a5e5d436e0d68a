"""checkpoint: the same bytes back, folders that transformers reads, saves that are whole or not."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
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


def test_rotary_angles_stay_in_float32(llama):
    small = compress.apply("cast", llama)
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    assert small.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("said, dtype", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_config_names_the_type_of_the_file_and_not_the_source(model, tmp_path, said, dtype):
    model.config.dtype = getattr(torch, said)
    checkpoint.save(compress.apply("cast", model, dtype=dtype), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == dtype
    stored = load_file(tmp_path / "m" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, dtype)}
    assert model.config.dtype == getattr(torch, said)  # the caller's is left alone


def test_a_tied_head_is_stored_once_and_comes_back_tied(gpt2, tmp_path):
    checkpoint.save(gpt2, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    again = checkpoint.load(tmp_path / "tied")
    assert again.lm_head.weight is again.transformer.wte.weight
    gpt2.lm_head.weight = nn.Parameter(gpt2.lm_head.weight.clone(), False)  # equal, but a copy
    checkpoint.save(gpt2, tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(tmp_path / "tied")


def test_a_head_of_its_own_in_a_model_said_to_be_tied_is_refused(gpt2, token_ids, tmp_path):
    head = gpt2.lm_head.weight.clone()
    head[7, 3] += 1
    gpt2.lm_head.weight = nn.Parameter(head, False)
    with pytest.raises(ValueError, match="tie_word_embeddings = False"):
        checkpoint.save(gpt2, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    gpt2.config.tie_word_embeddings = False  # the cure that the message names
    checkpoint.save(gpt2, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert torch.equal(again.lm_head.weight, head)
    torch.testing.assert_close(logits(again, token_ids), logits(gpt2, token_ids))


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), SafetensorError(f"I/O error: {FULL}")])
def test_a_full_disk_leaves_what_was_there(llama, tmp_path, monkeypatch, error):
    def full(tensors, path, **options):
        path.write_bytes(b"half of i")
        raise error

    checkpoint.save(llama, tmp_path / "old")
    before = bytes_of(tmp_path / "old")
    monkeypatch.setattr(checkpoint, "save_file", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match=FULL):
            checkpoint.save(llama, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert bytes_of(tmp_path / "old") == before


def test_replaces_its_own_older_save(llama, tiny_llama, tmp_path):
    checkpoint.save(compress.apply("rtn(group_size=32)", llama), tmp_path / "m")
    expected = bytes_of(tmp_path / "m")
    checkpoint.save(checkpoint.load(tmp_path / "m"), tmp_path / "m")
    assert bytes_of(tmp_path / "m") == expected
    checkpoint.save(checkpoint.load(tiny_llama), tmp_path / "m")  # leaves no compression.json
    assert sorted(bytes_of(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("extra", ["tokenizer.json", "model.safetensors.index.json", "notes.txt"])
def test_a_folder_with_files_of_others_is_refused_and_untouched(llama, tmp_path, extra):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / extra).write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not a saved model's"):
        checkpoint.save(llama, folder)
    assert bytes_of(folder) == {"config.json": b"{}", extra: b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_file_in_the_place_of_the_folder_is_refused_and_untouched(llama, tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(ValueError, match="choose a new folder"):
        checkpoint.save(llama, tmp_path / "m")
    assert bytes_of(tmp_path) == {"m": b"mine"}
