"""output_error: least squares in closed form, sweeps never lose, groups see each other's errors."""

import pytest
import torch

from compress import output_error as module
from compress.methods.rtn import Rtn
from compress.output_error import fit_codes, output_error, refit_scales
from compress.quant_math import SHRINKS, fit_range, fit_rows, grouped, rounded, scale_and_zero


def weight_and_gram(rows=24, columns=90, seed=0):
    """A weight and the Gram matrix of correlated inputs; 90 inputs leave a short last group."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def rebuilt(codes, scale, zero, size):
    steps = codes - zero.repeat_interleave(size, 1)[:, : codes.shape[1]]
    return steps * scale.repeat_interleave(size, 1)[:, : codes.shape[1]]


def error_after(weight, gram, bits, symmetric, sweeps):
    codes, scale, zero = fit_codes(weight, gram, 32, bits, symmetric, torch.float32, sweeps)
    assert codes.min() >= 0 and codes.max() < 2**bits and codes.equal(codes.round())
    return output_error(rebuilt(codes, scale, zero, 32) - weight, gram)


def test_output_error_is_what_the_outputs_differ_by():
    """tr(D H D^T) is the mean over tokens of |D x|^2."""
    generator = torch.Generator().manual_seed(0)
    x, change = (torch.randn(rows, 20, generator=generator) for rows in (300, 7))
    expected = (x @ change.T).square().sum(1).mean().item()
    assert output_error(change, x.T @ x / 300) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_sweeps_never_lose(bits, symmetric):
    weight, gram = weight_and_gram()
    errors = [error_after(weight, gram, bits, symmetric, sweeps) for sweeps in (0, 1, 2, 4)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] <= errors[1] * 1.01 and errors[3] <= errors[2] * 1.01  # the refit may differ
    rtn = Rtn(bits, 32, symmetric, dtype="float32").quantize(weight, None).weight()
    assert errors[0] == pytest.approx(output_error(rtn - weight, gram), rel=1e-5)


def test_one_sweep_is_the_best_of_all_shrinks_in_turn():
    """Two groups: the second takes the best shrink for what the first has become."""
    weight, gram = weight_and_gram(rows=6, columns=64)
    codes, _, zero = fit_codes(weight, gram, 32, 3, False, torch.float32, sweeps=1)
    groups = grouped(weight, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for row in range(6):

        def change(shrinks, row=row):
            pair = torch.tensor(shrinks)[:, None]
            s, z = scale_and_zero(low[row] * pair, high[row] * pair, 3, False, torch.float32)
            return (rounded(groups[row], s, z, 3) - groups[row]).view(1, -1), s, z

        first = min(SHRINKS, key=lambda a: output_error(change((a, 1.0))[0], gram))
        second = min(SHRINKS, key=lambda b: output_error(change((first, b))[0], gram))
        _, s, z = change((first, second))
        expected = (groups[row] / s).round().add(z).clamp(0, 7).view(-1)
        assert torch.equal(codes[row], expected) and torch.equal(zero[row], z[:, 0])


def test_groups_that_see_each_other_beat_groups_fitted_alone():
    weight, gram = weight_and_gram(rows=64, columns=96)
    groups = grouped(weight, 32)
    own = torch.stack([gram[i : i + 32, i : i + 32] for i in (0, 32, 64)])

    def loss(residual):
        turned = residual.transpose(0, 1)
        return ((turned @ own) * turned).sum(-1, keepdim=True).transpose(0, 1)

    scale, zero = fit_range(groups, 3, False, torch.float32, clip=True, loss=loss)
    alone = output_error((rounded(groups, scale, zero, 3) - groups).flatten(1), gram)
    assert error_after(weight, gram, 3, False, 3) < 0.9 * alone


def test_refitted_scales_solve_the_normal_equations():
    weight, gram = weight_and_gram()
    codes, scale, zero = fit_codes(weight, gram, 32, 3, False, torch.float32, 0)
    steps = codes - zero.repeat_interleave(32, 1)[:, :90]
    found = refit_scales(weight, gram, steps, scale, 32, torch.float32)
    for row in range(len(weight)):
        spread = torch.block_diag(*(part[None] for part in steps[row].double().split(32)))
        left, right = (
            spread @ gram.double() @ spread.T,
            spread @ gram.double() @ weight[row].double(),
        )
        expected = torch.linalg.solve(left, right)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=0)
    before = output_error(rebuilt(codes, scale, zero, 32) - weight, gram)
    assert output_error(rebuilt(codes, found, zero, 32) - weight, gram) < 0.99 * before


def test_scales_stay_where_least_squares_has_no_use():
    weight, gram = weight_and_gram(rows=3, columns=64)
    weight[0] = 0  # every step is 0
    weight[1, 32:] = 0  # those of one group are
    codes, scale, zero = fit_codes(weight, gram, 32, 4, True, torch.float32, 0)
    steps = codes - zero.repeat_interleave(32, 1)
    found = refit_scales(weight, gram, steps, scale, 32, torch.float32)
    assert torch.equal(found[0], scale[0]) and found[1, 1] == scale[1, 1]
    assert found[1, 0] != scale[1, 0] and found.isfinite().all() and (found > 0).all()
    # the wrong sign: least squares would ask for negative scales
    assert torch.equal(refit_scales(weight, gram, -steps, scale, 32, torch.float32)[2], scale[2])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_refitted_scales_are_as_stored_and_no_row_is_worse_for_it(bits):
    weight, gram = weight_and_gram(rows=200)
    codes, scale, zero = fit_codes(weight, gram, 32, bits, False, torch.bfloat16, 0)
    steps = codes - zero.repeat_interleave(32, 1)[:, :90]
    found = refit_scales(weight, gram, steps, scale, 32, torch.bfloat16)
    assert torch.equal(found, found.bfloat16().float())
    assert not torch.equal(found, scale)

    def errors(scales):
        change = rebuilt(codes, scales, zero, 32) - weight
        return ((change @ gram) * change).sum(1)

    assert (errors(found) <= errors(scale) * (1 + 1e-5)).all()


def test_scales_rounded_in_turn_lose_less_than_one_by_one():
    """bfloat16 holds 8 bits of a scale; where one direction is massive, that much moves it."""
    weight, gram = weight_and_gram(rows=200)
    gram += 1000 * gram.diagonal().mean() * torch.ones_like(gram)
    codes, scale, zero = fit_codes(weight, gram, 32, 4, False, torch.bfloat16, 0)
    steps = codes - zero.repeat_interleave(32, 1)[:, :90]

    def error(scales):
        return output_error(rebuilt(codes, scales, zero, 32) - weight, gram)

    exact = refit_scales(weight, gram, steps, scale, 32, torch.float32)
    in_turn = error(refit_scales(weight, gram, steps, scale, 32, torch.bfloat16))
    one_by_one = error(exact.bfloat16().float())
    assert error(exact) < in_turn < one_by_one < error(scale)
    assert in_turn - error(exact) < 0.4 * (one_by_one - error(exact))


def test_a_sweep_that_changes_nothing_is_the_last(monkeypatch):
    """One group a row has no other group to see: the first sweep finds its best range."""
    weight, gram = weight_and_gram()
    calls = []

    def counted(*arguments, **settings):
        calls.append(1)
        return fit_rows(*arguments, **settings)

    monkeypatch.setattr(module, "fit_rows", counted)
    many = fit_codes(weight, gram, -1, 4, False, torch.float32, 50)
    assert len(calls) <= 3  # whole ranges, the sweep, and one that finds nothing
    for ours, theirs in zip(
        many, fit_codes(weight, gram, -1, 4, False, torch.float32, 1), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [32, -1])
def test_rows_do_not_depend_on_how_many_are_worked_on_at_a_time(size, monkeypatch):
    weight, gram = weight_and_gram()
    whole = fit_codes(weight, gram, size, 3, False, torch.float32, 2)
    monkeypatch.setattr(module, "SOLVED", 5 * 90)  # 5 rows of 24 where scales are solved for
    monkeypatch.setattr(module, "FITTED_ROWS", 7)  # and 7 in a sweep
    monkeypatch.setattr(module, "CACHED_WEIGHTS", 1)
    for ours, theirs in zip(
        fit_codes(weight, gram, size, 3, False, torch.float32, 2), whole, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert whole[1].shape == (24, 3 if size == 32 else 1)
