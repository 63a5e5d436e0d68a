"""Linear layers whose weight is a product of two thin matrices."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dtypes import dtype_of, whole


class LowRankLinear(nn.Module):
    """y = x first^T second^T + bias.

    first: (rank, in). second: (out, rank). bias: (out,) or None.
    """

    kind = "low_rank"

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None):
        super().__init__()
        self.rank, self.in_features = first.shape
        self.out_features = len(second)
        self.first, self.second = nn.Parameter(first, False), nn.Parameter(second, False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build the same empty layer: JSON values only."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name) for name in ("in_features", "out_features", "rank")},
            "bias": self.bias is not None,
            "dtype": str(self.first.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """An empty layer on the meta device. Raises ValueError on a spec that makes no sense."""
        rows, columns, rank = (
            whole(spec, name) for name in ("out_features", "in_features", "rank")
        )
        if rank > min(rows, columns):
            raise ValueError(f"rank {rank} is more than {rows} x {columns} can have")
        dtype = dtype_of(spec)
        sizes = [(rank, columns), (rows, rank), (rows,)]
        first, second, bias = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
        return cls(first, second, bias if spec.get("bias") else None)

    def weight(self) -> Tensor:
        """(out, in): the product of the two."""
        return self.second.detach() @ self.first.detach()

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """Name of the arithmetic, for records."""
        return f"low rank {str(dtype).removeprefix('torch.')}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        first, second = self.first.to(x.dtype), self.second.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(F.linear(x, first), second, bias)
