"""GPTQ: quantize one column at a time, and let the columns still to come absorb the error.

For a layer W with inputs x, the squared output error of a change D is tr(D H D^T) with
H = E[x x^T]. Columns are rounded one after another; the error of column j, divided by U[j, j],
times row j of U, is taken off the columns not yet rounded, where U is the upper Cholesky factor
of H^-1. Columns with large H[j, j] go first (act_order), when most columns can still absorb.
Layers that read the same input share H and are solved as one tall matrix.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022, Algorithm 1, https://arxiv.org/abs/2210.17323
Differs from it in three points: ranges may be shrunk to the least error (clip), scales are fitted
once more to the codes found (refit), and with static_groups the groups are those of the stored
column order, so no index is stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layer_inputs import Group
from compress.layers import SKIP, named_finite, refuse_no_effect
from compress.output_error import check_damping, inverse_factor, refit_scales
from compress.quant_linear import QuantLinear
from compress.quant_math import check_grid, fit_range, grouped
from compress.registry import register
from compress.vocabulary import check_head_bits, finish

BLOCK = 128  # columns solved before the rest of the matrix is updated in one product


@dataclass(frozen=True)
class Gptq(Compressor):
    """Quantize every linear layer of the decoder blocks.

    bits: 2, 3, 4 or 8. group_size: inputs of a row that share a scale; -1 for the whole row.
    symmetric: no zero is stored. clip: shrink each range to the least squared error, with
    column j weighted by 1 / U[j, j] ** 2, what its error costs once later columns have absorbed
    what they can. refit: scales fitted to the codes found by their output error, row by row where
    that helps.
    act_order: columns in order of decreasing H[j, j]. static_groups: ranges are fixed before the
    first column is rounded; with act_order off it only matters that they are older. damping:
    share of the mean of H's diagonal added to it; multiplied by 10 as often as the Cholesky
    factorization needs. true_sequential: each group of layers sees inputs computed by the layers
    already quantized, also within a block. skip: layers whose dotted name in the block ends in
    one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic.
    """

    needs_calibration: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = True
    refit: bool = True
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    true_sequential: bool = True
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_grid(self.bits, self.group_size)
        check_dtype(self.dtype)
        check_head_bits(self.head_bits)
        check_damping(self.damping)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Quantize `model` in place, block by block, and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no
        sense, if a weight is not finite, or if no damping makes H positive definite.
        """
        refuse_no_effect(model, self.skip)
        calibrate.run(model, calibration, self.solve_groups, self.mode(), progress)
        return finish(model, DTYPES[self.dtype], self.head_bits, self.group_size)

    def solve_groups(self, groups: list[Group]) -> dict[str, nn.Module]:
        """The quantized layers that replace those of `groups`."""
        replaced: dict[str, nn.Module] = {}
        for group in groups:
            chosen = group.chosen(self.skip)
            weights = [named_finite(name, layer) for name, layer in chosen.items()]
            if not weights:
                continue
            weight = torch.cat(weights)
            drift = self.drift(weight, group)
            codes, scale, zero, order = self.solve(weight, group.gram, drift)
            heights = [len(weight) for weight in weights]
            parts = zip(*(tensor.split(heights) for tensor in (codes, scale, zero)), strict=True)
            for (name, layer), part in zip(chosen.items(), parts, strict=True):
                replaced[name] = QuantLinear.from_codes(
                    part[0],
                    part[1],
                    None if self.symmetric else part[2],
                    layer.bias,
                    self.bits,
                    self.group_size,
                    order,
                    DTYPES[self.dtype],
                )
        return replaced

    def mode(self) -> str:
        """What calibration shows to a layer, see calibrate.run."""
        return "sequential" if self.true_sequential else "block"

    def drift(self, weight: Tensor, group: Group) -> Tensor | None:
        """What outputs by `weight` should make up for, see Group.drift: nothing."""
        return None

    def solve(
        self, weight: Tensor, gram: Tensor, drift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Quantize `weight` (out, in) float32 under H = `gram` (in, in).

        drift: mean of d x^T, (out, in); what is quantized is then the weight that puts out d more,
        weight + drift (H + damping)^-1, by least squares.
        Returns codes (out, in) uint8, scale and zero (out, groups) float32, and the order of the
        columns, (in,), if groups follow it (act_order without static_groups), else None.
        """
        columns = weight.shape[1]
        size = columns if self.group_size == -1 else min(self.group_size, columns)
        importance = gram.diagonal()
        weight = weight.masked_fill(importance == 0, 0)  # an input that is always 0 needs none
        order = torch.arange(columns, device=gram.device)
        if self.act_order:
            order = torch.argsort(importance, descending=True, stable=True)
        ordered = gram[order][:, order] if self.act_order else gram
        factor = inverse_factor(ordered, self.damping).float()
        cost = factor.diagonal() ** -2
        back = torch.argsort(order)
        if drift is not None:
            weight = weight + (drift[:, order] @ factor.T @ factor)[:, back]

        # Rows of these transposed matrices are columns of W: contiguous, and the loop is theirs.
        todo = weight[:, order].T.contiguous()  # (in, out)
        if self.static_groups:
            scale, zero = self._ranges(weight, cost[back])
            group_of = order.cpu()
        else:
            scale = zero = weight.new_empty(len(weight), 0)
            group_of = torch.arange(columns)
        scales, zeros = list(scale.T.contiguous()), list(zero.T.contiguous())
        group_index = (group_of // size).tolist()

        codes = torch.empty_like(todo, dtype=torch.uint8)
        block = size * max(1, BLOCK // size) if size < columns else BLOCK
        top, pivots = 2**self.bits - 1, factor.diagonal().tolist()
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = torch.empty_like(todo[start:stop])
            for j in range(start, stop):
                if group_index[j] == len(scales):  # not static: the range of what is left by now
                    new = slice(j, j + size)
                    fresh = self._ranges(todo[new].T.contiguous(), cost[new])
                    scales.append(fresh[0][:, 0])
                    zeros.append(fresh[1][:, 0])
                column, s, z = todo[j], scales[group_index[j]], zeros[group_index[j]]
                code = torch.div(column, s).round_().add_(z).clamp_(0, top)
                codes[j] = code
                error = torch.sub(column, code.sub_(z).mul_(s), out=errors[j - start])
                error.div_(pivots[j])
                todo[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            if stop < columns:
                todo[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)

        codes = codes.T
        scale, zero = torch.stack(scales, dim=1), torch.stack(zeros, dim=1)
        if self.static_groups:
            codes = codes[:, back]
        elif self.act_order:  # groups follow the order, and so do the codes
            weight, gram = weight[:, order], ordered
        if self.refit:
            steps = codes - zero.repeat_interleave(size, 1)[:, :columns]
            scale = refit_scales(weight, gram, steps, scale, size, DTYPES[self.dtype])
        follows = self.act_order and not self.static_groups
        return codes, scale, zero, order if follows else None

    def _ranges(self, weight: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero (out, groups) of `weight` (out, in), errors counted by cost (in,)."""
        groups = grouped(weight, self.group_size)
        share = grouped(cost[None], self.group_size)  # (1, groups, group_size)

        def loss(residual: Tensor) -> Tensor:
            return residual.square_().mul_(share).sum(-1, keepdim=True)

        dtype = DTYPES[self.dtype]
        scale, zero = fit_range(groups, self.bits, self.symmetric, dtype, self.clip, loss)
        return scale[..., 0], zero[..., 0]


register("gptq", Gptq())
