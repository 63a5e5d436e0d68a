"""One token through a Decoder in one call of C: native/decode.c.

The same function as Decoder.forward for one token; sums and exponentials are float32 also where
torch would round in between. C computes norms, attention and what stands between the MLP's layers,
and the layers whose kernel is one of ours; the others it asks for by a call back, in the order in
which they come. Taken where there is a compiler.
"""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import compiled
from compress.compiled import INT, POINTER, Matrix
from compress.decoder_parts import GatedUnit, Gelu, RmsNorm
from compress.dynamic_linear import Int8DynamicLinear
from compress.kernel_choice import kernel_for

if TYPE_CHECKING:
    from compress.decoder import Block, Cache, Decoder

NAME = "compiled step"  # in records, beside the kernels of the layers
WIDEST = 512  # of a head; see token.c
LAYERS = ("qkv", "out", "up", "down", "inner")  # as decode.c counts them
OTHER, GATE, GELU = range(3)
CALL = ctypes.CFUNCTYPE(INT, ctypes.c_int64, ctypes.c_int32)
FAILED = 2  # what a call back answers then


class NormStruct(ctypes.Structure):
    """`norm` of decode.c."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("eps", ctypes.c_float))


class BlockStruct(ctypes.Structure):
    """`block` of decode.c."""

    _fields_ = (
        ("norms", NormStruct * 2),
        ("layers", Matrix * 4),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads")),
        ("up", ctypes.c_int64),
        ("inner", ctypes.c_int32),
    )


class DecoderStruct(ctypes.Structure):
    """`decoder` of decode.c."""

    _fields_ = (
        ("blocks", POINTER),
        ("last", NormStruct),
        *((name, ctypes.c_int64) for name in ("count", "batch", "columns", "width")),
        ("scale", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
        *((name, POINTER) for name in ("x", "normed", "wide", "inner", "delta")),
        ("caches", POINTER),
        ("call", CALL),
    )


def takes(decoder: "Decoder") -> bool:
    """Whether `step` computes this decoder here: CPU, bfloat16 or float32, widths in eights."""
    norms = [norm for block in decoder.blocks for norm in (block.norm1, block.norm2)]
    return (
        all(_is_plain(norm, decoder.dtype) for norm in [*norms, decoder.norm])
        and all(block.heads % block.key_heads == 0 for block in decoder.blocks)
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


@dataclass
class Program:
    """A decoder's blocks as C wants them. shapes: outputs of `up` and of `inner`, each block's."""

    blocks: Any
    last: NormStruct
    shapes: list[tuple[int, int]]
    held: list[Tensor | None]  # what the structures point to


def program(decoder: "Decoder") -> Program:
    """Chooses the kernels of all layers for one row, where that is not done."""
    held: list[Tensor | None] = []
    blocks = (BlockStruct * len(decoder.blocks))()
    shapes = []
    for block, struct in zip(decoder.blocks, blocks, strict=True):
        for which, norm in enumerate((block.norm1, block.norm2)):
            struct.norms[which] = _norm(norm, held)
        for which, name in enumerate(LAYERS[:4]):
            struct.layers[which] = _matrix(getattr(block, name), decoder.dtype, held)
        up, inner = _inner_shape(decoder, block)
        shapes.append((up, inner))
        struct.heads, struct.key_heads, struct.up = block.heads, block.key_heads, up
        if isinstance(block.inner, GatedUnit) and up % 16 == 0:
            struct.inner = GATE
        elif isinstance(block.inner, Gelu) and block.inner.approximate == "tanh" and up % 8 == 0:
            struct.inner = GELU
    return Program(blocks, _norm(decoder.norm, held), shapes, held)


def _norm(norm: Any, held: list[Tensor | None]) -> NormStruct:
    parts = norm.weight, getattr(norm, "bias", None)
    held += parts
    return NormStruct(*(None if part is None else part.data_ptr() for part in parts), norm.eps)


def _matrix(called: Any, dtype: torch.dtype, held: list[Tensor | None]) -> Matrix:
    """A layer for C; zeros if it is to be asked for."""
    layer = getattr(called, "__self__", called)
    if not hasattr(layer, "candidates"):
        return Matrix()
    kernel = kernel_for(layer, 1, dtype)
    if kernel.called:
        return Matrix()
    kernel.prepare(layer)
    bias = None if layer.bias is None else layer.bias.to(dtype).contiguous()
    held += [layer.codes, getattr(layer, "pairs", None), bias]
    struct = compiled.matrix(layer, int16=kernel.name.endswith("int16"))
    struct.bias = None if bias is None else bias.data_ptr()
    struct.integers = isinstance(layer, Int8DynamicLinear)
    return struct


def _columns(decoder: "Decoder") -> int:
    """What goes from block to block has so many numbers a token."""
    norm: Any = decoder.norm
    return len(norm.weight)


def _inner_shape(decoder: "Decoder", block: "Block") -> tuple[int, int]:
    """Outputs of `up` and of `inner`, as these answer to zeros."""
    up = block.up(torch.zeros(1, 1, _columns(decoder), dtype=decoder.dtype))
    return up.shape[-1], block.inner(up).shape[-1]


class Step:
    """What one cache needs to be stepped: places for what goes from layer to layer.

    x, normed, delta: (batch, 1, columns); wide: rows of qkv or up; inner: columns of out or down.
    """

    def __init__(self, decoder: "Decoder", batch: int):
        self.decoder, self.program = decoder, decoder.program
        columns, dtype = _columns(decoder), decoder.dtype
        attended = [block.heads * decoder.width for block in decoder.blocks]
        rows = [(block.heads + 2 * block.key_heads) * decoder.width for block in decoder.blocks]
        self.x, self.normed, self.delta = torch.empty(3, batch, 1, columns, dtype=dtype).unbind()
        most = [max(part) for part in zip(*self.program.shapes, strict=True)]
        wide = torch.empty(batch * max(*rows, most[0]), dtype=dtype)
        inner = torch.empty(batch * max(*attended, most[1]), dtype=dtype)

        def part(of: Tensor, width: int) -> Tensor:
            return of[: batch * width].view(batch, 1, width)

        self.ends = []  # of each block's layers: what goes in, what comes out
        sizes = zip(rows, attended, self.program.shapes, strict=True)
        for qkv, out, (number, gated) in sizes:
            attention = (self.normed, part(wide, qkv)), (part(inner, out), self.delta)
            up, down = part(wide, number), part(inner, gated)
            self.ends.append((*attention, (self.normed, up), (down, self.delta), (up, down)))
        self.caches = (POINTER * len(decoder.blocks))()
        self.error: BaseException | None = None
        places = (each.data_ptr() for each in (self.x, self.normed, wide, inner, self.delta))
        self.struct = DecoderStruct(
            *(ctypes.addressof(self.program.blocks), self.program.last, len(decoder.blocks)),
            *(batch, columns, decoder.width, decoder.scale),
            *(dtype == torch.bfloat16, *places, ctypes.addressof(self.caches), CALL(self._call)),
        )

    def _call(self, block: int, which: int) -> int:
        """Compute a layer that C has not. An error waits until C has returned."""
        try:
            x, y = self.ends[block][which]
            y.copy_(getattr(self.decoder.blocks[block], LAYERS[which])(x).reshape(y.shape))
        except BaseException as error:
            self.error = error
            return FAILED
        return 0

    def run(self, x: Tensor, cache: "Cache") -> Tensor:
        """See `step`."""
        angles = self.decoder.rotary
        cos, sin = angles.at(cache.length - 1, cache.length) if angles else (None, None)
        for angle in (cos, sin):
            if angle is not None and (angle.shape[-1], angle.dtype) != (
                self.decoder.width,
                self.decoder.dtype,
            ):
                raise ValueError(
                    f"rotary angles are not {self.decoder.width} numbers of {self.decoder.dtype} "
                    "a position"
                )
        for number, held in enumerate(cache.blocks):
            self.caches[number] = held.data_ptr()
        self.x.copy_(x)
        pointers = (None if angle is None else angle.data_ptr() for angle in (cos, sin))
        failed = compiled.loaded().decode(
            *(ctypes.byref(self.struct), *pointers, cache.room, cache.length - 1)
        )
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if failed:
            raise MemoryError("no memory to decode a token")
        return self.normed.clone()


def step(decoder: "Decoder", x: Tensor, cache: "Cache") -> Tensor:
    """Embedded tokens (batch, 1, columns) -> the same after the last norm; enters them in `cache`.

    The cache has room for them, and counts them already. Raises what a layer raises, ValueError if
    the angles are not a head's, MemoryError.
    """
    if cache.step is None:
        cache.step = Step(decoder, len(x))
    return cache.step.run(x, cache)
