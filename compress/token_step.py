"""One token through a Decoder with the C functions of native/token.c between the matrix products.

The same function as Decoder.forward for one token, in a quarter of the calls; sums and exponentials
are float32 also where torch would round in between. Taken where there is a compiler.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import compiled
from compress.decoder_parts import GatedUnit, RmsNorm

if TYPE_CHECKING:
    from compress.decoder import Cache, Decoder

NAME = "compiled attention"  # in records, beside the kernels of the layers
WIDEST = 512  # of a head; see token.c


def takes(decoder: "Decoder") -> bool:
    """Whether `step` computes this decoder here: CPU, bfloat16 or float32, widths in eights."""
    norms = [norm for block in decoder.blocks for norm in (block.norm1, block.norm2)]
    return (
        all(_is_plain(norm, decoder.dtype) for norm in [*norms, decoder.norm])
        and decoder.heads % decoder.key_heads == 0
        and decoder.width % 16 == 0
        and decoder.width <= WIDEST
        and compiled.library() is not None
    )


def _is_plain(norm: Any, dtype: torch.dtype) -> bool:
    """Whether `norm` is known to be the one that C computes, over a width that C takes."""
    names = {torch.nn.LayerNorm: ("weight", "bias"), RmsNorm: ("weight",)}.get(type(norm))
    parts = [getattr(norm, name) for name in names or ()]
    return bool(parts) and all(
        part is not None
        and part.dtype == dtype
        and dtype in (torch.bfloat16, torch.float32)
        and part.device.type == "cpu"
        and part.is_contiguous()
        and part.ndim == 1
        and len(part) % 8 == 0
        for part in parts
    )


def step(decoder: "Decoder", x: Tensor, cache: "Cache") -> Tensor:
    """Embedded tokens (batch, 1, width) -> the same after the last norm; enters them into `cache`.

    The cache has room for them, and counts them already. Changes x.
    """
    angles = decoder.rotary.at(cache.length - 1, cache.length) if decoder.rotary else None
    x = x.contiguous()
    delta = None
    for block, held in zip(decoder.blocks, cache.blocks, strict=True):
        qkv = block.qkv(add_norm(x, delta, block.norm1))
        delta = block.out(attend(decoder, qkv, angles, held, cache.length - 1))
        up = block.up(add_norm(x, delta, block.norm2))
        gated = (
            isinstance(block.inner, GatedUnit) and up.shape[-1] % 16 == 0 and up.dtype == x.dtype
        )
        delta = block.down(gate(up) if gated else block.inner(up))
    return add_norm(x, delta, decoder.norm)


def add_norm(x: Tensor, delta: Tensor | None, norm: Any) -> Tensor:
    """x += delta in place, then its norm: (..., width) -> the same."""
    y, bias = torch.empty_like(x), getattr(norm, "bias", None)
    width = x.shape[-1]
    if delta is not None:  # other libraries' layers may answer in another type
        delta = delta.to(x.dtype).reshape(x.shape).contiguous()
    tensors = (x, delta, norm.weight, bias, y)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    compiled.loaded().add_norm(*pointers, x.numel() // width, width, norm.eps, _bfloat16(x))
    return y


def gate(x: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of (..., 2 * inner): (..., inner)."""
    x = x.contiguous()
    inner = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], inner)
    compiled.loaded().gate(x.data_ptr(), y.data_ptr(), y.numel() // inner, inner, _bfloat16(x))
    return y


def attend(decoder: "Decoder", qkv: Tensor, angles: Any, held: Tensor, before: int) -> Tensor:
    """(batch, 1, rows of qkv) -> (batch, 1, heads * width); enters key and value into `held`.

    before: tokens in `held`, (2, batch, key heads, room, width). Raises ValueError if the
    angles are not a head's, MemoryError if there is no room for the scores.
    """
    _, batch, _, room, width = held.shape
    rows = (decoder.heads + 2 * decoder.key_heads) * width
    qkv = qkv.to(held.dtype).reshape(batch, 1, rows).contiguous()
    if angles is not None and any(
        part.shape[-1] != width or part.dtype != held.dtype for part in angles
    ):
        raise ValueError(f"rotary angles are not {width} numbers of {held.dtype} a position")
    y = qkv.new_empty(batch, 1, decoder.heads * width)
    cos, sin = (None, None) if angles is None else (part.data_ptr() for part in angles)
    sizes = batch, decoder.heads, decoder.key_heads, width, room, before
    pointers = qkv.data_ptr(), cos, sin, held.data_ptr(), y.data_ptr()
    if compiled.loaded().attend(*pointers, *sizes, decoder.scale, _bfloat16(qkv)):
        raise MemoryError("no memory for the scores of attention")
    return y


def _bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
