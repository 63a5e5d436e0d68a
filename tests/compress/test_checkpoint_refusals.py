"""checkpoint: whatever is missing, corrupt, huge or not ours is one ValueError that names it."""

import json
import shutil
import struct

import pytest

import compress
from compress import checkpoint

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a 4-bit model."""
    checkpoint.save(compress.apply("rtn(group_size=32)", llama), tmp_path / "saved")
    return tmp_path / "saved"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(saved, r"model\.safetensors is corrupt or cut short")


def test_labels_of_classifiers_make_no_list(saved):
    change_json(saved / "config.json", num_labels=10**12)
    assert len(checkpoint.load(saved).config.id2label) == 2  # transformers' own default


@pytest.mark.parametrize("length", [2**60, 10, 0])
def test_a_header_that_lies_about_its_length(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(saved, r"model\.safetensors is corrupt")


@pytest.mark.parametrize("file", ["config.json", "compression.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_broken_json(saved, file, text):
    (saved / file).write_text(text)
    refused(saved, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda layers: layers[UP].update(bits=3), "wrong shape"),
        (lambda layers: layers[UP].update(bits=[]), "bits must be a positive whole number"),
        (lambda layers: layers[UP].update(kind="evil"), "unknown kind 'evil'"),
        (lambda layers: layers[UP].update(kind={}), "unknown kind {}"),
        (lambda layers: layers.update({UP: []}), "unknown kind None"),
        (lambda layers: layers[UP].update(in_features=2**40), "whole"),
        (lambda layers: layers[UP].update(in_features=32), "not fit"),
        (lambda layers: layers[UP].update(dtype="float32"), "wrong type"),
        (lambda layers: layers[UP].update(dtype=[]), r"dtype must be one of .*, not \[\]"),
        (lambda layers: layers.update(nowhere={"kind": "quant"}), "nowhere"),
        (lambda layers: layers.update({"model.layers.0": layers[UP]}), "not fit"),
        (lambda layers: layers.pop(UP), "weights do not fit"),
    ],
)
def test_layers_that_do_not_fit_the_file(saved, change, message):
    about = json.loads((saved / "compression.json").read_text())
    change(about["layers"])
    (saved / "compression.json").write_text(json.dumps(about))
    refused(saved, message)


@pytest.mark.parametrize("changes", [{"version": 99}, {"format": []}, {"format": "gguf"}])
def test_a_compression_file_of_another_program(saved, changes):
    change_json(saved / "compression.json", **changes)
    refused(saved, "not of this program's format, version 1")


def test_a_list_of_layers_is_no_mapping(saved):
    change_json(saved / "compression.json", layers=[])
    refused(saved, "'layers' must be a mapping")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "model_type 'bert'; supported: llama, gpt2"),
        ({"model_type": []}, r"model_type \[\]; supported: llama, gpt2"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "nonsense"}, r"config\.json does not describe a model"),
        ({"quantization_config": {"x": 1}}, "quantized already"),
        ({"num_hidden_layers": 2}, r"layer 'model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"the file lacks model\.layers\.3\."),
    ],
)
def test_a_config_that_is_not_of_these_weights(saved, changes, message):
    change_json(saved / "config.json", **changes)
    refused(saved, message)


@pytest.mark.parametrize("value", [10**9, 0, -1, 2.5, "64", True, []])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "head_dim", "vocab_size"])
def test_sizes_that_the_file_cannot_hold_are_refused_before_a_model_is_built(
    saved, key, value, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", None)
    change_json(saved / "config.json", **{key: value})
    refused(saved, rf"config\.json: {key} = .* does not fit the weights")


def test_thousands_of_layers_are_refused_before_a_model_is_built(saved, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", None)
    change_json(saved / "config.json", num_hidden_layers=10_000)  # in about 150 kB
    refused(saved, "10000 layers do not fit the weights")


def test_a_tensor_in_two_shards(saved):
    shutil.copy(saved / "model.safetensors", saved / "model-00001-of-00002.safetensors")
    (saved / "model.safetensors").rename(saved / "model-00002-of-00002.safetensors")
    refused(saved, r"model-00002-of-00002\.safetensors .*tensor .* stands in two files")


@pytest.mark.parametrize("where", ["../evil.safetensors", "{parent}/evil.safetensors", "a/b", 5])
def test_an_index_that_leads_out_of_the_folder(saved, where):
    (saved / "model.safetensors").rename(saved.parent / "evil.safetensors")
    if isinstance(where, str):
        where = where.format(parent=saved.parent)
    index = {"weight_map": {"model.norm.weight": where}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, r"index\.json: 'weight_map' must name files of this folder")


@pytest.mark.parametrize("weight_map", [{}, [], None, "model.safetensors"])
def test_an_index_without_files(saved, weight_map):
    index = {"weight_map": weight_map}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, "'weight_map' must name files of this folder")


def test_places_that_are_no_model(saved, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"not a model folder: config\.json is missing")
    refused(tmp_path / "nowhere", r"not a model folder: config\.json is missing")
    refused(saved / "model.safetensors", r"not a model folder: config\.json is missing")
    (saved / "model.safetensors").unlink()
    refused(saved, r"holds no model\.safetensors; nothing to load")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    refused(saved, "convert its pickled weights")
