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

from compress.kernels import matmul_nt
from compress.quant_math import (
    CACHED_WEIGHTS,
    fit_rows,
    grouped,
    rounded,
    squared,
    stored_scale,
    to_codes,
)

FITTED_ROWS = 256  # at least, at a time in a sweep: fewer would read H more often than needed
SOLVED = 2**23  # entries of a matrix, at most, where scales are solved for: 64 megabytes in float64
RIDGE = 1e-4  # of the diagonal: keeps scales that hardly matter where they are


def output_error(change: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) of `change` (out, in) under H = `gram` (in, in)."""
    return matmul_nt(change.contiguous(), gram).mul_(change).sum(dtype=torch.float64).item()


def fit_codes(
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
        for part in groups.split(max(FITTED_ROWS, CACHED_WEIGHTS // size))
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
        before = scale.clone()
        for index in range(groups.shape[1]):
            inside = slice(index * size, (index + 1) * size)
            own = gram[inside, inside]
            others = matmul_nt(residual.flatten(1), gram[inside]) - residual[:, index] @ own
            loss = partial(_group_error, own=own, others=others[:, None])
            one = slice(index, index + 1)
            part = groups[:, one]
            scale[:, one], zero[:, one] = fit_rows(part, bits, symmetric, dtype, True, loss)
            residual[:, one] = rounded(part, scale[:, one], zero[:, one], bits).sub_(part)
        if scale.equal(before):
            break
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
    """Scales, (out, groups), with less output error for codes that stay as they are.

    weight, steps: (out, in) float32; steps are codes minus their zero, in runs of group_size.
    gram: (in, in). scale: as they are, as `dtype` holds them. For a row it is least squares in as
    many unknowns as it has groups, with a little RIDGE towards the old scales. `dtype` cannot hold
    the solution: scales are rounded one after another, and those still to come make up for it, as
    GPTQ's columns do. A row whose scales did not get better that way keeps its old ones.
    """
    rows = max(1, SOLVED // max(scale.shape[1] ** 2, weight.shape[1]))
    parts = zip(weight.split(rows), steps.split(rows), scale.split(rows), strict=True)
    return torch.cat([_refit(*part, gram, group_size, dtype) for part in parts])


def _refit(
    weight: Tensor, steps: Tensor, scale: Tensor, gram: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    def by_group(product: Tensor) -> Tensor:
        return grouped(product, size).sum(-1)

    # a row's error as its scales change by d: d^T normal d - 2 d^T wanted, and a constant
    count = scale.shape[1]
    normal = torch.empty(len(scale), count, count, dtype=torch.float64, device=scale.device)
    for index, (part, inputs) in enumerate(
        zip(steps.split(size, 1), gram.split(size), strict=True)
    ):
        normal[:, index] = by_group(matmul_nt(part.contiguous(), inputs.T.contiguous()) * steps)
    left = weight - steps * scale.repeat_interleave(size, 1)[:, : steps.shape[1]]
    wanted = by_group(matmul_nt(left, gram).mul_(steps)).double()

    diagonal = normal.diagonal(dim1=1, dim2=2).clone()
    ridged = normal + torch.diag_embed(RIDGE * diagonal + (diagonal == 0))  # no step or no input
    factor, failed = upper_factor(ridged)
    free = scale.double() + (factor.mT @ (factor @ wanted[..., None]))[..., 0]
    found = torch.empty_like(scale)
    for index in range(count):
        asked = free[:, index]
        found[:, index] = stored_scale(asked.where(asked > 0, scale[:, index]).float(), dtype)
        error = (asked - found[:, index]) / factor[:, index, index]
        free[:, index + 1 :] -= error[:, None] * factor[:, index, index + 1 :]

    change = (found - scale).double()
    gain = (2 * wanted - (normal @ change[..., None])[..., 0]).mul_(change).sum(1)
    return torch.where(((failed == 0) & (gain > 0))[:, None], found, scale)


def upper_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U, upper triangular with U^T U = `matrix` ** -1, and 0 where the factorization succeeded.

    matrix: (..., n, n), symmetric. U says how errors are made up for, one unknown after another.
    """
    # With rows and columns reversed, matrix = L L^T; reversed back, L is upper triangular, and
    # its inverse is U: one factorization instead of two and an inverse.
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(-2, -1))
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return factor.flip(-2, -1), failed


def check_damping(damping: float) -> None:
    """Raises ValueError unless `damping` is a share of a diagonal that can be added to it."""
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be above 0 and at most 1, not {damping}")


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular float64, with U^T U = (H + damping)^-1.

    gram: H, (in, in), positive semi-definite. An input that is always 0 gets a diagonal of 1.
    Damping grows tenfold until the factorization succeeds; ValueError if it never does.
    """
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal().clone()
    mean = diagonal.mean().item() or 1.0  # all zero: no input, any factor will do
    while damping <= 10:
        damped.diagonal().copy_(diagonal + damping * mean)
        damped.diagonal()[diagonal == 0] = 1
        factor, failed = upper_factor(damped)
        if not failed and factor.isfinite().all():
            return factor
        damping *= 10
    raise ValueError("H is not positive definite, however much it is damped")
