"""What the tests of the three formats of Hugging Face folders share: make, damage, compare."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.base import TorchRunner
from compress.export import read
from compress.model_files import our_layers

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def exported(model, format, folder, method="rtn(group_size=32)", ids=None):
    """(the compressed model, its folder)."""
    small = compress.apply(method, model, ids)
    compress.export(small, folder, format)
    return small, folder


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_settings(folder, **changes):
    change_config(folder, quantization_config=settings_of(folder) | changes)


def change_tensor(folder, name, change):
    """change: from the tensor to another, or to None, which takes it out."""
    tensors = tensors_of(folder)
    tensors[name] = change(tensors[name])
    kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def assert_cannot_hold(model, format, folder, method, message, ids=None):
    """Refused with the reason, and nothing is left where it would have been written."""
    with pytest.raises(ValueError, match=message):
        exported(model, format, folder, method, ids)
    assert not folder.exists()


def assert_same(model, again, ids):
    """The same codes, scales, zeros, biases and types, and the same logits bit for bit."""
    before, after = our_layers(model), our_layers(again)
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert type(layer) is type(after[name]) and layer.spec() == after[name].spec(), name
        tensors, others = layer.state_dict(), after[name].state_dict()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors), name
    plain = {name: value.dtype for name, value in model.named_parameters()}
    assert plain == {name: value.dtype for name, value in again.named_parameters()}
    assert torch.equal(TorchRunner(model).logits(ids), TorchRunner(again).logits(ids))
