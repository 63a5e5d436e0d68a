"""Layers as ONNX operators: what each kind of layer becomes in a graph.

A layer here means what the layer means that it was made from, and holds its numbers as they are
stored: codes stay codes (the contrib operator MatMulNBits), int8 products stay integers
(MatMulInteger), a bfloat16 matrix stays one in the file and is cast where it is used. Matrices lie
(in, out), as ONNX multiplies them; a head tied to the embedding reads the embedding's.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits);
https://onnx.ai/onnx/operators (MatMulInteger, Gemm)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.ops import symbolic

from compress.dynamic_linear import Float16Linear, Int8DynamicLinear
from compress.low_rank_linear import LowRankLinear
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear

BLOCKS = (16, 32, 64, 128, 256)  # numbers that may share a scale in MatMulNBits
ROW_BLOCK = 128  # where a whole row shares one, it is written once a block of so many


class Dense(nn.Module):
    """y = x W + bias. weight: (in, out), kept in its type and cast to that of x."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight.detach().T.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return added(x @ self.weight.to(x.dtype), self.bias)


class Thin(nn.Module):
    """A product of two matrices, one after the other."""

    def __init__(self, layer: LowRankLinear):
        super().__init__()
        self.first, self.second = Dense(layer.first), Dense(layer.second, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.second(self.first(x))


class Codes(nn.Module):
    """A QuantLinear as MatMulNBits, code for code.

    codes: (out, blocks, bytes) uint8, low bits first. scale: (out, blocks). zero: (out, bytes)
    uint8, or None for the middle. order: (in,) int64, see QuantLinear. Codes of 3 bits are stored
    in 4, those of 2 too; one scale a row is written once a block. Raises ValueError for a grid that
    MatMulNBits does not have.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantLinear, accuracy_level: int):
        super().__init__()
        if layer.offset is not None:
            raise ValueError("MatMulNBits has zeros that are codes, not offsets")
        size, columns = layer.group_size, layer.in_features
        block = ROW_BLOCK if size == columns else size
        if block not in BLOCKS:
            raise ValueError(f"MatMulNBits takes groups of {BLOCKS} or whole rows, not {size}")
        codes, zero = layer.codes_and_zero()
        self.bits, self.block = max(layer.bits, 4), block
        raised = 0 if layer.bits in (4, 8) else 8 - 2 ** (layer.bits - 1)
        blocks, rows = -(-columns // block), layer.out_features
        codes = F.pad(codes + raised, (0, blocks * block - columns)).view(rows, blocks, block)
        each = (layer.scale, zero + raised)
        scale, zero = (x.expand(rows, -1).expand(rows, blocks).contiguous() for x in each)
        self.in_features, self.out_features = columns, rows
        self.accuracy_level = accuracy_level
        self.register_buffer("codes", bytes_of(codes, self.bits))
        self.register_buffer("scale", scale)
        symmetric = layer.zero is None
        self.register_buffer("zero", None if symmetric else bytes_of(zero, self.bits))
        order = None if layer.order is None else layer.order.long()
        self.register_buffer("order", order)
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        scale = self.scale.to(x.dtype)
        y = symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, scale, *([] if self.zero is None else [self.zero])),
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": self.bits,
                "block_size": self.block,
                "accuracy_level": self.accuracy_level,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return added(y, self.bias)

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix that the codes mean: (..., in) for numbers (...) int64."""
        codes = values_of(self.codes[numbers], self.bits)  # (..., blocks, block)
        if self.zero is None:
            zero: Any = 2 ** (self.bits - 1)
        else:
            blocks = self.scale.shape[1]
            zero = values_of(self.zero[numbers], self.bits)[..., :blocks, None].to(dtype)
        scale = self.scale[numbers][..., None].to(dtype)
        return ((codes.to(dtype) - zero) * scale).flatten(-2)[..., : self.in_features]


class Integers(nn.Module):
    """An Int8DynamicLinear: MatMulInteger between inputs that are rounded a token at a time.

    codes: (in, out) uint8, the middle 128: of products of signed numbers some processors cut the
    sums. scale: (out,). sums: (out,), of what the codes mean.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    middle: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int8DynamicLinear):
        super().__init__()
        self.out_features = layer.out_features
        codes = layer.codes_and_zero()[0]
        self.register_buffer("codes", codes.T.contiguous())
        self.register_buffer("scale", layer.scale.expand(self.out_features, 1)[:, 0].contiguous())
        self.register_buffer("sums", layer.row_sums().float())
        self.register_buffer("middle", torch.tensor(128, dtype=torch.uint8))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        wide = x.float()
        low, high = wide.amin(-1, True).clamp(max=0), wide.amax(-1, True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / scale)
        codes = (torch.round(wide / scale) + zero).clamp(0, 255).to(torch.uint8)
        total = symbolic(
            "MatMulInteger",
            (codes, self.codes, None, self.middle),
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.out_features),
        )
        y = (total.float() - zero * self.sums) * (scale * self.scale.float())
        return added(y.to(x.dtype), self.bias)


class RmsNorm(nn.Module):
    """The operator RMSNormalization."""

    def __init__(self, weight: Tensor, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight.detach(), False), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return symbolic(
            "RMSNormalization",
            (x, self.weight),
            {"epsilon": self.epsilon},
            dtype=x.dtype,
            shape=x.shape,
        )


class Table(nn.Module):
    """The embedding in the type that the graph computes in: rows of a matrix, or of codes."""

    weight: Tensor

    def __init__(self, rows: Tensor | Codes, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.codes = dtype, rows if isinstance(rows, Codes) else None
        if not isinstance(rows, Codes):
            self.register_buffer("weight", rows.detach())

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        if self.codes is not None:
            return self.codes.rows(ids, self.dtype)
        return F.embedding(ids, self.weight).to(self.dtype)


def operators(layer: Any, accuracy_level: int) -> nn.Module | None:
    """What stands for `layer` in a graph; None for one that is as torch has it."""
    if isinstance(layer, Int8DynamicLinear):
        return Integers(layer)
    if isinstance(layer, QuantLinear):
        return Codes(layer, accuracy_level)
    if isinstance(layer, LowRankLinear):
        return Thin(layer)
    if isinstance(layer, nn.Linear | Float16Linear):
        return Dense(layer.weight, layer.bias)
    if type(layer).__name__ == "LlamaRMSNorm":
        return RmsNorm(layer.weight, layer.variance_epsilon)
    if type(layer).__name__ == "NewGELUActivation":  # written out: eight operators
        return nn.GELU("tanh")
    return None


def table_of(layer: Any, dtype: torch.dtype, codes: Codes | None) -> Table:
    """An embedding. codes: of QuantEmbedding's table, where the head has them already."""
    if isinstance(layer, QuantEmbedding):
        return Table(codes or Codes(layer.table, 0), dtype)
    return Table(layer.weight, dtype)


def added(y: Tensor, bias: Tensor | None) -> Tensor:
    """With the bias, in the type of y."""
    return y if bias is None else y + bias.to(y.dtype)


def bytes_of(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., count) of 4 or 8 bits, packed along the last axis, low bits first."""
    if bits == 8:
        return codes.contiguous()
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def values_of(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `bytes_of`, padding included."""
    if bits == 8:
        return packed
    four, low = (torch.full((), each, dtype=torch.uint8) for each in (4, 15))
    like: Any = {"dtype": torch.uint8, "shape": packed.shape}
    halves = (
        symbolic("BitwiseAnd", (packed, low), **like),
        symbolic("BitShift", (packed, four), {"direction": "RIGHT"}, **like),
    )
    return torch.stack(halves, -1).flatten(-2)
