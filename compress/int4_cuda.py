"""The order in which torch's int4 kernel for CUDA wants its codes, and the way back.

It packs tiles of 8 rows and 16 * `tiles` inputs for its warps, (rows / 8, in / (16 * tiles), 32,
tiles / 2) of int32, and gives no way back: the kernel itself is one, as its product with the
identity under scale 1 is the codes. `is_known` tries that before a layer is held so. Not run by
this project, which has no such device; tests run it on a stand-in that follows torch's description.
"""

from functools import cache

import torch
from torch import Tensor

GROUP = 32  # of the identity's product: any that the kernel takes
PIECE = 1024  # rows of the identity at a time


def pack(codes: Tensor) -> Tensor:
    """(rows, in) uint8 codes below 16, rows in eights, in in 32s: the kernel's order.

    The first of two inputs is in the high half of a byte.
    """
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    both = (codes[:, ::2] << 4) | codes[:, 1::2]
    return torch._convert_weight_to_int4pack(both.contiguous(), tiles)


def unpack(packed: Tensor) -> Tensor:
    """All codes, transposed: (in, rows) uint8."""
    rows, columns = 8 * packed.shape[0], 32 * packed.shape[1] * packed.shape[3]
    grid = torch.ones(columns // GROUP, rows, 2, dtype=torch.bfloat16, device=packed.device)
    grid[..., 1] = 8  # (code - 8) * 1 + 8
    found = []
    for start in range(0, columns, PIECE):
        stop = min(start + PIECE, columns)
        some = torch.zeros(stop - start, columns, dtype=torch.bfloat16, device=packed.device)
        some.diagonal(start).fill_(1)
        found.append(multiply(some, packed, GROUP, grid).to(torch.uint8))
    return torch.cat(found)


def multiply(x: Tensor, packed: Tensor, size: int, grid: Tensor) -> Tensor:
    """x (n, in) bfloat16 times (code - 8) * scale + offset; grid: (in / size, rows, 2)."""
    return torch._weight_int4pack_mm(x, packed, size, grid)


@cache
def is_known(device: torch.device) -> bool:
    """Whether codes come back as they were packed, and products are those of the codes."""
    try:
        codes = torch.arange(16 * 128, dtype=torch.uint8, device=device).view(16, 128) % 13
        return torch.equal(unpack(pack(codes)), codes.T)
    except (RuntimeError, AttributeError):  # a torch or a device without the kernel
        return False
