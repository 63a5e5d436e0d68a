"""Linear layers with weights removed one by one, stored as a mask and the weights that stay.

A mask of one bit a weight costs the same for every pattern; half of a bfloat16 matrix takes 9 bits
a weight so. In memory the weight is rebuilt, zeros and all, and multiplied like any other: nothing
here is faster than the dense layer.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dtypes import dtype_of, whole
from compress.layers import linear_of

BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class SparseLinear(nn.Module):
    """y = x W^T + bias.

    mask: (out, ceil(in / 8)) uint8, input 8 j + i in bit i of byte j. values: (count,), the weights
    that stay, row by row. bias: (out,) or None.
    """

    kind = "sparse"
    mask: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, mask: Tensor, values: Tensor, bias: Tensor | None, in_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, mask.shape[0]
        for name, tensor in dict(mask=mask, values=values, bias=bias).items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_weight(
        cls, weight: Tensor, stays: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Self:
        """The weights of `weight` (out, in) where `stays` (out, in) bool, in `dtype`.

        Raises ValueError if one is not finite in it.
        """
        values = weight[stays].to(dtype)
        if not values.isfinite().all():
            raise ValueError(f"a weight is too large for {dtype}")
        padded = F.pad(stays, (0, -stays.shape[1] % 8)).view(len(stays), -1, 8)
        mask = (padded * BITS).sum(-1, dtype=torch.uint8)
        return cls(mask, values, None if bias is None else bias.detach().to(dtype), stays.shape[1])

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build the same empty layer: JSON values only."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "count": len(self.values),
            "bias": self.bias is not None,
            "dtype": str(self.values.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """An empty layer on the meta device. Raises ValueError on a spec that makes no sense."""
        rows, columns, count = (
            whole(spec, name) for name in ("out_features", "in_features", "count")
        )
        dtype = dtype_of(spec)
        if count > rows * columns:
            raise ValueError(f"count {count} is more than {rows} x {columns} weights")
        mask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta")
        values = torch.empty(count, dtype=dtype, device="meta")
        bias = torch.empty(rows, dtype=dtype, device="meta") if spec.get("bias") else None
        return cls(mask, values, bias, columns)

    def stays(self) -> Tensor:
        """(out, in) bool: where a weight is stored."""
        bits = self.mask[..., None] & BITS.to(self.mask.device)
        return (bits != 0).flatten(1)[:, : self.in_features]

    def weight(self) -> Tensor:
        """(out, in), zeros where nothing is stored. Raises ValueError if mask and values differ."""
        stays = self.stays()
        if int(stays.sum()) != len(self.values):
            raise ValueError(
                f"a mask of {int(stays.sum())} weights, and {len(self.values)} of them"
            )
        return self.values.new_zeros(stays.shape).masked_scatter_(stays, self.values)

    def plain(self) -> nn.Linear:
        """The same as an ordinary layer, its weight a tensor of its own."""
        return linear_of(nn.Linear, self.weight(), self.bias)

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """Name of the arithmetic, for records."""
        return f"linear {str(dtype).removeprefix('torch.')}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight().to(x.dtype), bias)
