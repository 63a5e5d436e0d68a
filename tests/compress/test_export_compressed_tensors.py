"""compressed-tensors: the layouts by their definition, the same model back, refusals, lies."""

import json

import pytest
import torch
from export_folders import (
    DOWN,
    UP,
    assert_cannot_hold,
    assert_same,
    change_settings,
    change_tensor,
    exported,
    refused,
    settings_of,
    tensors_of,
)

import compress
from compress.base import TorchRunner
from compress.dynamic_linear import Int8DynamicLinear
from compress.export import read
from compress.model_files import our_layers


def unpacked(words, bits):
    """(rows, words) int32 -> (rows, codes): 32 / bits in a word, the first in its low bits."""
    parts = [(words.long() >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim=-1).flatten(1)


METHODS = [
    *("rtn(group_size=32)", "rtn(group_size=32,symmetric=true)", "rtn(group_size=-1)"),
    *("rtn(bits=8,group_size=32)", "int8_sym", "gptq(group_size=32,dtype=float16)"),
    *("rtn(group_size=32,dtype=float32)", "awq(group_size=32)", "dynamic"),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_model_comes_back(method, llama, token_ids, tmp_path):
    small, folder = exported(llama, "compressed-tensors", tmp_path / "m", method, token_ids)
    assert_same(small, read(folder), token_ids)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_packed_tensors_mean_the_weights_by_the_definition(method, llama, token_ids, tmp_path):
    small, folder = exported(llama, "compressed-tensors", tmp_path / "m", method, token_ids)
    tensors, settings = tensors_of(folder), settings_of(folder)
    weights = settings["config_groups"]["group_0"]["weights"]
    assert settings["format"] == "pack-quantized" and settings["ignore"] == ["lm_head"]
    for name, layer in our_layers(small).items():
        bits, (rows, columns) = layer.bits, tensors[f"{name}.weight_shape"].tolist()
        codes = unpacked(tensors[f"{name}.weight_packed"], bits)[:, :columns]
        zero = torch.tensor([[2 ** (bits - 1)]])
        assert (f"{name}.weight_zero_point" in tensors) is not weights["symmetric"]
        if not weights["symmetric"]:
            zero = unpacked(tensors[f"{name}.weight_zero_point"].T, bits)[:, :rows].T
        scale = tensors[f"{name}.weight_scale"]
        assert scale.dtype == layer.scale.dtype
        size = weights.get("group_size", columns)
        assert weights["strategy"] == ("channel" if size == columns else "group")
        steps = codes - zero.expand_as(scale).repeat_interleave(size, 1)
        weight = steps * scale.float().repeat_interleave(size, 1)
        assert torch.equal(weight, layer.weight(torch.float32)), name


def test_int8_inputs_are_described_as_the_layer_takes_them(llama, tmp_path):
    small, folder = exported(llama, "compressed-tensors", tmp_path / "m", "dynamic")
    settings, tensors = settings_of(folder), tensors_of(folder)
    assert settings["format"] == "int-quantized"
    assert settings["config_groups"]["group_0"]["input_activations"] == {
        **{"num_bits": 8, "type": "int", "symmetric": False},
        **{"strategy": "token", "dynamic": True},
    }
    layer = our_layers(small)[UP]
    assert type(our_layers(read(folder))[UP]) is Int8DynamicLinear
    weight = tensors[f"{UP}.weight"]
    assert weight.dtype == torch.int8 and tensors[f"{UP}.weight_scale"].shape == (160, 1)
    scale = tensors[f"{UP}.weight_scale"].float()
    assert torch.equal(weight.float() * scale, layer.weight(torch.float32))


def test_the_input_grid_is_that_of_the_library(llama, token_ids, tmp_path):
    """Its arithmetic written out: scale (max - min) / 255, zero rounded, codes from -128 to 127."""
    small, folder = exported(llama, "compressed-tensors", tmp_path / "m", "dynamic(dtype=float32)")
    layer, tensors = our_layers(small)[UP], tensors_of(folder)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    scale = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
    zero = torch.round(-128 - x.amin(1, keepdim=True) / scale)
    codes = torch.clamp(torch.round(x / scale + zero), -128, 127)
    weight = tensors[f"{UP}.weight"].float() * tensors[f"{UP}.weight_scale"]
    torch.testing.assert_close(layer(x), (codes - zero) * scale @ weight.T, rtol=1e-5, atol=1e-5)


def test_what_is_left_in_floating_point_is_ignored_by_name(llama, tmp_path):
    method = "rtn(group_size=32,skip=['lm_head','down_proj'])"
    _, folder = exported(llama, "compressed-tensors", tmp_path / "m", method)
    assert DOWN in settings_of(folder)["ignore"]
    assert DOWN not in our_layers(read(folder))


def test_a_head_of_its_own_may_have_codes(llama, token_ids, tmp_path):
    method = "rtn(group_size=32,skip=[])"
    small, folder = exported(llama, "compressed-tensors", tmp_path / "m", method)
    assert settings_of(folder)["ignore"] == []
    assert_same(small, read(folder), token_ids)  # 257 rows: zeros do not fill their words


@pytest.mark.parametrize(
    "method, message",
    [
        ("rtn(bits=3)", "q_proj has 3-bit codes; this format holds 4 and 8"),
        ("rtn(group_size=64)", "layers.0.mlp.down_proj has 160 inputs, no multiple of its group"),
        ("gptq(group_size=32,static_groups=false)", "q_proj has groups in act-order"),
        ("dynamic_fp16", "q_proj is a Float16Linear; this format holds linear layers as"),
    ],
)
def test_methods_that_the_format_cannot_hold(llama, token_ids, tmp_path, method, message):
    assert_cannot_hold(llama, "compressed-tensors", tmp_path / "m", method, message, token_ids)


def test_gpt2_and_mixed_kinds_of_layers_are_refused(gpt2, llama, tmp_path):
    with pytest.raises(ValueError, match="GPT-2's layers are Conv1D in other runtimes"):
        exported(gpt2, "compressed-tensors", tmp_path / "m", "rtn(group_size=32)")
    small = compress.apply("rtn(bits=8,group_size=-1,symmetric=true)", llama)
    layer = small.get_submodule(UP)
    parts = (layer.codes, layer.scale, None, None, 8, 64, 64)
    small.set_submodule(UP, Int8DynamicLinear(*parts))
    with pytest.raises(ValueError, match="layers with int8 inputs and layers without"):
        compress.export(small, tmp_path / "m", "compressed-tensors")


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a 4-bit model."""
    return exported(llama, "compressed-tensors", tmp_path / "saved")[1]


def change_group(folder, key, **changes):
    """Change a part of the only group, as a dictionary, or one of its values with key None."""
    group = settings_of(folder)["config_groups"]["group_0"]
    group = group | ({key: group[key] | changes} if key else changes)
    change_settings(folder, config_groups={"group_0": group})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_bits": 3}, "num_bits = 3 is not supported"),
        ({"num_bits": 8}, "weight_packed has the wrong shape"),
        ({"num_bits": -4}, "num_bits = -4 is not supported"),
        ({"type": "float"}, "type = 'float' is not supported"),
        ({"strategy": "block"}, "strategy = 'block' is not supported"),
        ({"strategy": "tensor"}, "strategy = 'tensor' is not supported"),
        ({"strategy": "channel"}, "weight_scale has the wrong shape"),
        ({"group_size": 0}, "group_size = 0 is no size"),
        ({"group_size": 2**60}, "group_size = .* is no size"),
        ({"group_size": 48}, "no multiple of groups of 48"),
        ({"group_size": 16}, "weight_scale has the wrong shape"),
        ({"actorder": "group"}, "actorder = 'group' is not supported"),
        ({"dynamic": True}, "dynamic = True is not supported"),
        ({"symmetric": True}, "weight_zero_point is no part"),
    ],
)
def test_weights_that_make_no_sense_or_are_not_supported(saved, changes, message):
    change_group(saved, "weights", **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "marlin-24"}, "format = 'marlin-24' is not supported"),
        ({"format": "nvfp4-pack-quantized"}, "is not supported"),
        ({"format": "int-quantized"}, "input_activations: num_bits = None"),
        ({"sparsity_config": {"format": "dense"}}, "sparsity_config = .* is not supported"),
        ({"transform_config": {"x": 1}}, "transform_config = .* is not supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme = .* is not supported"),
        ({"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
        ({"config_groups": {}}, "0 groups; one is supported"),
        ({"config_groups": {"a": {}, "b": {}}}, "2 groups; one is supported"),
        ({"config_groups": {"a": []}}, "a must be a JSON object"),
        ({"config_groups": "W4A16"}, "config_groups must be a JSON object"),
    ],
)
def test_settings_that_make_no_sense_or_are_not_supported(saved, changes, message):
    change_settings(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_activations": {"num_bits": 8}}, "output_activations = .* is not supported"),
        ({"input_activations": {"num_bits": 8}}, "input_activations = .* is not supported"),
        ({"format": "float-quantized"}, "format = 'float-quantized' is not supported"),
    ],
)
def test_activations_of_packed_weights_are_refused(saved, changes, message):
    change_group(saved, None, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"symmetric": True}, "symmetric = True is not supported"),
        ({"dynamic": False}, "dynamic = False is not supported"),
        ({"dynamic": "local"}, "dynamic = 'local' is not supported"),
        ({"strategy": "tensor"}, "strategy = 'tensor' is not supported"),
        ({"num_bits": 4}, "num_bits = 4 is not supported"),
        ({"type": "float"}, "type = 'float' is not supported"),
        ({"group_size": 32}, "group_size = 32 is not supported"),
    ],
)
def test_inputs_that_are_quantized_in_another_way_are_refused(llama, tmp_path, changes, message):
    _, folder = exported(llama, "compressed-tensors", tmp_path / "m", "dynamic")
    change_group(folder, "input_activations", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("weight_packed", lambda x: x.long(), "weight_packed has the wrong type"),
        ("weight_packed", lambda x: x[:, 1:], "weight_packed has the wrong shape"),
        ("weight_packed", lambda x: None, "weight_packed is missing"),
        ("weight_scale", lambda x: x.int(), "weight_scale has the wrong type"),
        ("weight_scale", lambda x: x * float("nan"), "weight_scale holds NaN"),
        ("weight_scale", lambda x: None, "an unknown tensor|the file lacks"),
        ("weight_zero_point", lambda x: x.T, "weight_zero_point has the wrong shape"),
        ("weight_zero_point", lambda x: x.to(torch.int8), "weight_zero_point has the wrong type"),
        ("weight_shape", lambda x: x * 2, r"weight_shape is \[320, 128\], not \[160, 64\]"),
        ("weight_shape", lambda x: x.float(), "weight_shape has the wrong type"),
    ],
)
def test_tensors_that_do_not_fit(saved, part, change, message):
    change_tensor(saved, f"{UP}.{part}", change)
    refused(saved, message)


def test_int8_weights_are_checked_too(llama, tmp_path):
    _, folder = exported(llama, "compressed-tensors", tmp_path / "m", "dynamic")
    change_tensor(folder, f"{UP}.weight", lambda x: x.to(torch.uint8))
    refused(folder, f"{UP}.weight has the wrong type: torch.uint8")


def test_a_type_that_cannot_hold_the_scales_makes_the_model_compute_in_float32(
    llama, token_ids, tmp_path
):
    small, folder = exported(
        llama, "compressed-tensors", tmp_path / "m", "rtn(group_size=32,dtype=float16)"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    again = read(folder)
    layer = our_layers(again)[UP]
    assert layer.scale.dtype == torch.float16 and again.model.norm.weight.dtype == torch.float32
    assert torch.equal(layer.weight(torch.float32), our_layers(small)[UP].weight(torch.float32))
    expected = TorchRunner(small).logits(token_ids)
    torch.testing.assert_close(TorchRunner(again).logits(token_ids), expected, rtol=0, atol=0.05)
