"""Ways to multiply by a quantized weight, every one over the same codes and for the same weights.

`FOR_WEIGHTS` holds those for layers that quantize weights only, `FOR_FLOATS` those for plain
weights; integer_kernels.py has those that multiply integers by integers. Each says which layers it
takes: torch's kernels check little, and a wrong group or an unaligned pointer is a crash there, so
what does not fit goes to `rebuild`, which takes every layer. Which one is used is measured once a
shape and machine (kernel_choice.py).

On CUDA the candidates are torch's own kernels, for any number of rows. They were not run by this
project, which has no such device. Not here: oneDNN's float8, 2-bit and sparse kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import compiled, int4_cuda, int4_layout

INT4_GROUPS = (256, 128, 64, 32)  # what torch's int4 kernels take; the CPU's does not check
ALIGNMENT = 64  # bytes; what torch's allocator gives, and a memory-mapped file does not
PIECE = 2**20  # weights rebuilt at a time: what a shared cache holds, and the only scratch


@dataclass(frozen=True)
class Kernel:
    """One way to multiply.

    fits: (layer, type of the input) -> whether it takes them. prepare: changes how the layer holds
    its codes, if the kernel wants them otherwise. multiply: (layer, input (rows, in)) -> (rows,
    out) in the input's type, without bias. few: meant for a few rows of input only. called: from
    Python also where C decodes a token; see token_step.py.
    """

    name: str
    fits: Callable[[Any, torch.dtype], bool]
    multiply: Callable[[Any, Tensor], Tensor]
    prepare: Callable[[Any], None] = lambda layer: None
    few: bool = False
    called: bool = True


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for (m, k) and (n, k) of one type, float32 by oneDNN on CPU.

    torch's default float32 product on CPU is MKL's, which leaves half of AVX-512 unused on
    processors that are not Intel's: measured 2.2x slower there, and no faster elsewhere.
    """
    by_onednn = a.dtype == torch.float32 and a.device.type == "cpu"
    if by_onednn and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def rebuild(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rebuild some rows of the weight in `dtype`, multiply, go on with the next ones."""
    if layer.order is not None:
        x = x[:, layer.order]
    wide = x.to(dtype)
    y = x.new_empty(len(x), layer.out_features)
    step = max(int4_layout.BLOCK, PIECE // layer.in_features // 64 * 64)
    for start in range(0, layer.out_features, step):
        stop = min(start + step, layer.out_features)
        y[:, start:stop] = layer.multiply_rows(wide, start, stop)
    return y


def fits_rebuild(layer: Any, dtype: torch.dtype) -> bool:
    """In the input's own type; float16 sums would overflow where scales come last."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and layer.scale.shape[1] > 1)


def fits_all(layer: Any, dtype: torch.dtype) -> bool:
    """Every layer."""
    return True


def int4_group(layer: Any) -> int | None:
    """The group size that the int4 kernel can be told for `layer`; None if there is none.

    A group that the kernel does not know is cut into equal ones that it does.
    """
    shared = gcd(layer.group_size, layer.in_features)
    return next((size for size in INT4_GROUPS if shared % size == 0), None)


def fits_int4pack(layer: Any, dtype: torch.dtype) -> bool:
    """Up to 4 bits, bfloat16 (float32 is ten times slower there), scales that bfloat16 holds."""
    return (
        layer.bits <= 4
        and dtype == torch.bfloat16
        and layer.scale.dtype == torch.bfloat16
        and layer.order is None
        and layer.offset is None
        and int4_layout.is_known(layer.codes.device)
        and int4_group(layer) is not None
    )


def prepare_int4pack(layer: Any) -> None:
    """Hold the codes as the kernel wants them, in place of those of the file."""
    if layer.int4 is not None:
        return
    size = int4_group(layer)
    assert size is not None
    zero = layer.zeros()
    layer.hold_int4()
    owner = torch.arange(0, layer.in_features, size) // layer.group_size
    scale = layer.scale[:, owner].expand(layer.out_features, -1)
    both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)  # (out, groups, 2)
    shift, middle = None, 2 ** (layer.bits - 1)
    if not (zero == middle).all():
        away = (middle - zero[:, owner].float()) * scale.float()
        shift = away.T.contiguous()
    both = F.pad(both.transpose(0, 1), (0, 0, 0, -layer.out_features % 16)).contiguous()
    layer.int4 = size, both, shift


def int4pack(layer: Any, x: Tensor) -> Tensor:
    """torch's kernel computes (code - middle) * scale + offset; our zero is added apart.

    The kernel's own offset is rounded to bfloat16 and would shift the weights, so it stays 0 and
    the exact term, the sum over a group of x times scale * (middle - zero), is added in float32.
    """
    size, scale_and_offset, shift = layer.int4
    x = x.contiguous()
    if not scale_and_offset.is_contiguous():  # rows of a joined layer
        scale_and_offset = scale_and_offset.contiguous()
    if layer.codes.ndim == 4:
        y = int4_cuda.multiply(x, layer.codes, size, scale_and_offset)
    else:
        y = torch._weight_int4pack_mm_for_cpu(x, layer.codes, size, scale_and_offset)
    y = y if y.shape[1] == layer.out_features else y[:, : layer.out_features]
    if shift is not None:
        y += x.view(len(x), -1, size).sum(-1, dtype=torch.float32) @ shift
    return y


def fits_int8pack(layer: Any, dtype: torch.dtype) -> bool:
    """8 bits with one scale a row, bfloat16.

    Unchecked by the kernel: it reads 16 codes at a time, with aligned loads.
    """
    return (
        layer.bits == 8
        and dtype == torch.bfloat16
        and layer.scale.dtype == torch.bfloat16
        and layer.order is None
        and layer.offset is None
        and layer.scale.shape[1] == 1
        and layer.in_features % 16 == 0
        and (has_cuda_int8() if layer.codes.is_cuda else layer.codes.data_ptr() % ALIGNMENT == 0)
    )


@cache
def has_cuda_int8() -> bool:
    """Whether this torch has `_weight_int8pack_mm` for CUDA."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has("aten::_weight_int8pack_mm", "CUDA"))


def prepare_int8pack(layer: Any) -> None:
    """One scale a row, and what the zeros add, for `int8pack`."""
    if layer.int8 is None:
        scale = layer.scale[:, 0].expand(layer.out_features).contiguous()
        shift = None
        if layer.zero is not None:
            zero = layer.zeros()[:, 0]
            shift = (128 - zero.float()).mul(layer.scale[:, 0].float()).expand(len(scale))
        layer.int8 = scale, shift


def int8pack(layer: Any, x: Tensor) -> Tensor:
    """torch's kernel computes (code - 128) * scale; our zero is added apart, in float32."""
    scale, shift = layer.int8
    y = torch._weight_int8pack_mm(x.contiguous(), layer.codes, scale)
    if shift is not None:
        y += x.sum(-1, keepdim=True, dtype=torch.float32) * shift
    return y


def int16(layer: Any, x: Tensor) -> Tensor:
    """Our kernel with rounded inputs, for a few rows or many."""
    return compiled.multiply(layer, x, int16=True)


FOR_WEIGHTS = (
    Kernel("compiled", compiled.fits, compiled.multiply, compiled.prepare, few=True, called=False),
    Kernel("compiled int16", compiled.fits_int16, int16, compiled.prepare, called=False),
    Kernel("int4pack", fits_int4pack, int4pack, prepare_int4pack, few=True),
    Kernel("int8pack", fits_int8pack, int8pack, prepare_int8pack, few=True),
    Kernel("rebuild", fits_rebuild, lambda layer, x: rebuild(layer, x, x.dtype)),
    Kernel("rebuild float32", fits_all, lambda layer, x: rebuild(layer, x, torch.float32)),
)


FOR_FLOATS = (  # layers of plain weights
    Kernel("compiled", compiled.fits_dense, compiled.multiply, few=True, called=False),
    Kernel(
        "float32 pieces",
        lambda layer, dtype: dtype != torch.float32,
        lambda layer, x: rebuild(layer, x, torch.float32),
    ),
    Kernel("linear", fits_all, lambda layer, x: F.linear(x, layer.codes)),
)
