"""Ranges and scales chosen by what they do to a layer's output.

A change D of a weight (out, in) whose inputs x have H = E[x x^T] changes the output by
tr(D H D^T), the squared error per token summed over outputs. Rows do not share anything, and
within a row it is a quadratic form: groups of inputs can make up for each other's errors, so
ranges are chosen group after group with the others' errors in view, and scales all at once.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.calibrate import matmul_nt
from compress.quant_math import (
    CACHED_WEIGHTS,
    fit_rows,
    grouped,
    rounded,
    squared,
    stored_scale,
    to_codes,
)

SOLVED_ROWS = 512  # whose scales are solved for at a time: groups ** 2 numbers a row


def output_error(change: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) of `change` (out, in) under H = `gram` (in, in)."""
    return matmul_nt(change.contiguous(), gram).mul_(change).sum(dtype=torch.float64).item()


def fitted(
    weight: Tensor,
    gram: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scale and zero (out, groups) of `weight` (out, in).

    Coordinate descent: from whole ranges, each sweep visits the groups in turn and gives each the
    shrink of its range (SHRINKS) with the least output error, all other groups as they are by
    then. Codes are the nearest on these ranges; last, scales are fitted to the codes. The error
    never grows on the way. 0 sweeps leave ranges whole and scales as they are.
    """
    groups = grouped(weight, group_size)
    size, columns = groups.shape[2], weight.shape[1]
    padding = groups.shape[1] * size - columns
    padded = F.pad(gram, (0, padding, 0, padding))
    ranges = [
        _descend(part, padded, bits, symmetric, dtype, sweeps)
        for part in groups.split(max(1, CACHED_WEIGHTS // size))
    ]
    scale, zero = (torch.cat(parts) for parts in zip(*ranges, strict=True))
    codes = to_codes(groups, scale, zero, bits)
    steps = (codes - zero).flatten(1)[:, :columns]
    codes, scale, zero = codes.flatten(1)[:, :columns], scale[..., 0], zero[..., 0]
    if sweeps:
        scale = refit_scales(weight, gram, steps, scale, size, dtype)
    return codes, scale, zero


def _descend(
    groups: Tensor, gram: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, sweeps: int
) -> tuple[Tensor, Tensor]:
    size = groups.shape[2]
    scale, zero = fit_rows(groups, bits, symmetric, dtype, False, squared)
    residual = rounded(groups, scale, zero, bits).sub_(groups)  # (rows, groups, group_size)
    for _ in range(sweeps):
        for index in range(groups.shape[1]):
            inside = slice(index * size, (index + 1) * size)
            own = gram[inside, inside]
            others = matmul_nt(residual.flatten(1), gram[inside]) - residual[:, index] @ own
            loss = partial(_group_error, own=own, others=others[:, None])
            one = slice(index, index + 1)
            part = groups[:, one]
            scale[:, one], zero[:, one] = fit_rows(part, bits, symmetric, dtype, True, loss)
            residual[:, one] = rounded(part, scale[:, one], zero[:, one], bits).sub_(part)
    return scale, zero


def _group_error(residual: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """What the errors of one group add to a row's output error: (rows, 1, 1).

    residual: (rows, 1, group_size). own: H of the group. others: what all other groups err, times
    H of their inputs with the group's, (rows, 1, group_size).
    """
    return (residual @ own).add_(others, alpha=2).mul_(residual).sum(-1, keepdim=True)


def refit_scales(
    weight: Tensor,
    gram: Tensor,
    steps: Tensor,
    scale: Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Scales, (out, groups), with the least output error for codes that stay as they are.

    weight, steps: (out, in) float32; steps are codes minus their zero, in runs of group_size.
    gram: (in, in). scale: as they are. For a row it is least squares in as many unknowns as it
    has groups. A row keeps its old scales if the new ones, as `dtype` holds them, are not better
    or not all positive.
    """
    found = []
    for start in range(0, len(weight), SOLVED_ROWS):
        rows = slice(start, start + SOLVED_ROWS)
        found.append(_refit(weight[rows], gram, steps[rows], scale[rows], group_size, dtype))
    return torch.cat(found)


def _refit(
    weight: Tensor, gram: Tensor, steps: Tensor, scale: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    def by_group(product: Tensor) -> Tensor:
        return grouped(product, size).sum(-1)

    # steps of one group at a time times H, times the steps of all: what pairs of groups share
    pairs = [
        by_group(matmul_nt(part.contiguous(), rows.T.contiguous()).mul_(steps))
        for part, rows in zip(steps.split(size, 1), gram.split(size), strict=True)
    ]
    normal = torch.stack(pairs, 1).double()  # (rows, groups, groups)
    wanted = by_group(matmul_nt(weight, gram).mul_(steps)).double()
    empty = normal.diagonal(dim1=1, dim2=2) == 0  # no step or no input: any scale will do
    normal.diagonal(dim1=1, dim2=2)[empty] = 1
    wanted[empty] = scale.double()[empty]
    solved, failed = torch.linalg.solve_ex(normal, wanted)
    found = stored_scale(solved.float(), dtype)

    def error(scales: Tensor) -> Tensor:
        change = steps * scales.repeat_interleave(size, 1)[:, : steps.shape[1]] - weight
        return matmul_nt(change, gram).mul_(change).sum(1)

    better = (failed == 0) & (solved > 0).all(1) & (error(found) < error(scale))
    return torch.where(better[:, None], found, scale)
