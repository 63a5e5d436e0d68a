"""Ways to multiply integers by integers, for layers whose inputs are quantized too.

x is what the input's codes mean in units of its scale, code - zero, between -255 and 255, as floats
of any type: whole numbers up to 256 are exact in bfloat16 too.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import compiled
from compress.kernels import (
    Kernel,
    fits_all,
    fits_int8pack,
    int8pack,
    int16,
    prepare_int8pack,
    rebuild,
)

CUDA_ROWS = 17  # what `_int_mm` wants there at least


def integers_float(layer: Any, x: Tensor) -> Tensor:
    """Whole numbers in float32: exact while sums stay below 2**24, and rounded once beyond."""
    return rebuild(layer, x.float(), torch.float32)


def fits_int_mm(layer: Any, dtype: torch.dtype) -> bool:
    """torch's int8 product takes any shape on a CPU, eights on CUDA."""
    eights = layer.in_features % 8 == layer.out_features % 8 == 0
    return eights if layer.codes.is_cuda else layer.codes.device.type == "cpu"


def int_mm(layer: Any, x: Tensor) -> Tensor:
    """x = 2 h + l with h, l in int8 would cost two products; the zero is taken out instead."""
    zero = torch.floor(x.amax(1, keepdim=True)).sub_(127)  # so that x - zero ends at 127
    codes = (x - zero).to(torch.int8)
    if codes.is_cuda:
        codes = F.pad(codes, (0, 0, 0, max(0, CUDA_ROWS - len(x))))
    product = torch._int_mm(codes, layer.codes.T)[: len(x)]  # (rows, out) int32
    product += zero.int() * layer.row_sums()
    return product.float() * layer.scale[:, 0].float()


def onednn(layer: Any, x: Tensor) -> Tensor:
    """oneDNN's int8 product; the weight is laid out anew each time, which many rows pay for."""
    low = x.amin(1, keepdim=True)
    codes = (x - low).to(torch.uint8)
    scale = layer.scale[:, 0].float()
    y = onednn_product(codes, layer.codes, scale)
    return y.add_(low.float() * (layer.row_sums().float() * scale))


def onednn_product(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """codes (rows, in) uint8 times weight (out, in) int8, times scale (out,): (rows, out) float32.

    Raises RuntimeError or AttributeError where torch was built without oneDNN.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        *(codes, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    )


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 product is right for the largest codes on this machine.

    Without VNNI it adds pairs of products in 16 bits, where 2 * 255 * 127 does not fit: it
    saturates, and says nothing.
    """
    try:
        x = torch.full((64, 64), 255, dtype=torch.uint8)
        weight = torch.full((64, 64), 127, dtype=torch.int8)
        y = onednn_product(x, weight, torch.ones(64))
    except (RuntimeError, AttributeError):  # a torch built without it
        return False
    return bool((y == 255 * 127 * 64).all())


def fits_onednn(layer: Any, dtype: torch.dtype) -> bool:
    """Where it computes what it should."""
    return layer.codes.device.type == "cpu" and onednn_is_exact()


FOR_INTEGERS = (
    Kernel(
        "compiled",
        compiled.fits,
        lambda layer, x: compiled.multiply(layer, x.float()),  # sums are not rounded to bfloat16
        compiled.prepare,
        few=True,
        called=False,
    ),
    Kernel(
        "compiled int16",  # whole numbers as they are
        lambda layer, dtype: compiled.fits_int16(layer, torch.bfloat16),
        lambda layer, x: int16(layer, x.float()),
        compiled.prepare,
        called=False,
    ),
    Kernel("int8pack", fits_int8pack, int8pack, prepare_int8pack, few=True),
    Kernel("onednn int8", fits_onednn, onednn),
    Kernel("int_mm", fits_int_mm, int_mm),
    Kernel("float32 integers", fits_all, integers_float),
)
