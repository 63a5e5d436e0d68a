"""Codes in ggml's blocks of 32 weights, both directions: Q8_0, Q4_0 and Q4_1.

A block is one or two float16 numbers, then the codes. Q8_0: d, 32 signed bytes, w = d * q. Q4_0:
d, 16 bytes, w = d * (q - 8). Q4_1: d, m, 16 bytes, w = d * q + m. Byte j of the 16 holds code j in
its low half and code j + 16 in its high half.

A layer fits if its scales, and in Q4_1 also m, are exact in float16; nothing is rounded. m is what
code 0 means, -scale * zero; where that takes too many bits the codes of a block are turned round
(15 - q, with a negative d), and m is what code 15 means, scale * (15 - zero). One of the two has a
factor below 8, of 3 bits, so that scales of bfloat16, which have 8 bits, fit the 11 of float16.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import math

import torch
from torch import Tensor

from compress.quant_linear import QuantLinear

BLOCK = 32  # weights
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
HALF_BITS = 11  # of a float16's significand
LARGEST_HALF = 65504.0


def kind_of(layer: QuantLinear) -> str:
    """The type of block that holds `layer` exactly. Raises ValueError, with the reason, if none."""
    return _grid(layer)[0]


def to_blocks(layer: QuantLinear) -> Tensor:
    """The blocks of kind_of(layer), (out, bytes of a row) uint8. Raises ValueError, see there."""
    kind, numbers, codes = _grid(layer)
    if kind != "Q8_0":
        codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    bytes_of = [part[..., None].view(torch.uint8) for part in numbers]  # (out, blocks, 2) each
    return torch.cat([*bytes_of, codes], dim=-1).flatten(1)


def from_blocks(
    kind: str, rows: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float16
) -> QuantLinear:
    """The layer whose rows are blocks of `kind`: groups of 32, codes as they stand.

    rows: (out, bytes) uint8. dtype: of scale, offset and bias; float16 or float32 keep it exact.
    Raises ValueError if a number in a block is not finite.
    """
    blocks = rows.view(len(rows), -1, BLOCK_BYTES[kind])
    head = 4 if kind == "Q4_1" else 2  # bytes
    numbers = blocks[..., :head].contiguous().view(torch.float16)  # (out, blocks, 1 or 2)
    codes = blocks[..., head:]
    codes = codes ^ 0x80 if kind == "Q8_0" else torch.cat([codes & 15, codes >> 4], dim=-1)
    return QuantLinear.from_codes(
        codes.flatten(1),
        numbers[..., 0],
        None,
        bias,
        8 if kind == "Q8_0" else 4,
        BLOCK,
        dtype=dtype,
        offset=numbers[..., 1] if kind == "Q4_1" else None,
    )


def _grid(layer: QuantLinear) -> tuple[str, list[Tensor], Tensor]:
    """Kind, its float16 numbers (out, blocks), and its codes (out, blocks, 32) as uint8."""
    _check_layout(layer)
    codes, zero = layer.codes_and_zero()
    codes = codes.to(torch.int16).reshape(len(codes), -1, BLOCK)
    scale = _per_block(layer, layer.scale).double()  # products with a code are exact in it
    if layer.offset is not None:
        if layer.bits == 8:
            raise ValueError("8-bit codes with an offset; GGUF holds them with 4 bits, or without")
        offset = _per_block(layer, layer.offset).double()
        numbers = [_exact(scale, "a scale"), _exact(offset, "an offset")]
        return "Q4_1", numbers, codes.to(torch.uint8)

    zero = _per_block(layer, zero).to(torch.int16)
    steps = codes - zero[..., None]  # w = scale * step
    scale = scale.where((steps != 0).any(-1), 0.0)  # of a block of zeros it may be anything
    low, high = int(steps.min()), int(steps.max())
    if layer.bits == 8:
        if low < -128 or high > 127:
            raise ValueError(
                "8-bit codes with a zero; GGUF's are symmetric: symmetric=true would do"
            )
        return "Q8_0", [_exact(scale, "a scale")], steps.to(torch.int8).view(torch.uint8)
    if low >= -8 and high <= 7:
        return "Q4_0", [_exact(scale, "a scale")], (steps + 8).to(torch.uint8)
    return _with_minimum(codes, scale, zero)


def _with_minimum(codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[str, list[Tensor], Tensor]:
    """4-bit codes with zeros as Q4_1; see the module."""
    first, last = -scale * zero, scale * (15 - zero)  # what codes 0 and 15 mean
    turned = first.half().double() != first
    minimum = last.where(turned, first)
    cure = "; symmetric=true would do, or scales in bfloat16"
    numbers = [
        _exact(scale.where(~turned, -scale), "a scale"),
        _exact(minimum, "scale * zero", cure),
    ]
    return "Q4_1", numbers, (15 - codes).where(turned[..., None], codes).to(torch.uint8)


def _check_layout(layer: QuantLinear) -> None:
    columns, size = layer.in_features, layer.group_size
    if columns % BLOCK:
        raise ValueError(f"a row has {columns} weights, and GGUF's blocks have {BLOCK}")
    if size != columns and size % BLOCK:
        raise ValueError(
            f"a group has {size} weights, and GGUF's blocks {BLOCK}: 32 or 64 would do"
        )
    order = layer.order
    if order is not None and not torch.equal(order, torch.arange(columns, dtype=order.dtype)):
        raise ValueError("its columns are in another order (act-order), which GGUF cannot say")


def _per_block(layer: QuantLinear, per_group: Tensor) -> Tensor:
    """(out or 1, groups) -> (out, blocks)."""
    blocks, size = layer.in_features // BLOCK, min(layer.group_size, layer.in_features)
    spread = per_group.repeat_interleave(size // BLOCK, dim=1)[:, :blocks]
    return spread.expand(layer.out_features, -1)


def _exact(values: Tensor, what: str, cure: str = "") -> Tensor:
    """`values` as float16. Raises ValueError if that would round one of them."""
    half = values.half()
    wrong = half.double() != values  # NaN is wrong too
    if wrong.any():
        raise ValueError(f"{what} {_reason(values[wrong][0].item())}{cure}")
    return half


def _reason(value: float) -> str:
    """Why float16 does not hold `value`."""
    if not math.isfinite(value):
        return f"is {value}"
    whole = abs(int(math.frexp(value)[0] * 2**53))
    bits = (whole // (whole & -whole)).bit_length()
    if bits > HALF_BITS:
        return f"needs {bits} bits, float16 has {HALF_BITS}"
    return f"is {value:.3g}, too {'large' if abs(value) > LARGEST_HALF else 'small'} for float16"
