"""awq: the layout by its definition, the same model back, refusals, files that lie."""

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
from safetensors.torch import save_file

import compress
from compress.export import read
from compress.export.awq import from_interleaved, interleaved_words
from compress.model_files import our_layers
from compress.quant_linear import QuantLinear

SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]  # of outputs 0 to 7 in a word


def unpacked(words):
    """(rows, words) int32 -> (rows, 8 * words) codes."""
    parts = [(words.long() >> shift) & 15 for shift in SHIFTS]
    return torch.stack(parts, dim=-1).flatten(1)


def test_a_word_by_hand():
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert interleaved_words(codes).tolist() == [[0x75316420]]
    assert torch.equal(from_interleaved(interleaved_words(codes), 8), codes)
    assert torch.equal(unpacked(interleaved_words(codes)), codes.long())


METHODS = [
    *("rtn(group_size=32)", "rtn(group_size=32,symmetric=true)", "rtn(group_size=-1)"),
    *("gptq(group_size=32,dtype=float16)", "awq(group_size=32)"),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_model_comes_back(method, model, token_ids, tmp_path):
    small, folder = exported(model, "awq", tmp_path / "m", method, token_ids)
    assert_same(small, read(folder), token_ids)


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_mean_the_weights_by_the_definition(method, model, token_ids, tmp_path):
    small, folder = exported(model, "awq", tmp_path / "m", method, token_ids)
    tensors = tensors_of(folder)
    for name, layer in our_layers(small).items():
        words, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
        assert words.dtype == torch.int32 and scales.dtype == torch.float16
        assert words.shape == (layer.in_features, layer.out_features // 8)
        group = torch.arange(layer.in_features) // layer.group_size
        zeros = unpacked(tensors[f"{name}.qzeros"])
        weight = (scales.float()[group] * (unpacked(words) - zeros[group])).T
        assert torch.equal(weight, layer.weight(torch.float32)), name


def test_what_is_left_in_floating_point_is_named(llama, tmp_path):
    _, folder = exported(
        llama, "awq", tmp_path / "m", "rtn(group_size=32,skip=['lm_head','down_proj'])"
    )
    settings = settings_of(folder)
    assert settings["modules_to_not_convert"][0] == DOWN
    assert settings["modules_to_not_convert"][-1] == "lm_head"
    assert settings["zero_point"] is True and settings["version"] == "gemm"


def test_symmetric_zeros_are_8(llama, tmp_path):
    _, folder = exported(llama, "awq", tmp_path / "m", "rtn(group_size=32,symmetric=true)")
    assert (tensors_of(folder)[f"{UP}.qzeros"] == 0x88888888 - 2**32).all()


@pytest.mark.parametrize(
    "method, message",
    [
        ("rtn(bits=3)", "q_proj has 3-bit codes; this format holds 4"),
        ("rtn(group_size=64)", "layers.0.mlp.down_proj has 160 inputs, no multiple of its group"),
        ("gptq(group_size=32,static_groups=false)", "q_proj has groups in act-order"),
        ("rtn(skip=[])", "the head is quantized"),
        ("dynamic", "q_proj is a Int8DynamicLinear"),
        ("rtn(group_size=32,dtype=float32)", "q_proj has scales that float16"),
    ],
)
def test_methods_that_the_format_cannot_hold(llama, token_ids, tmp_path, method, message):
    assert_cannot_hold(llama, "awq", tmp_path / "m", method, message, token_ids)


def test_outputs_that_fill_no_words_are_refused(llama, tmp_path):
    small = compress.apply("rtn(group_size=32)", llama)
    codes, ones = torch.zeros(156, 64, dtype=torch.uint8), torch.ones(156, 2)
    small.set_submodule(UP, QuantLinear.from_codes(codes, ones, None, None, 4, 32))
    with pytest.raises(ValueError, match=f"{UP} has 156 outputs; this format packs runs of 8"):
        compress.export(small, tmp_path / "m", "awq")


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a 4-bit model."""
    return exported(llama, "awq", tmp_path / "saved")[1]


def test_older_names_of_settings_are_read(saved):
    change_settings(saved, bits=None, w_bit=4, version="GEMM")
    assert our_layers(read(saved))[UP].group_size == 32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 3}, "bits = 3 is not supported"),
        ({"bits": -4}, "bits = -4 is not supported"),
        ({"group_size": 0}, "group_size = 0 is no size"),
        ({"group_size": 2**60}, "group_size = .* is no size"),
        ({"group_size": 16}, "qzeros has the wrong shape"),
        ({"group_size": 48}, "do not fit"),
        ({"version": "gemv"}, "version = 'gemv' is not supported"),
        ({"version": "marlin"}, "version = 'marlin' is not supported"),
        ({"zero_point": False}, "zero_point = False is not supported"),
        ({"zero_point": []}, r"zero_point = \[\] is not supported"),
        ({"dynamic": {"+:x": {}}}, "dynamic = .* is not supported"),
    ],
)
def test_settings_that_make_no_sense_or_are_not_supported(saved, changes, message):
    change_settings(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("qweight", lambda x: x.short(), "qweight has the wrong type: torch.int16"),
        ("qweight", lambda x: x.T, "qweight has the wrong shape"),
        ("qzeros", lambda x: x[:1], "qzeros has the wrong shape"),
        ("scales", lambda x: x.T, "scales has the wrong shape"),
        ("scales", lambda x: x * float("nan"), "scales holds NaN"),
    ],
)
def test_tensors_that_do_not_fit(saved, part, change, message):
    change_tensor(saved, f"{UP}.{part}", change)
    refused(saved, message)


def test_an_index_of_groups_is_no_part_of_the_format(saved):
    tensors = tensors_of(saved) | {f"{UP}.g_idx": torch.arange(64, dtype=torch.int32)}
    save_file(tensors, saved / "model.safetensors")
    refused(saved, f"{UP}.g_idx is no part of a layer of this format")
