"""The arithmetic of uniform quantization: ranges, scales, zeros, codes, and packing them.

A weight w is stored as an unsigned code q of `bits` bits and means scale * (q - zero). Scale
and zero are shared by a group of `group_size` neighbouring inputs of one output row. Symmetric
codes have zero = 2 ** (bits - 1), which is not stored. All functions are pure.

Source: R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference:
A whitepaper", 2018, https://arxiv.org/abs/1806.08342
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (2, 3, 4, 8)
SHRINKS = tuple(1 - 0.03 * step for step in range(21))  # of a range, tried in a search for the best
CACHED_WEIGHTS = 2**17  # worked on at a time in a search over ranges: half a megabyte


def check_grid(bits: int, group_size: int) -> None:
    """Raises ValueError unless bits is 2, 3, 4 or 8 and group_size is -1 (a row) or at least 8."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    if group_size != -1 and group_size < 8:
        raise ValueError(f"group_size must be -1 (one group a row) or at least 8, not {group_size}")


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """(rows, in) -> (rows, groups, group_size); a last group that is too short gets zeros.

    A group_size of -1 or above `in` means the whole row.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else min(group_size, columns)
    padding = -columns % size
    if padding:
        weight = F.pad(weight, (0, padding))
    return weight.reshape(weight.shape[0], -1, size)


def scale_and_zero(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero for values between low and high (same shape, low <= high).

    Returns scale > 0, already rounded to `dtype` (the type it is stored in) but held in float32,
    so that codes are chosen for the scale that the file will have; zero in [0, 2 ** bits - 1],
    float32 holding an integer. The range is widened to contain 0, or zero would not be a code.
    """
    top = 2**bits - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        scale = stored_scale(torch.maximum(-low, high) * 2 / top, dtype)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = stored_scale((high - low) / top, dtype)
    return scale, torch.round(-low / scale).clamp(0, top)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as `dtype` holds it, in float32; above 0 also for an all-zero group."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest code of each weight, as floats holding integers in [0, 2 ** bits - 1]."""
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What is left of `weight` after quantization: scale * (code - zero)."""
    return to_codes(weight, scale, zero, bits).sub_(zero).mul_(scale)


def squared(residual: Tensor) -> Tensor:
    """Plain squared error of each group: (rows, groups, group_size) -> (rows, groups, 1)."""
    return residual.square().sum(-1, keepdim=True)


def fit_range(
    groups: Tensor,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    clip: bool = False,
    loss: Callable[[Tensor], Tensor] = squared,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, (rows, groups, 1) each.

    groups: (rows, groups, group_size) float32. Without `clip` the range is min to max, and every
    weight is off by at most about scale / 2 (a little more where `dtype` rounded the scale down).
    With `clip` the range is shrunk by each of SHRINKS, and the one with the least loss of the
    group wins: a finer step for all can be worth cutting off a lone large weight.
    loss: what the residual (rows, groups, group_size) costs, (rows, groups, 1); it may be called
    on some of the rows at a time.
    """
    rows = CACHED_WEIGHTS // groups[0].numel() if clip else len(groups)
    fitted = [
        fit_rows(part, bits, symmetric, dtype, clip, loss) for part in groups.split(max(1, rows))
    ]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def fit_rows(
    groups: Tensor,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    clip: bool,
    loss: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """See fit_range; `loss` is called on all rows at once."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = scale_and_zero(low, high, bits, symmetric, dtype)
    if not clip:
        return scale, zero
    least = loss(rounded(groups, scale, zero, bits).sub_(groups))
    for shrink in SHRINKS[1:]:
        tried = scale_and_zero(low * shrink, high * shrink, bits, symmetric, dtype)
        cost = loss(rounded(groups, *tried, bits).sub_(groups))
        better = cost < least
        least = torch.where(better, cost, least)
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
    return scale, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) codes -> (rows, bytes) uint8, `bits` bits a code.

    Columns are padded with zeros to a multiple of 8. Bits are stored in planes of 2 (and, for
    3 bits, one plane of 1), each plane split into equal runs of columns that share bytes: byte j
    of a 4-bit row holds code j in its low half and code j + columns / 2 in its high half, which
    unpacks by two whole-row operations. 8-bit codes are stored minus 128, as int8.
    """
    codes = codes.to(torch.uint8).contiguous()
    if bits == 8:
        return (codes ^ 0x80).view(torch.int8)
    codes = F.pad(codes, (0, -codes.shape[1] % 8))
    planes = []
    for shift, width in _planes(bits):
        runs = ((codes >> shift) & (2**width - 1)).chunk(8 // width, dim=1)
        plane = runs[0].clone()
        for index, run in enumerate(runs[1:], start=1):
            plane |= run << (width * index)
        planes.append(plane)
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (rows, columns) uint8 codes."""
    if bits == 8:
        return packed.view(torch.uint8) ^ 0x80
    padded = columns + -columns % 8
    codes = None
    start = 0
    for shift, width in _planes(bits):
        count = padded * width // 8
        plane = packed[:, start : start + count]
        start += count
        values = torch.empty(packed.shape[0], padded, dtype=torch.uint8, device=packed.device)
        for index, run in enumerate(values.chunk(8 // width, dim=1)):
            torch.bitwise_right_shift(plane, width * index, out=run)
        values &= 2**width - 1
        codes = values if codes is None else codes | (values << shift)
    assert codes is not None
    return codes[:, :columns]


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes that `pack` makes of a row."""
    return columns if bits == 8 else (columns + -columns % 8) * bits // 8


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(shift, width) of the bit planes of a code."""
    return {2: ((0, 2),), 3: ((0, 2), (2, 1)), 4: ((0, 4),)}[bits]
