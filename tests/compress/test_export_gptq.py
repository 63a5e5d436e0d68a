"""gptq: the layout by its definition, the same model back, refusals, files that lie."""

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
from torch import nn

import compress
from compress import checkpoint
from compress.export import gptq, read
from compress.model_files import our_layers
from compress.quant_linear import QuantLinear


def unpacked(words, bits, count):
    """Codes of (words, columns) int32, packed down each column: (count, columns)."""
    columns = []
    for column in words.T.tolist():
        number = sum((word % 2**32) << (32 * k) for k, word in enumerate(column))
        columns.append([number >> (bits * j) & (2**bits - 1) for j in range(count)])
    return torch.tensor(columns).T


def rebuilt(tensors, name, bits, plus):
    """The weight (out, in) that the format's definition gives: scale * (code - zero)."""
    scales, group = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
    zeros = unpacked(tensors[f"{name}.qzeros"].T, bits, scales.shape[1]).T + plus
    codes = unpacked(tensors[f"{name}.qweight"], bits, len(group))
    return (scales[group] * (codes - zeros[group])).T


METHODS = [
    *("rtn(group_size=32)", "rtn(group_size=32,symmetric=true)", "rtn(group_size=-1)"),
    *("rtn(bits=3,group_size=32)", "rtn(bits=2,group_size=64)", "rtn(bits=8,group_size=32)"),
    *("rtn(bits=3,group_size=64,symmetric=true)", "rtn(bits=8,group_size=-1,symmetric=true)"),
    "gptq(group_size=32,dtype=float16)",
]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_model_comes_back(method, model, token_ids, tmp_path):
    small, folder = exported(model, "gptq", tmp_path / "m", method, token_ids)
    assert_same(small, read(folder), token_ids)


@pytest.mark.parametrize("method", [*METHODS, "gptq(group_size=32,static_groups=false)"])
def test_the_tensors_mean_the_weights_by_the_definition(method, model, token_ids, tmp_path):
    small, folder = exported(model, "gptq", tmp_path / "m", method, token_ids)
    settings, tensors = settings_of(folder), tensors_of(folder)
    symmetric = "symmetric=true" in method
    assert settings["sym"] is symmetric
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    for name, layer in our_layers(small).items():
        assert tensors[f"{name}.qweight"].dtype == torch.int32
        assert tensors[f"{name}.qweight"].shape == (
            layer.in_features // 32 * layer.bits,
            layer.out_features,
        )
        assert tensors[f"{name}.qzeros"].shape[1] == layer.out_features // 32 * layer.bits
        assert tensors[f"{name}.scales"].dtype == torch.float16
        weight = rebuilt(tensors, name, layer.bits, int(symmetric))
        assert torch.equal(weight, layer.weight(torch.float32)), name


def test_act_order_is_an_index_of_groups_in_the_order_of_inputs(model, token_ids, tmp_path):
    method = "gptq(group_size=32,static_groups=false)"
    small, folder = exported(model, "gptq", tmp_path / "m", method, token_ids)
    again, tensors = our_layers(read(folder)), tensors_of(folder)
    assert settings_of(folder)["desc_act"] is True
    for name, layer in our_layers(small).items():
        group = tensors[f"{name}.g_idx"]
        assert all(group[layer.order[j]] == j // 32 for j in range(layer.in_features))
        back = again[name]
        assert torch.equal(back.weight(), layer.weight())
        assert torch.equal(back.order, torch.argsort(group, stable=True).int())
        assert torch.equal(back.scale, layer.scale)


def test_symmetric_zeros_are_stored_minus_1_as_version_1_wants(llama, tmp_path):
    _, folder = exported(llama, "gptq", tmp_path / "m", "rtn(group_size=32,symmetric=true)")
    words = tensors_of(folder)[f"{UP}.qzeros"]
    assert (words == 0x77777777).all()


def test_a_zero_of_0_and_groups_of_zeros_survive(llama, token_ids, tmp_path):
    weight = llama.get_submodule(UP).weight
    weight.data[:, :32] = weight.data[:, :32].abs()  # zero 0
    weight.data[5, 32:] = 0  # the least scale there is, too small for float16
    small, folder = exported(llama, "gptq", tmp_path / "m")
    layer, back = our_layers(small)[UP], our_layers(read(folder))[UP]
    assert (layer.codes_and_zero()[1][:, 0] == 0).all() and layer.scale[5, 1] < 1e-37
    assert torch.equal(layer.codes, back.codes) and torch.equal(layer.zero, back.zero)
    assert back.scale[5, 1] == 1
    assert torch.equal(layer.weight(), back.weight())


def test_asymmetric_version_1_of_others_is_read(llama, tmp_path):
    small, folder = exported(llama, "gptq", tmp_path / "m")
    change_settings(folder, checkpoint_format="gptq")
    for name in our_layers(small):
        change_tensor(folder, f"{name}.qzeros", lambda words: torch.full_like(words, 0x32323232))
    zero = our_layers(read(folder))[UP].codes_and_zero()[1]
    assert (zero[::2] == 3).all() and (zero[1::2] == 4).all()


def test_layers_left_out_are_named_for_readers(llama, tmp_path):
    _, folder = exported(llama, "gptq", tmp_path / "m", "rtn(skip=['lm_head','down_proj'])")
    rules = settings_of(folder)["dynamic"]
    assert f"-:^{DOWN.replace('.', '[.]')}$" in rules and len(rules) == 3
    assert nn.Linear is type(read(folder).get_submodule(DOWN))


def test_both_config_files_say_the_same(gpt2, tmp_path):
    _, folder = exported(gpt2, "gptq", tmp_path / "m")
    assert json.loads((folder / "quantize_config.json").read_text()) == settings_of(folder)


def changed(layer, **changes):
    """A QuantLinear with some parts replaced."""
    names = ("codes", "scale", "zero", "bias", "bits", "group_size", "in_features", "order")
    parts = {name: getattr(layer, name) for name in (*names, "offset")}
    return QuantLinear(**(parts | changes))


def test_refusals_name_the_layer_and_the_reason(llama, tiny_llama):
    assert gptq.refusal(checkpoint.load(tiny_llama)) == "it has no quantized layer"
    small = compress.apply("rtn(group_size=32)", llama)
    layer = small.get_submodule(UP)

    def reason(new):
        small.set_submodule(UP, new)
        return gptq.refusal(small)

    assert reason(layer) is None
    scale = layer.scale
    offset = changed(layer, offset=torch.zeros_like(scale), zero=None)
    assert reason(offset).startswith(f"{UP} has offsets")
    assert "float16" in reason(changed(layer, scale=scale * 2.0**-20)) and UP in gptq.refusal(small)
    assert "bfloat16" in reason(changed(layer, scale=scale.float() * 1.0001))
    codes = torch.zeros(160, 64, dtype=torch.uint8)
    ones = torch.ones(160, 2)
    eight = QuantLinear.from_codes(codes, ones, None, None, 8, 32)
    assert "8-bit codes and model.layers.0.self_attn.q_proj 4-bit ones" in reason(eight)
    wide = QuantLinear.from_codes(codes, torch.ones(160, 4), None, None, 4, 16)
    assert f"{UP} has groups of 16, others of 32" in reason(wide)
    narrow = QuantLinear.from_codes(codes[:150], ones[:150], None, None, 4, 32)
    assert reason(narrow) == f"{UP} has 150 outputs; this format packs runs of 32"


@pytest.mark.parametrize(
    "method, message",
    [
        ("dynamic", "q_proj is a Int8DynamicLinear; this format leaves inputs"),
        ("dynamic_fp16", "q_proj is a Float16Linear; this format holds linear layers as"),
        ("rtn(dtype=float32)", "q_proj has scales that float16, this format's type, cannot hold"),
        ("rtn(skip=[])", "lm_head has 257 outputs"),
    ],
)
def test_methods_that_the_format_cannot_hold(llama, tmp_path, method, message):
    assert_cannot_hold(llama, "gptq", tmp_path / "m", method, message)


def test_a_tied_head_with_codes_is_refused(gpt2):
    head = QuantLinear.from_codes(
        torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 2), None, None, 4, 32
    )
    small = compress.apply("rtn(group_size=32)", gpt2)
    small.lm_head = head
    assert "the head has codes of its own" in gptq.refusal(small)


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a 4-bit model, zeros stored as they are."""
    return exported(llama, "gptq", tmp_path / "saved")[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": -4}, "bits = -4 is not supported"),
        ({"bits": 5}, "bits = 5 is not supported"),
        ({"bits": True}, "bits = True is not supported"),
        ({"bits": 8}, "qweight has the wrong shape"),
        ({"group_size": 0}, "group_size = 0 is no size"),
        ({"group_size": 2**60}, "group_size = .* is no size"),
        ({"group_size": -32}, "group_size = -32 is no size"),
        ({"group_size": 64}, "qzeros has the wrong shape"),
        ({"group_size": None}, "group_size = None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
        ({"checkpoint_format": None, "format": "gptq_p"}, "checkpoint_format = 'gptq_p'"),
        ({"is_marlin_format": True}, "is_marlin_format = True is not supported"),
        ({"desc_act": "yes"}, "desc_act = 'yes'"),
        ({"sym": 1}, "sym = 1 is not supported"),
        ({"sym": True}, "qzeros are not 8, which sym means"),
        ({"pack_dtype": "int64"}, "pack_dtype = 'int64'"),
        ({"adapter": {"name": "lora"}}, "adapter = .* is not supported"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: grids of single layers"),
        ({"dynamic": []}, "dynamic must be a JSON object"),
    ],
)
def test_settings_that_make_no_sense_or_are_not_supported(saved, changes, message):
    change_settings(saved, **changes)
    refused(saved, rf"config\.json.*{message}|{message}")


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("qweight", lambda x: x.long(), "qweight has the wrong type: torch.int64"),
        ("qweight", lambda x: x[:-1], "qweight has the wrong shape"),
        ("qweight", lambda x: None, "the file lacks .*weight"),
        ("qzeros", lambda x: x.T, "qzeros has the wrong shape"),
        ("qzeros", lambda x: None, "qzeros is missing"),
        ("scales", lambda x: x.int(), "scales has the wrong type: torch.int32"),
        ("scales", lambda x: x[:, :-1], "scales has the wrong shape"),
        ("scales", lambda x: x * float("nan"), "scales holds NaN"),
        ("scales", lambda x: x + float("inf"), "scales holds NaN or infinity"),
        ("g_idx", lambda x: x.short(), "g_idx has the wrong type"),
        ("g_idx", lambda x: x + 1, "g_idx must give each of 2 groups 32 inputs"),
        ("g_idx", lambda x: x - 1, "g_idx must give each of 2 groups 32 inputs"),
        ("g_idx", lambda x: x * 0, "g_idx must give each of 2 groups 32 inputs"),
    ],
)
def test_tensors_that_do_not_fit(saved, part, change, message):
    change_tensor(saved, f"{UP}.{part}", change)
    refused(saved, message)


def test_all_ones_mean_nothing_in_version_1(saved):
    change_settings(saved, checkpoint_format="gptq")
    change_tensor(saved, f"{UP}.qzeros", lambda words: torch.full_like(words, -1))
    refused(saved, rf"{UP}.qzeros: version 1 has no meaning for 15")
