"""quant_linear: every kernel means the same weights as the codes; specs are checked."""

import pytest
import torch
from comparing import random, relative

from compress.checkpoint import LAYER_KINDS
from compress.kernel_choice import FEW_ROWS
from compress.methods.dynamic import Dynamic
from compress.methods.int8_weight import Int8Weight
from compress.methods.rtn import Rtn
from compress.quant_linear import QuantLinear


def weight(rows=96, columns=128):
    return random(rows, columns, seed=0)


@pytest.mark.parametrize("columns", [128, 100])  # 100: the last group is short
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_is_scale_times_code_minus_zero(bits, symmetric, columns):
    layer = Rtn(bits=bits, group_size=32, symmetric=symmetric, dtype="float32").quantize(
        weight(columns=columns), None
    )
    codes, zero = layer.codes_and_zero()
    expected = torch.empty(96, columns)
    for row in range(96):
        for column in range(columns):
            group = column // 32
            step = int(codes[row, column]) - int(zero[row, group])
            expected[row, column] = layer.scale[row, group] * step
    assert torch.equal(layer.weight(), expected)


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, 40, 200])  # 200: more than columns
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, 48), (3, 64), (8, -1), (8, 64)])
def test_every_kernel_agrees_with_float64(bits, group_size, symmetric, rows):
    bias = random(96, seed=1)
    layer = Rtn(bits=bits, group_size=group_size, symmetric=symmetric).quantize(weight(), bias)
    x = random(rows, 128, seed=2).bfloat16()
    exact = x.double() @ layer.weight(torch.float64).T + bias.bfloat16().double()
    assert relative(layer(x), exact) < 0.004  # bfloat16 rounds to 0.2-0.4 %


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("rows", [4, 40, 200])
def test_float16_takes_inputs_whose_products_with_codes_would_overflow(
    rows, granularity, symmetric
):
    layer = Int8Weight(symmetric, granularity, dtype="float16").quantize(weight(), None)
    x = random(rows, 128, seed=2).half()
    x[0, 3] = 1000  # times a code of 127 it is beyond 65504, float16's largest number
    y = layer(x)
    assert y.isfinite().all()
    assert relative(y, x.double() @ layer.weight(torch.float64).T) < 0.004


def test_order_maps_code_columns_to_inputs():
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    plain = Rtn(dtype="float32").quantize(weight()[:, order], None)
    codes, zero = plain.codes_and_zero()
    layer = QuantLinear.from_codes(
        codes, plain.scale, zero, None, 4, 64, order, dtype=torch.float32
    )
    assert torch.equal(layer.weight()[:, order], plain.weight())
    x = random(3, 128, seed=2)
    torch.testing.assert_close(layer(x), plain(x[:, order]))


def test_four_bits_are_four_bits_in_memory():
    layer = Rtn(bits=4, group_size=64).quantize(weight(576, 576), None)
    held = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    # 4 for the code, 16 / 64 for the scale; 9 zeros a row are padded to 16, 4 bits each
    assert 8 * held / 576**2 == pytest.approx(4 + 16 / 64 + 16 * 4 / 576)


def test_int8_dynamic_by_hand():
    layer = Dynamic(dtype="float32").quantize(torch.tensor([[127.0, -64.0], [1.0, 0.5]]), None)
    # Row scales 1 and 1/127; x spans 0 .. 2.55, so its step is 0.01 and its codes 255 and 100.
    y = layer(torch.tensor([[2.55, 1.0]]))
    expected = torch.tensor([[127 * 2.55 - 64 * 1.0, 2.55 + 64 / 127 * 1.0]])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_int8_dynamic_error_is_that_of_two_roundings():
    w, x = weight(), random(50, 128, seed=2)
    layer = Dynamic(dtype="float32").quantize(w, random(96, seed=1))
    expected = x @ w.T + layer.bias
    assert 0.001 < relative(layer(x), expected) < 0.015
    # One huge token does not disturb the others: scales are per token.
    wild = torch.cat([x, 1e4 * x[:1]])
    torch.testing.assert_close(layer(wild)[:50], layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [Rtn(), Rtn(symmetric=True), Dynamic(), Dynamic("float16")])
@pytest.mark.parametrize("bias", [None, torch.ones(96)])
def test_spec_rebuilds_the_same_layer(make, bias):
    layer = make.quantize(weight(), bias)
    empty = LAYER_KINDS[layer.kind].from_spec(layer.spec())
    shapes = {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": "4"},
        {"group_size": 0},
        {"group_size": 10**6},
        {"in_features": -1},
        {"out_features": 2**60},
        {"scale_rows": 7},
        {"dtype": "int64"},
        {"dtype": None},
        {"dtype": []},
        {"bits": []},
    ],
)
def test_refuses_specs_that_make_no_sense(change):
    spec = Rtn().quantize(weight(), None).spec()
    with pytest.raises(ValueError):
        QuantLinear.from_spec(spec | change)


@pytest.mark.parametrize(
    "change", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}, {"order": True}]
)
def test_int8_dynamic_refuses_the_grids_that_its_product_does_not_take(change):
    spec = Dynamic().quantize(weight(), None).spec()
    assert LAYER_KINDS["int8_dynamic"].from_spec(spec).codes.shape == (96, 128)
    with pytest.raises(ValueError, match="int8_dynamic takes 8-bit symmetric codes"):
        LAYER_KINDS["int8_dynamic"].from_spec(spec | change)


def test_refuses_a_scale_that_is_not_finite():
    with pytest.raises(ValueError, match="NaN"):
        QuantLinear.from_codes(torch.zeros(2, 8), torch.full((2, 1), torch.nan), None, None, 4, -1)
