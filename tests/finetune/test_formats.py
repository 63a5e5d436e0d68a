"""Number formats: ml_dtypes bit for bit, posits by hand and by definition, NF4 by its quantiles."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.stats import norm

from finetune.low_precision import formats
from finetune.low_precision.posit import Posit

OUTSIDE = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
BITS = {"fp8_e4m3": 8, "fp8_e5m2": 8, "fp6_e3m2": 6, "fp6_e2m3": 6, "fp4_e2m1": 4}


def rounded(name, *values):
    return formats.get(name).round(torch.tensor(values, dtype=torch.float32)).tolist()


def awkward_numbers(values):
    """Every value, every middle between two, their float32 neighbours, and 100,000 more."""
    values = values.astype(np.float32)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    some = np.concatenate([values, middles, [0.0, -0.0, 1e-45, -1e-45, 1e-38]]).astype(np.float32)
    random = np.random.default_rng(4)
    bits = random.integers(0, 2**32, 60_000, dtype=np.uint32).view(np.float32)  # all exponents
    bell = random.standard_normal(40_000).astype(np.float32) * np.abs(values).max() / 4
    far = np.float32([np.inf, -np.inf])
    around = [some, np.nextafter(some, far[0]), np.nextafter(some, far[1])]
    return np.concatenate([*around, bits[np.isfinite(bits)], bell])


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_are_those_of_ml_dtypes(name):
    codes = np.arange(2 ** BITS[name], dtype=np.uint8).view(OUTSIDE[name]).astype(np.float32)
    expected = np.unique(codes[np.isfinite(codes)])  # sorted, one zero
    assert formats.get(name).values().tolist() == expected.tolist()
    assert formats.get(name).largest == expected.max()


@pytest.mark.parametrize("name", OUTSIDE)
def test_rounding_is_that_of_ml_dtypes_bit_for_bit(name):
    form = formats.get(name)
    numbers = awkward_numbers(form.values().numpy())
    # ml_dtypes turns what is too large into NaN or infinity, we saturate.
    expected = numbers.clip(-form.largest, form.largest).astype(OUTSIDE[name]).astype(np.float32)
    ours = form.round(torch.from_numpy(numbers)).numpy()
    assert len(numbers) > 99_000
    assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32))  # signs of zeros too


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("fp8_e4m3", (448, 464, 465, 1e38, -500), (448, 448, 448, 448, -448)),
        ("fp8_e5m2", (57344, 61440, 65536, -3e38), (57344, 57344, 57344, -57344)),
        ("fp8_e4m3", (2**-9, 2**-10, 1.01 * 2**-10), (2**-9, 0, 2**-9)),  # least subnormal
        ("fp4_e2m1", (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (0, 1, 1, 2, 2, 4, 4)),  # ties
        ("int8_sym", (0.5, 1.5, -2.5, 127.4, 127.5, -128), (0, 2, -2, 127, 127, -127)),
        ("int8_asym", (0.5, 127.9, -127.6, -900), (0, 127, -128, -128)),
    ],
)
def test_rounding_by_hand(name, values, expected):
    assert rounded(name, *values) == list(expected)


def test_fp4_values_by_hand():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert formats.get("fp4_e2m1").values()[7:].tolist() == positive


def test_infinity_saturates_in_floats_and_integers_but_is_no_posit():
    inf = float("inf")
    for name in (*OUTSIDE, "int8_sym"):
        largest = formats.get(name).largest
        assert rounded(name, inf, -inf) == [largest, -largest]
    for name in ("posit8_1", "nf4"):
        assert all(np.isnan(rounded(name, inf, -inf)))


@pytest.mark.parametrize("name", [*formats.FORMATS, "posit16_2"])
def test_every_value_rounds_to_itself_and_nan_stays(name):
    form = formats.get(name)
    values = form.values()
    assert torch.equal(form.round(values), values) and values.diff().gt(0).all()
    assert values.abs().max() == max(form.largest, 128 * form.asymmetric)
    assert np.isnan(rounded(name, float("nan"), 1.0)[0])
    columns = values.repeat(2, 1).T  # neither shape nor strides matter
    assert torch.equal(form.round(columns), columns)


# Codes by hand: sign, regime, exponent, fraction; the value is useed^k * 2^e * (1 + f).
POSITS = {
    (8, 0): {0x01: 1 / 64, 0x20: 0.5, 0x40: 1, 0x50: 1.5, 0x60: 2, 0x7F: 64},
    (8, 1): {0x01: 4.0**-6, 0x48: 1.5, 0x50: 2, 0x7C: 256, 0x7D: 512, 0x7E: 1024, 0x7F: 4096},
    (8, 2): {0x01: 16.0**-6, 0x40: 1, 0x44: 1.5, 0x48: 2, 0x7B: 2**15, 0x7D: 2**18, 0x7F: 2**24},
    (16, 1): {0x0001: 4.0**-14, 0x4800: 1.5, 0x5922: 3.1416015625, 0x7FFF: 2**28},
    (16, 2): {0x0001: 16.0**-14, 0x4400: 1.5, 0x4C91: 3.1416015625, 0x7FFF: 2**56},
}


@pytest.mark.parametrize("size", POSITS)
def test_posit_codes_by_hand(size):
    values = Posit(*size).values().tolist()
    zero = 2 ** (size[0] - 1) - 1  # where code 0 stands
    assert len(values) == 2 ** size[0] - 1 and values[zero] == 0
    for code, value in POSITS[size].items():
        assert values[zero + code] == value and values[zero - code] == -value


@pytest.mark.parametrize(
    "name, values, expected",
    [
        # 2048 is code 0x7E with a 1 appended (1024 to 4096): the geometric mean, not 2560.
        ("posit8_1", (2047, 2048, 2049, 2500, -2048), (1024, 1024, 4096, 4096, -1024)),
        ("posit8_1", (767, 768, 769), (512, 1024, 1024)),  # 512 is 0x7D, odd: the tie goes up
        ("posit8_1", (1 + 1 / 32, 1 + 3 / 32), (1, 1 + 2 / 16)),  # 4 fraction bits at 1
        ("posit(8,2)", (2**17, 1.01 * 2**17, 2**19), (2**16, 2**18, 2**20)),
        ("posit(8,0)", (63, 48, 33, 1e9, 1e-9, -1e-30, 0), (64, 32, 32, 64, 1 / 64, -1 / 64, 0)),
        ("posit16_2", (3.14159265, -3.14159265), (3.1416015625, -3.1416015625)),
        ("posit16_1", (3.14159265, 1e-45), (3.1416015625, 4.0**-14)),
    ],
)
def test_posit_rounding_by_hand(name, values, expected):
    assert rounded(name, *values) == list(expected)


def decoded(code, bits, exponent_bits):
    """A positive posit from the standard's definition, read from its text of 0s and 1s."""
    text = f"{code:0{bits}b}"[1:]
    run = len(text) - len(text.lstrip(text[0]))
    regime = run - 1 if text[0] == "1" else -run
    rest = text[run + 1 :]
    exponent = int((rest[:exponent_bits] + "0" * exponent_bits)[:exponent_bits] or "0", 2)
    fraction = rest[exponent_bits:]
    mantissa = 1 + Fraction(int(fraction or "0", 2), 2 ** len(fraction))
    return mantissa * Fraction(2) ** (regime * 2**exponent_bits + exponent)


@pytest.mark.parametrize("size", [(3, 0), (5, 3), (6, 2), (8, 0), (8, 1), (8, 2), (10, 1)])
def test_posit_rounding_follows_the_definition(size):
    bits, _ = size
    codes = range(1, 2 ** (bits - 1))
    positive = [decoded(code, *size) for code in codes]
    assert positive == [
        Fraction(value) for value in Posit(*size).values().tolist()[len(codes) + 1 :]
    ]
    numbers = awkward_numbers(np.array([float(value) for value in positive]))[:4000]
    expected = []
    for number in (Fraction(float(number)) for number in numbers):
        size_of, sign = abs(number), -1 if number < 0 else 1
        below = sum(value <= size_of for value in positive)  # the code at or below
        if number == 0 or 0 < below < len(positive):
            tie = decoded(2 * below + 1, bits + 1, size[1]) if below else 0
            up = size_of > tie or (size_of == tie and below % 2 == 1)
            nearest = positive[below - 1 + up] if below else 0
            nearest = positive[below - 1] if below and size_of == positive[below - 1] else nearest
        else:
            nearest = positive[0] if below == 0 else positive[-1]
        expected.append(float(sign * nearest))
    assert Posit(*size).round(torch.from_numpy(numbers)).tolist() == expected


def test_posit_without_cut_bits_rounds_like_a_float():
    numbers = torch.from_numpy(awkward_numbers(np.array([0.25, 1.0]))).clamp(0.25, 4)
    # posit<16,1> has 12 fraction bits from 1/4 to 4.
    expected = torch.round(numbers * 2**12 / (p := 2.0 ** numbers.log2().floor())) * p / 2**12
    assert torch.equal(Posit(16, 1).round(numbers), expected)


def test_nf4_values_are_the_quantiles_that_qlora_defines():
    share = (1 - 1 / 30 + 1 - 1 / 32) / 2  # appendix E: between 1 - 1/30 and 1 - 1/32
    positive = norm.ppf(np.linspace(share, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(share, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([positive, negative, [0]])) / positive.max()
    np.testing.assert_allclose(formats.get("nf4").values(), expected, atol=2e-6)


def test_nf4_rounds_to_the_nearest_and_ties_to_the_even_code():
    values = formats.get("nf4").values().double()
    middles = ((values[1:] + values[:-1]) / 2).float()
    beside = [torch.nextafter(middles, torch.tensor(float(end))) for end in (-2, 2)]
    numbers = torch.cat([torch.linspace(-1.2, 1.2, 20_001), middles, *beside])
    distance = (numbers.double()[:, None] - values).abs()  # exact
    nearest = distance == distance.amin(1, keepdim=True)
    assert (nearest.sum(1) == 2).any()
    code = (nearest * torch.tensor([2, 1] * 8)).argmax(1)  # of two the even one
    assert torch.equal(formats.get("nf4").round(numbers).double(), values[code])


def test_a_table_made_in_evaluation_serves_training():
    with torch.inference_mode():
        Posit(7, 1).round(torch.ones(2))
    scale = torch.ones(2, requires_grad=True)
    (scale * Posit(7, 1).round(torch.ones(2))).sum().backward()
    assert scale.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("fp8_e4m2", "no number format 'fp8_e4m2'; did you mean .*fp8_e4m3"),
        ("posit(8)", r"no number format .* did you mean posit"),
        ("posit32_2", "posit32_2: n must be 3 to 16"),
        ("posit(16,4)", "posit16_4: values do not fit float32"),
    ],
)
def test_refusals(name, message):
    with pytest.raises(ValueError, match=message):
        formats.get(name)
