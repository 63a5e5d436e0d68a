"""Layers that compute in another type than they store: int8 times int8, and float16 storage.

`Int8DynamicLinear` quantizes its input as it comes, one scale and zero a token, and multiplies
integers; `Float16Linear` stores half precision and multiplies in the type of its input.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dtypes import dtype_of, whole
from compress.integer_kernels import FOR_INTEGERS
from compress.kernel_choice import kernel_for
from compress.quant_linear import QuantLinear


class Int8DynamicLinear(QuantLinear):
    """int8 weights, one symmetric scale a row, times int8 inputs, one scale a token.

    Inputs are quantized as they come, asymmetrically: x = input_scale * (code - input_zero). The
    product is one of whole numbers, by a kernel of FOR_INTEGERS: in integers of 32 bits, exact up
    to 66,000 inputs, or in float32.
    """

    kind = "int8_dynamic"
    candidates = FOR_INTEGERS
    _sums: Tensor | None = None

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """See QuantLinear; ValueError for a grid that the integer product does not take."""
        layer = super().from_spec(spec)
        groups = layer.scale.shape[1]
        if layer.bits != 8 or groups != 1 or layer.zero is not None or layer.order is not None:
            raise ValueError("int8_dynamic takes 8-bit symmetric codes with one scale a row")
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        flat = x.reshape(-1, self.in_features)
        steps, scale = quantized_token(flat) if len(flat) == 1 else quantized_tokens(flat)
        y = kernel_for(self, len(flat), x.dtype).multiply(self, steps.to(x.dtype))
        y = (y * scale).to(x.dtype)
        if self.bias is not None:
            y += self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def as_stored(self) -> None:
        """See QuantLinear."""
        super().as_stored()
        self._sums = None

    def row_sums(self) -> Tensor:
        """Sum of each row's codes, (out,) int32."""
        if self._sums is None:
            self._sums = self.codes.sum(1, dtype=torch.int32)
        return self._sums


def quantized_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (tokens, in) as whole numbers code - zero and one scale a token, (tokens, 1), float32.

    The range of a token is widened to contain 0; the code, between -128 and 127, is not stored.
    """
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    low, high = low.float().clamp_(max=0), high.float().clamp_(min=0)
    scale = ((high - low) / 255).clamp_(min=torch.finfo(torch.float32).tiny)
    zero = torch.round(-128 - low / scale)
    return torch.round(x.float() / scale).clamp_(-128 - zero, 127 - zero), scale


def quantized_token(x: Tensor) -> tuple[Tensor, float]:
    """`quantized_tokens` for a single one, its scale a Python number: half as many operations."""
    low, high = (float(end) for end in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
    zero = round(-128 - low / scale)
    return x.float().div_(scale).round_().clamp_(-128 - zero, 127 - zero), scale


class Float16Linear(nn.Module):
    """A Linear stored in float16 that multiplies in the type of its input."""

    kind = "float16"
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """See QuantLinear."""
        return "float16 storage"

    def spec(self) -> dict[str, Any]:
        """See QuantLinear."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """See QuantLinear."""
        rows, columns = whole(spec, "out_features"), whole(spec, "in_features")
        weight = torch.empty(rows, columns, dtype=torch.float16, device="meta")
        if not spec.get("bias"):
            return cls(weight, None)
        return cls(weight, torch.empty(rows, dtype=dtype_of(spec, "bias"), device="meta"))
