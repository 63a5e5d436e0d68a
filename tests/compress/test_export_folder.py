"""The folders of gptq, awq and compressed-tensors: what is in them, and files that lie or lead out.

Whatever is wrong with a folder is one ValueError of one line.
"""

import json
import os
import struct

import pytest
import torch
from export_folders import change_config, change_tensor, exported, refused, tensors_of
from fuzzing import fuzz
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.export import format_of, formats, read
from compress.model_files import our_layers

FORMATS = ("awq", "compressed-tensors", "gptq")


@pytest.fixture(params=FORMATS)
def saved(request, llama, tmp_path):
    """A folder with a 4-bit model in each format."""
    return exported(llama, request.param, tmp_path / "saved")[1]


HELD = [  # GPT-2 as compressed-tensors is refused, see test_export_compressed_tensors.py
    (format, family)
    for format in FORMATS
    for family in ("llama", "gpt2")
    if (format, family) != ("compressed-tensors", "gpt2")
]


@pytest.mark.parametrize("format, family", HELD)
def test_a_folder_is_what_other_runtimes_expect(format, family, request, tmp_path):
    small, folder = exported(request.getfixturevalue(family), format, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(small).__name__]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == format
    assert format_of(folder) == format
    assert not any(key.startswith("_") for key in config)
    tensors = tensors_of(folder)
    if config["model_type"] == "gpt2":
        assert config["tie_word_embeddings"] is True and "lm_head.weight" not in tensors
    else:
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert {tensors[n].dtype for n in tensors if "norm" in n or "embed" in n} <= {torch.bfloat16}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tokenizer_is_copied_but_no_links_and_nothing_else(format, llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "config.json", "secret.txt"):
        (source / name).write_text(name)
    (source / "vocab.json").symlink_to(source / "secret.txt")
    small = compress.apply("rtn(group_size=32)", llama)
    compress.export(small, tmp_path / "m", format, source)
    names = {path.name for path in (tmp_path / "m").iterdir()} - {"quantize_config.json"}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "tokenizer.json"


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_model_gives_the_same_bytes(format, llama, tmp_path):
    small = compress.apply("rtn(group_size=32)", llama)
    for name in ("a", "b"):
        compress.export(small, tmp_path / name, format)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_one_scale_for_all_rows_becomes_one_a_row(format, llama, token_ids, tmp_path):
    small = compress.apply("rtn(group_size=32)", llama)
    for layer in our_layers(small).values():
        layer.scale, layer.zero = layer.scale[:1], layer.zero[:1]
    compress.export(small, tmp_path / "m", format)
    for name, layer in our_layers(read(tmp_path / "m")).items():
        assert torch.equal(layer.weight(), our_layers(small)[name].weight())


@pytest.mark.parametrize("format", FORMATS)
def test_parameters_of_two_types_are_refused(format, llama):
    small = compress.apply("rtn(group_size=32)", llama)
    small.model.embed_tokens.float()
    assert "it mixes bfloat16 and float32" in formats()[format].refusal(small)


def test_truncated_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(saved, r"model\.safetensors is corrupt or cut short")


@pytest.mark.parametrize("length", [2**63, 2**60, 10, 0])
def test_a_header_that_lies_about_its_length(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(saved, r"model\.safetensors is corrupt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_folder(saved, name):
    (saved / name).rename(saved.parent / "elsewhere")
    (saved / name).symlink_to(saved.parent / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the folder") as caught:
        formats()["gptq"].read(saved)
    assert name in str(caught.value)


def test_a_shard_that_is_a_link_out_of_the_folder(saved):
    (saved / "model.safetensors").rename(saved.parent / "elsewhere")
    (saved / "model-1.safetensors").symlink_to(saved.parent / "elsewhere")
    refused(saved, r"model-1\.safetensors is a link that leads out of the folder")


def test_a_link_within_the_folder_is_read(saved):
    (saved / "model.safetensors").rename(saved / "weights")
    (saved / "model.safetensors").symlink_to("weights")
    read(saved)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(saved):
    (saved / "model.safetensors").unlink()
    os.mkfifo(saved / "model.safetensors")
    refused(saved, "is missing or no regular file")


@pytest.mark.parametrize("where", ["../evil.safetensors", "a/b", 5])
def test_an_index_that_leads_out_of_the_folder(saved, where):
    (saved / "model.safetensors").rename(saved.parent / "evil.safetensors")
    index = {"weight_map": {"model.norm.weight": where}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, r"index\.json: 'weight_map' must name files of this folder")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "model_type 'bert'; supported: llama, gpt2"),
        ({"model_type": ["llama"]}, "model_type .*; supported: llama, gpt2"),
        ({"hidden_size": 32}, "has the wrong shape|does not describe a model"),
        ({"intermediate_size": 32}, "has the wrong shape"),
        ({"num_hidden_layers": 4}, "the file lacks model.layers.3"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\..* is no linear layer of the model"),
        ({"num_hidden_layers": 500}, "num_hidden_layers = 500 does not fit .* tensors"),
        ({"vocab_size": 2**40}, "vocab_size = .* does not fit the weights"),
        ({"dtype": "float8"}, "(dtype must be one of|does not describe a model)"),
        ({"dtype": []}, "(dtype must be one of|does not describe a model)"),
    ],
)
def test_a_config_that_is_not_of_these_weights(saved, changes, message):
    change_config(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize("value", [None, [], "gptq", {}, {"quant_method": []}, 3])
def test_a_folder_without_settings_is_in_no_format(saved, value):
    change_config(saved, quantization_config=value)
    refused(saved, "is in none of the formats")
    for name in FORMATS:
        assert not formats()[name].recognises(saved)
        with pytest.raises(ValueError, match=r"config\.json: quantization_config"):
            formats()[name].read(saved)


def test_places_that_are_no_model_are_not_recognised(tmp_path):
    (tmp_path / "file").write_bytes(b"GGUF")
    for name in FORMATS:
        assert not formats()[name].recognises(tmp_path)
        assert not formats()[name].recognises(tmp_path / "file")


def test_a_million_labels_are_not_made(saved):
    """transformers would make a list of names as long as the config says."""
    change_config(saved, num_labels=10**12)
    read(saved)


def test_plain_tensors_are_checked_as_well(saved):
    change_tensor(saved, "model.norm.weight", lambda x: x[:-1])
    refused(saved, "tensor model.norm.weight has the wrong shape")
    change_tensor(saved, "model.norm.weight", lambda x: None)
    refused(saved, "the file lacks model.norm.weight")


def test_no_layer_of_codes(llama, saved, tiny_llama):
    (saved / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    refused(saved, "holds no quantized layer")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_refused_in_one_line_and_cost_no_memory(format, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).eval()
    compress.export(compress.apply("rtn(group_size=32)", model), tmp_path / "m", format)
    seen, grown = fuzz(tmp_path / "m", formats()[format].read, 200)
    assert seen["refused"] > 80 and seen["read"] > 10
    assert grown < 2**26, f"{grown} bytes for files of 30 kB"
