"""A plain Linear that is multiplied the fastest way its machine has, like those with codes.

On a processor that has no instructions for bfloat16, torch multiplies matrices of it several times
slower than float32; converting the weight piece by piece on the way costs little beside that.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.compiled import Matrix
from compress.kernel_choice import kernel_for
from compress.kernels import FOR_FLOATS, Kernel, matmul_nt


class DenseLinear:
    """y = x W^T + bias, W (out, in) in any floating-point type; the tensors are the caller's."""

    kind, bits, group_size = "dense", 0, -1
    order = offset = zero = int4 = None
    candidates = FOR_FLOATS

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.codes = self.scale = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.out_features, self.in_features = weight.shape
        self.structs: dict[bool, Matrix] = {}  # see compiled.py
        self.chosen: dict[torch.dtype, tuple[Kernel, Kernel]] = {}

    def twin(self) -> Self:
        """See QuantLinear; no kernel changes anything here."""
        return self

    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """See QuantLinear."""
        return matmul_nt(x, self.codes[start:stop].to(x.dtype))

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """See QuantLinear."""
        return f"{kernel_for(self, rows, dtype).name} {str(dtype).removeprefix('torch.')}"

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        rows = x.numel() // self.in_features
        kernel = kernel_for(self, rows, x.dtype)
        if kernel.name == "linear":
            return F.linear(x, self.codes, self.bias)
        y = kernel.multiply(self, x.reshape(-1, self.in_features))
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)
