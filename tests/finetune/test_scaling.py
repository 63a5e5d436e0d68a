"""Scales: by hand, error bounds, extreme numbers, agreement with the compression methods."""

import pytest
import torch

import compress
from finetune.low_precision import Quantizer
from finetune.low_precision.method_weights import MethodQuantizer

SPECS = ("int8_sym", "int8_asym", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1")
EVERY = (*SPECS, "posit8_1", "nf4")


def random_rows(seed=0, columns=96):
    rows = torch.randn(16, columns, generator=torch.Generator().manual_seed(seed))
    rows *= 10.0 ** torch.arange(-8, 8)[:, None]
    rows[3] = 0
    return rows


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("shared", ["tensor", "row", "block32", "block7"])
def test_the_text_reads_back(text, shared):
    quantizer = Quantizer.parse(f"{text}:{shared}")
    assert str(quantizer) == f"{text}:{shared}" and Quantizer.parse(str(quantizer)) == quantizer
    assert Quantizer.parse(text) == Quantizer.parse(f"{text}:row")


def test_blocks_by_hand():
    row = torch.tensor([[1.0, -127.0, 12.7, 0.14, 0.0, 0.0, 254.0]])
    rebuilt = Quantizer.parse("int8_sym:block2")(row)  # scales 1, 0.1, 1 (all zero) and 2
    assert rebuilt.tolist() == [[1, -127, pytest.approx(12.7), pytest.approx(0.1), 0, 0, 254]]


def test_microscaling_by_hand():
    # Largest 7: 2^2 is its power, and that of fp4's largest, 6: scale 1, and 7 saturates.
    fp4 = Quantizer.parse("fp4_e2m1:block4:pow2")
    assert fp4(torch.tensor([[7.0, 2.4, -0.3, 0.2]])).tolist() == [[6, 2, -0.5, 0]]
    # MXINT8: 1.984375 = 127/64 is the largest of its power; 1.99 saturates there.
    int8 = Quantizer.parse("int8_sym:pow2")
    assert int8(torch.tensor([[1.99, 1.0, 1 / 64, 1 / 128]])).tolist() == [[127 / 64, 1, 1 / 64, 0]]
    scale = Quantizer.parse("fp8_e4m3:pow2").scale(torch.tensor([[448.0], [449.0], [511.0], [3.5]]))
    assert scale.flatten().tolist() == [1, 1, 1, 2**-7]


def test_posits_aim_at_one_and_not_at_maxpos():
    quantizer = Quantizer.parse("posit8_1:tensor")
    rows = 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    rows[:, ::2] = 0  # zeros ask nothing of the scale
    assert quantizer.scale(rows.view(1, -1)).item() == pytest.approx(1e-3, rel=0.05)
    at_maxpos = rows.abs().max() / 4096
    worse = (quantizer.format.round(rows / at_maxpos) * at_maxpos - rows).square().mean()
    assert (quantizer(rows) - rows).square().mean() < worse / 10
    powers = Quantizer.parse("posit8_1:pow2").scale(torch.tensor([[1.4], [1.42], [-0.7], [8.0]]))
    assert powers.flatten().tolist() == [1, 2, 0.5, 8]


@pytest.mark.parametrize("text", ["int8_sym", "int8_asym"])
@pytest.mark.parametrize("seed", range(3))
def test_integers_are_off_by_at_most_half_a_scale(text, seed):
    rows = random_rows(seed)
    spread = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    scale = rows.abs().amax(1) / 127 if text == "int8_sym" else spread / 255
    error = (Quantizer.parse(text)(rows) - rows).abs()
    assert (error <= 0.5001 * scale[:, None]).all() and error[3].eq(0).all()


@pytest.mark.parametrize("text", SPECS[2:])
@pytest.mark.parametrize("shared", ["row", "block32", "block32:pow2"])
def test_floats_are_off_by_at_most_half_a_unit_in_the_last_place(text, shared):
    quantizer = Quantizer.parse(f"{text}:{shared}")
    rows = random_rows(5)
    groups = rows.view(16, -1, 96 if shared == "row" else 32)
    scale = quantizer.scale(groups)
    form = quantizer.format
    exponent = torch.frexp(groups / scale)[1] - 1
    ulp = scale * 2.0 ** (exponent.clamp(min=form.least_exponent) - form.mantissa_bits)
    error = (quantizer(rows).view(groups.shape) - groups).abs()
    inside = (groups / scale).abs() <= form.largest * 1.0001
    assert (error <= 0.5001 * ulp)[inside].all() and error[3].eq(0).all()
    assert inside.all() or quantizer.power_of_two
    assert (groups / scale).abs().max() < 2 ** (1 + torch.tensor(form.largest).log2().floor())


@pytest.mark.parametrize("text", [*EVERY, *(f"{t}:pow2" for t in SPECS if t != "int8_asym")])
def test_extreme_numbers(text):
    quantizer = Quantizer.parse(text)
    rows = torch.tensor(
        [[1.5e38, -1e38, 1.0], [1e-45, 0.0, -1e-45], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    )
    rebuilt = quantizer(rows)
    assert rebuilt.isfinite().all() and rebuilt[1].abs().max() <= 2e-38
    assert rebuilt[2].eq(0).all() and rebuilt[3].tolist() == [pytest.approx(2), 0, 0]
    rows[0, 1], rows[1, 2] = float("nan"), float("inf")
    spoilt = quantizer(rows)
    assert spoilt[:2].isnan().all() and torch.equal(spoilt[2:], rebuilt[2:])


@pytest.mark.parametrize("text", EVERY)
def test_other_types_and_shapes(text):
    values = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantizer = Quantizer.parse(f"{text}:block16")
    rebuilt = quantizer(values)
    assert rebuilt.dtype == torch.bfloat16 and rebuilt.shape == values.shape
    assert torch.equal(rebuilt[1, 2], quantizer(values[1, 2]))
    assert torch.equal(rebuilt, quantizer(values.transpose(0, 1)).transpose(0, 1))


def test_int8_activations_are_those_of_the_dynamic_method():
    values, weight = random_rows(1), torch.eye(96)
    layer = compress.get("dynamic", dtype="float32").quantize(weight, None)
    product = layer(values) @ torch.linalg.inv(layer.weight())  # undo the identity
    torch.testing.assert_close(Quantizer.parse("int8_asym")(values), product, rtol=1e-5, atol=1e-12)


def test_int8_by_format_and_by_method_agree():
    weight = random_rows(8)
    method = MethodQuantizer.parse("method:int8_sym(dtype=float32)")
    assert torch.equal(Quantizer.parse("int8_sym")(weight), method(weight))
