"""The order in which torch's int4 kernel wants its codes, and the way back.

For CUDA see int4_cuda.py; what has four dimensions is packed so. For CPUs rows come in blocks of
64 (32 without AVX-512). A byte of a block belongs to one input: its low half is a row of the
block's first half, its high half the same row of the second. So the packed tensor is (blocks, in,
BLOCK / 2) bytes, and rows that fill no block come in pairs of neighbours.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import int4_cuda

PIECE = 4096  # rows laid out at a time
BLOCK = 64 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 32


def pack(codes: Tensor) -> Tensor:
    """(rows, in) uint8 codes below 16 -> (rows or a few more, in / 2) in the kernel's order.

    The kernel wants rows in sixteens: those that are missing are zeros.
    """
    codes = F.pad(codes, (0, 0, 0, -len(codes) % 16))
    if codes.is_cuda:
        return int4_cuda.pack(codes)
    pieces = [  # torch wants four bytes a code: of a vocabulary that is much, for a moment
        torch._convert_weight_to_int4pack_for_cpu(piece.int(), 2)
        for piece in codes.split(PIECE // BLOCK * BLOCK)
    ]
    return torch.cat(pieces)


def is_known(device: torch.device) -> bool:
    """Whether this build of torch packs in the order said here."""
    return int4_cuda.is_known(device) if device.type == "cuda" else _is_known()


@cache
def _is_known() -> bool:
    codes = torch.arange((2 * BLOCK + 16) * 32, dtype=torch.uint8).view(-1, 32) % 13
    try:
        return torch.equal(unpack(pack(codes), 0, len(codes)), codes.T)
    except (RuntimeError, AttributeError):  # a torch without the kernel
        return False


def unpack(packed: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of packed codes, transposed: (in, stop - start) uint8.

    start: a multiple of BLOCK.
    """
    if packed.ndim == 4:
        return int4_cuda.unpack(packed)[:, start:stop]
    columns = packed.shape[1] * 2
    count = min(-(-stop // BLOCK), len(packed) // BLOCK) - start // BLOCK
    whole = packed.view(-1)[start * columns // 2 :][: count * BLOCK * columns // 2]
    blocks = whole.view(count, columns, BLOCK // 2).transpose(0, 1)
    codes = torch.empty(columns, count, 2, BLOCK // 2, dtype=torch.uint8)
    torch.bitwise_and(blocks, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(blocks, 4, out=codes[:, :, 1])
    found = codes.view(columns, -1)[:, : stop - start]
    if stop - start > count * BLOCK:
        left = len(packed) % BLOCK
        pairs = packed.view(-1)[-left * columns // 2 :].view(columns, left // 2)
        rest = torch.stack((pairs & 15, pairs >> 4), -1).view(columns, left)
        found = torch.cat((found, rest[:, : stop - start - count * BLOCK]), 1)
    return found


def rows(packed: Tensor, numbers: Tensor) -> Tensor:
    """Some rows of packed codes, (n, in) uint8 for numbers (n,) int64."""
    if packed.ndim == 4:
        return int4_cuda.unpack(packed)[:, numbers].T
    count, columns = len(packed) // BLOCK, packed.shape[1] * 2
    blocks = packed.view(-1)[: count * BLOCK * columns // 2].view(count, columns, BLOCK // 2)
    inside = numbers % BLOCK
    found = torch.empty(len(numbers), columns, dtype=torch.uint8)
    whole = numbers < count * BLOCK
    bytes_ = blocks[numbers[whole] // BLOCK, :, inside[whole] % (BLOCK // 2)]
    found[whole] = (bytes_ >> (inside[whole] // (BLOCK // 2) * 4).to(torch.uint8)[:, None]) & 15
    if not whole.all():
        found[~whole] = unpack(packed, count * BLOCK, len(packed)).T[inside[~whole]]
    return found


def part(packed: Tensor, start: int, count: int) -> Tensor:
    """So many rows' codes as a view, packed or in the file's order. start: a multiple of BLOCK."""
    if packed.ndim == 4:
        return packed[start // 8 : -(-(start + count) // 8)]
    return packed[start : start + count]
