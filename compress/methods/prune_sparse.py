"""Unstructured and N:M pruning: single weights go, matrices keep their shape.

`magnitude` removes the smallest of each matrix. `wanda` weighs each by the size of its input,
|W_ij| * sqrt(E[x_j^2]), and compares within a row. `sparsegpt` goes through the columns like GPTQ:
in every 128 it removes what costs least, W_ij^2 / U_jj^2 with U the upper Cholesky factor of
(E[x x^T])^-1, and lets the columns to come make up for it.

At half the weights a file holds 9 of 16 bits a weight, mask and values. No kernel
here multiplies faster for the zeros, so that speed is a dense model's; four bits are smaller,
faster and closer to the parent. It is here as the reference that the pruning papers are read by,
and for runtimes that use 2:4. Records, half of smollm2-135m: sparsegpt 4a16cfa5bb09, wanda
14956f05a1ca, magnitude b2dc5a58bc00; 2:4, where only the first leaves a model, 70821511c325,
4729e730273a, c107bcf2634e.

Source: E. Frantar and D. Alistarh, "SparseGPT", 2023, Algorithm 1,
https://arxiv.org/abs/2301.00774; M. Sun et al., "A Simple and Effective Pruning Approach for Large
Language Models" (wanda), 2023, https://arxiv.org/abs/2306.11695
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layer_inputs import Group
from compress.layers import SKIP, named_finite, refuse_no_effect
from compress.output_error import check_damping, inverse_factor
from compress.registry import register
from compress.sparse_linear import SparseLinear
from compress.vocabulary import finish

IMPORTANCE = ("magnitude", "wanda", "sparsegpt")
BLOCK = 128  # columns that are compared with each other, as in SparseGPT's code


@dataclass(frozen=True)
class PruneSparse(Compressor):
    """ratio: the share of every matrix that goes. importance: see above.

    pattern: "2:4" leaves 2 of every 4 weights of a row that follow each other, "4:8" 4 of 8; their
    share is the ratio. "" leaves them anywhere. damping: share of the mean of the diagonal of
    E[x x^T] added to it. skip: layers whose dotted name in the block ends in one of these stay
    whole. dtype: of the weights, of everything left alone and of the arithmetic.
    """

    needs_calibration: ClassVar[bool] = True
    leaves: ClassVar[str] = "sparse"

    ratio: float = 0.5
    pattern: str = ""
    importance: str = "sparsegpt"
    damping: float = 0.01
    skip: tuple[str, ...] = SKIP
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_dtype(self.dtype)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be above 0 and below 1, not {self.ratio}")
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be one of {IMPORTANCE}, not {self.importance!r}")
        check_damping(self.damping)
        if self.pattern:
            kept, of = self.kept_of()
            if not 0 < kept < of or BLOCK % of:
                raise ValueError(f"pattern must be like 2:4 or 4:8, not {self.pattern!r}")
            if self.ratio != 1 - kept / of:
                raise ValueError(f"pattern {self.pattern} is a ratio of {1 - kept / of:g}")

    def kept_of(self) -> tuple[int, int]:
        """(2, 4) of "2:4", (0, 0) without a pattern. Raises ValueError if it is none."""
        if not self.pattern:
            return 0, 0
        if not (match := re.fullmatch(r"(\d{1,2}):(\d{1,2})", self.pattern)):
            raise ValueError(f"pattern must be like 2:4 or 4:8, not {self.pattern!r}")
        return int(match[1]), int(match[2])

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Prune `model` in place, block by block, and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no sense,
        if a weight is not finite, or a pattern does not divide a layer's inputs.
        """
        refuse_no_effect(model, self.skip)
        calibrate.run(model, calibration, self.solve_groups, "sequential", progress)
        return finish(model, DTYPES[self.dtype])

    def solve_groups(self, groups: list[Group]) -> dict[str, nn.Module]:
        """The sparse layers that replace those of `groups`."""
        replaced: dict[str, nn.Module] = {}
        for group in groups:
            for name, layer in group.chosen(self.skip).items():
                weight = named_finite(name, layer)
                if self.pattern and weight.shape[1] % self.kept_of()[1]:
                    raise ValueError(f"{name}: {self.pattern} does not divide its inputs")
                weight, stays = self.solve(weight, group.gram)
                replaced[name] = SparseLinear.from_weight(
                    weight, stays, layer.bias, DTYPES[self.dtype]
                )
        return replaced

    def solve(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The new weight and where it stays, bool; both (out, in) like `weight`. gram: (in, in)."""
        if self.importance == "sparsegpt":
            return self.sparsegpt(weight, gram)
        score = weight.abs()
        if self.importance == "wanda":
            score = score * gram.diagonal().sqrt()
        if self.pattern:
            return weight, self.by_pattern(score)
        if self.importance == "wanda":
            return weight, largest(score, round((1 - self.ratio) * score.shape[1]))
        kept = round((1 - self.ratio) * score.numel())
        return weight, largest(score.view(1, -1), kept).view_as(score)

    def by_pattern(self, score: Tensor) -> Tensor:
        """Where the largest of every run of `score` (out, in) are."""
        kept, of = self.kept_of()
        return largest(score.unflatten(1, (-1, of)), kept).flatten(1)

    def sparsegpt(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """See `solve`."""
        factor = inverse_factor(gram, self.damping).float()
        pivots = factor.diagonal()
        todo = weight.masked_fill(gram.diagonal() == 0, 0).T.contiguous()  # (in, out)
        columns, rows = todo.shape
        stays = torch.ones_like(todo, dtype=torch.bool)
        _, of = self.kept_of()
        done = 0  # weights kept so far: the ratio is met over the whole matrix
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            part, own = todo[start:stop], pivots[start:stop, None]
            if not of:
                kept = round((1 - self.ratio) * stop * rows) - done
                done += kept
                chosen = largest((part / own).square().view(1, -1), kept)
                stays[start:stop] = chosen.view(stop - start, rows)
            errors = torch.empty_like(part)
            for j in range(start, stop):
                if of and j % of == 0:
                    run = slice(j, j + of)
                    score = (todo[run] / pivots[run, None]).square()
                    stays[run] = self.by_pattern(score.T).T
                error = torch.div(todo[j], pivots[j], out=errors[j - start])
                error.masked_fill_(stays[j], 0)
                todo[j].masked_fill_(~stays[j], 0)
                todo[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            if stop < columns:
                todo[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return todo.T.contiguous(), stays.T.contiguous()


def largest(score: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last dimension of `score` are: bool of its shape."""
    where = score.topk(count, -1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, where, True)


register("prune_sparse", PruneSparse())
