"""What calibration has seen of the inputs of linear layers: sums, and what methods are given."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from compress.kernels import matmul_nt
from compress.layers import Half


@dataclass
class Group:
    """Linear layers of one block that read the same input, and what calibration saw of it.

    names: relative to the block. gram: (in, in) float32, mean of x x^T over the tokens.
    magnitude: (in,) float32, mean of |x|. largest: (in,) float32, maximum of |x|. ahead: float32,
    mean of d x^T, where d is what the float model is ahead by: of x, (in, in); for the last layer
    of a half, of its output on x with the half's own input added, as the next half reads it,
    (out, in). None unless it was asked for.
    """

    block: nn.Module
    half: Half
    names: tuple[str, ...]
    gram: Tensor
    magnitude: Tensor
    largest: Tensor
    ahead: Tensor | None

    def drift(self, weight: Tensor) -> Tensor:
        """Mean of d x^T, (out, in), d being what outputs by `weight` (out, in) fall behind by."""
        assert self.ahead is not None
        return self.ahead if self.names == (self.half.output,) else weight @ self.ahead

    def chosen(self, skip: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
        """Name in the block -> layer, without those whose name ends in one of `skip`."""
        return {
            name: cast(nn.Linear, self.block.get_submodule(name))
            for name in self.names
            if not name.endswith(skip)
        }


class Statistics:
    """Running sums over the rows of one linear layer's input."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.largest: Tensor | None = None
        self.ahead: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, ahead: Tensor | None = None) -> None:
        """x: (..., in), any float type. ahead: (..., any), d of the sum of d x^T, if wanted."""
        rows = x.flatten(0, -2)
        columns = rows.T.contiguous().float()  # (in, tokens)
        if self.gram is None or self.magnitude is None or self.largest is None:
            self.gram = columns.new_zeros(len(columns), len(columns))
            self.magnitude, self.largest = columns.new_zeros(2, len(columns))
        self.magnitude += torch.linalg.vector_norm(columns, ord=1, dim=1)
        low, high = torch.aminmax(columns, dim=1)
        self.largest = torch.maximum(self.largest, torch.maximum(-low, high))
        self.tokens += len(rows)
        step = max(128, len(columns) // 4)  # the lower triangle is the upper one, mirrored
        for start in range(0, len(columns), step):
            stop = start + step
            self.gram[start:stop, start:] += matmul_nt(columns[start:stop], columns[start:])
        if ahead is not None:
            product = matmul_nt(ahead.flatten(0, -2).T.contiguous().float(), columns)
            self.ahead = product if self.ahead is None else self.ahead.add_(product)

    def group(self, block: nn.Module, half: Half, names: tuple[str, ...]) -> Group:
        """The finished sums as a Group. Raises ValueError if they are not finite."""
        assert self.gram is not None and self.magnitude is not None and self.largest is not None
        gram = (self.gram.triu() + self.gram.triu(1).T) / self.tokens
        ahead = None if self.ahead is None else self.ahead / self.tokens
        if not all(sums is None or sums.isfinite().all() for sums in (gram, ahead)):
            raise ValueError(f"the input of {names[0]} holds NaN or infinity")
        return Group(block, half, names, gram, self.magnitude / self.tokens, self.largest, ahead)
