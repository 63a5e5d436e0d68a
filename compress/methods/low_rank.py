"""Low rank: every matrix becomes a product of two thin ones, by an SVD that knows the inputs.

With H = E[x x^T] = S S^T the squared error of a change D of the weight is |D S|^2, so the best
product of rank k is had from the SVD of W S: W' = U_k Sigma_k V_k^T S^-1, at the cost of the
squared singular values that are dropped. A rank k holds k (out + in) numbers for out * in.

Gives plain products that every machine multiplies fast, and can be trained afterwards (`recover`,
`distill`). Language models' matrices are nearly of full rank: at the same size four bits lose far
less. Records on gpt2-mini: 7098b715502b, then taught by its parent d32d1b13bcc9.

Source: X. Wang et al., "SVD-LLM", 2024, section 3.1, https://arxiv.org/abs/2403.07378
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.base import Compressor, Progress, part_of, silent
from compress.layer_inputs import Group
from compress.layers import (
    SKIP,
    cast_parameters,
    decoder_blocks,
    model_dtype,
    named_finite,
    named_linears,
    refuse_no_effect,
)
from compress.low_rank_linear import LowRankLinear
from compress.output_error import check_damping, inverse_factor
from compress.registry import register
from compress.unit_budget import check_budget

Key = tuple[int, str]  # number of the block, name in it


@dataclass(frozen=True)
class LowRank(Compressor):
    """ratio: at least this share of the weights in the blocks' linear layers goes.

    spread: "uniform" takes it from every matrix; "global" drops the singular values that are the
    least share of their matrix's output for the numbers they take, and leaves a matrix whole where
    a product would be no smaller. whiten: False for the plain SVD of W, to compare with. damping:
    share of the mean of H's diagonal added to it. skip: layers whose dotted name in the block ends
    in one of these stay whole.
    """

    needs_calibration: ClassVar[bool] = True
    leaves: ClassVar[str] = "factors"

    ratio: float = 0.2
    spread: str = "uniform"
    whiten: bool = True
    damping: float = 0.001
    skip: tuple[str, ...] = SKIP

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_budget(self.ratio, self.spread)
        check_damping(self.damping)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Factor the matrices of `model` in place, block by block, and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no sense,
        if a weight is not finite, or the ratio leaves a matrix no rank.
        """
        refuse_no_effect(model, self.skip)
        blocks = decoder_blocks(model)
        numbers = {id(block): number for number, (_, block) in enumerate(blocks)}
        shapes = {
            (number, name): tuple(layer.weight.shape)
            for number, (_, block) in enumerate(blocks)
            for name, layer in named_linears(block, self.skip)
        }
        passes = 1 if self.spread == "uniform" else 2
        ranks = uniform_ranks(shapes, self.ratio)
        if self.spread == "global":
            spectra: dict[Key, Tensor] = {}

            def look(groups: list[Group]) -> dict[str, nn.Module]:
                for group in groups:
                    for name, layer in group.chosen(self.skip).items():
                        values = self.decompose(named_finite(name, layer), group.gram)[1]
                        spectra[numbers[id(group.block)], name] = values.square()
                return {}

            calibrate.run(model, calibration, look, "block", part_of(progress, 0, passes))
            ranks = ranked(shapes, spectra, self.ratio)

        def solve(groups: list[Group]) -> dict[str, nn.Module]:
            replaced: dict[str, nn.Module] = {}
            for group in groups:
                for name, layer in group.chosen(self.skip).items():
                    key = numbers[id(group.block)], name
                    weight = named_finite(name, layer)
                    if key in ranks:
                        first, second = self.factors(weight, group.gram, ranks[key])
                        replaced[name] = LowRankLinear(first, second, layer.bias)
            return replaced

        last = part_of(progress, passes - 1, passes)
        calibrate.run(model, calibration, solve, "sequential", last)
        return cast_parameters(model, model_dtype(model))

    def decompose(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U, singular values and V^T of W S, and S^-1; float64.

        weight: (out, in). gram: H, (in, in).
        """
        if self.whiten:
            undo = inverse_factor(gram, self.damping)  # H^-1 = U^T U, so that S = U^-1
        else:
            undo = torch.eye(len(gram), dtype=torch.float64)
        turned = torch.linalg.solve_triangular(undo, weight.double(), upper=True, left=False)
        left, values, right = torch.linalg.svd(turned, full_matrices=False)
        return left, values, right, undo

    def factors(self, weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank) float32, the best product under H = `gram`."""
        left, values, right, undo = self.decompose(weight, gram)
        root = values[:rank].sqrt()
        first, second = root[:, None] * (right[:rank] @ undo), left[:, :rank] * root
        return first.float().contiguous(), second.float().contiguous()


def uniform_ranks(shapes: dict[Key, tuple[int, ...]], ratio: float) -> dict[Key, int]:
    """The rank of every matrix that keeps at most 1 - ratio of its numbers.

    Raises ValueError where that is none.
    """
    ranks = {}
    for (number, name), (rows, columns) in shapes.items():
        rank = int((1 - ratio) * rows * columns / (rows + columns) + 1e-9)
        if rank < 1:
            raise ValueError(f"ratio {ratio:g} leaves {name} of {rows} x {columns} no rank")
        ranks[number, name] = rank
    return ranks


def ranked(
    shapes: dict[Key, tuple[int, ...]], spectra: dict[Key, Tensor], ratio: float
) -> dict[Key, int]:
    """Ranks under one bar for all: a component stays if its share of its matrix's output, for the
    numbers that it takes, is above the bar. Matrices that a product would not make smaller are left
    out. spectra: squared singular values.
    """
    worth = {
        key: values / values.sum() / sum(shapes[key]) for key, values in spectra.items()
    }  # descending

    def ranks_above(bar: float) -> dict[Key, int]:
        return {key: max(1, int((each > bar).sum())) for key, each in worth.items()}

    def numbers(ranks: dict[Key, int]) -> int:
        return sum(min(r * c, ranks[key] * (r + c)) for key, (r, c) in shapes.items())

    budget = (1 - ratio) * sum(rows * columns for rows, columns in shapes.values())
    bars = torch.cat(list(worth.values())).sort().values.tolist()
    low, high = 0, len(bars) - 1
    while low < high:  # the lowest bar within the budget
        middle = (low + high) // 2
        if numbers(ranks_above(bars[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    found = ranks_above(bars[low])
    if numbers(found) > budget:
        raise ValueError(f"ratio {ratio:g} leaves a matrix no rank")
    smaller = {key: found[key] * (r + c) < r * c for key, (r, c) in shapes.items()}
    return {key: rank for key, rank in found.items() if smaller[key]}


register("low_rank", LowRank())
