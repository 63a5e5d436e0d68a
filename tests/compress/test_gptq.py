"""gptq: a slow transcription of the equations, identity Hessian, better than rounding, damping."""

import pytest
import torch
from comparing import layer_and_gram

from compress.methods.gptq import Gptq
from compress.methods.rtn import Rtn
from compress.output_error import inverse_factor
from compress.quant_linear import QuantLinear
from compress.quant_math import fit_range, grouped, to_codes


def output_error(change, gram):
    return ((change @ gram) * change).sum().item()


def rebuilt(method, weight, gram):
    codes, scale, zero, order = method.solve(weight, gram)
    layer = QuantLinear.from_codes(
        codes, scale, zero, None, method.bits, method.group_size, order, torch.float32
    )
    return layer.weight()


def by_the_equations(method, weight, gram, order):
    """Column by column in float64; H^-1 shrinks by Gaussian elimination (the paper's eq. 2, 3).

    1 / (H^-1)[j, j] at column j's turn is what a unit error in it costs; ranges count errors so.

    No Cholesky factor, no blocks, no lazy updates: another way to the same codes. Static groups
    are runs of inputs, with the ranges of the original weight; the others are runs of `order`,
    with the ranges of what the weight is when the first column of the group has its turn.
    Returns codes (out, in), by input, and scale (out, groups).
    """
    columns = weight.shape[1]
    size = columns if method.group_size == -1 else method.group_size
    original, weight = weight, weight.double()
    damping = method.damping * gram.diagonal().double().mean()
    inverse = torch.linalg.inv(gram.double() + damping * torch.eye(columns, dtype=torch.float64))
    cost, full = torch.empty(columns), inverse.clone()
    for j in order:
        cost[j] = 1 / full[j, j]
        full -= torch.outer(full[:, j], full[j]) / full[j, j]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    ranges, left = {}, list(order)
    for turn, j in enumerate(order):
        group = (j if method.static_groups else turn) // size
        if group not in ranges:
            members = list(range(columns) if method.static_groups else order)
            members = members[group * size : (group + 1) * size]
            source = original if method.static_groups else weight.float()
            ranges[group] = fit_range(
                source[:, members][:, None],
                method.bits,
                method.symmetric,
                torch.float32,
                method.clip,
                lambda left, members=members: (left**2 * cost[members]).sum(-1, keepdim=True),
            )
        s, z = (part[:, 0, 0].double() for part in ranges[group])
        code = (torch.round(weight[:, j] / s) + z).clamp(0, 2**method.bits - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (weight[:, j] - s * (code - z)) / inverse[j, j]
        weight[:, left] -= error[:, None] * inverse[j, left]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
    return codes, torch.stack([ranges[group][0][:, 0, 0] for group in sorted(ranges)], dim=1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "bits, size, columns, clip",  # 330 columns make several lazy blocks, of 96, 200 or 128
    [
        (4, 32, 96, False),
        (3, 64, 96, False),
        (2, 96, 96, False),
        (4, 48, 330, False),
        (3, 200, 330, False),
        (2, -1, 330, False),
        (4, 32, 96, True),
        (3, 48, 330, True),
    ],
)
def test_codes_are_those_of_the_equations(
    bits, size, columns, clip, act_order, static_groups, symmetric
):
    weight, gram = layer_and_gram(rows=64, columns=columns)
    method = Gptq(
        bits,
        size,
        symmetric,
        clip=clip,
        refit=False,
        act_order=act_order,
        static_groups=static_groups,
        dtype="float32",
    )
    order = list(range(columns))
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    expected, expected_scale = by_the_equations(method, weight, gram, order)
    codes, scale, _, stored = method.solve(weight, gram)
    if stored is not None:  # column p of the codes belongs to input stored[p]
        expected = expected[:, stored]
    # float32 against float64: a weight half-way between two codes may fall either way, and then
    # moves all that follow in its row. (Symmetric grids put the largest weight of a group there.)
    same = (codes == expected).all(1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(scale[same], expected_scale[same], rtol=1e-3, atol=0)


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_hessian_is_round_to_nearest(bits, act_order, static_groups):
    weight, _ = layer_and_gram(columns=160)
    method = Gptq(
        bits, 64, clip=False, refit=False, act_order=act_order, static_groups=static_groups
    )
    codes, scale, zero, _ = method.solve(weight, torch.eye(160))
    groups = grouped(weight, 64)
    rtn_scale, rtn_zero = fit_range(groups, bits, False, torch.bfloat16)
    assert torch.equal(
        codes, to_codes(groups, rtn_scale, rtn_zero, bits).flatten(1)[:, :160].byte()
    )
    assert torch.equal(scale, rtn_scale[..., 0]) and torch.equal(zero, rtn_zero[..., 0])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_output_error_is_well_below_rounding(bits, act_order, static_groups, symmetric, clip):
    weight, gram = layer_and_gram()
    method = Gptq(
        bits,
        32,
        symmetric,
        clip=clip,
        act_order=act_order,
        static_groups=static_groups,
        dtype="float32",
    )
    rtn = Rtn(bits, 32, symmetric, clip=clip, dtype="float32").quantize(weight, None).weight()
    ours = output_error(rebuilt(method, weight, gram) - weight, gram)
    # With large inputs first, most columns are still there to absorb what matters most.
    assert ours < (0.75 if act_order else 0.9) * output_error(rtn - weight, gram)


def test_at_two_bits_it_takes_large_inputs_first_to_beat_rounding():
    """In stored order the errors of 2-bit columns push later weights out of their ranges."""
    weight, gram = layer_and_gram()

    def error(method):
        return output_error(rebuilt(method, weight, gram) - weight, gram)

    rtn = Rtn(2, 32, dtype="float32").quantize(weight, None).weight()
    plain = output_error(rtn - weight, gram)
    settings = dict(bits=2, group_size=32, clip=False, refit=False, dtype="float32")
    assert error(Gptq(act_order=True, **settings)) < 0.75 * plain
    assert error(Gptq(act_order=False, static_groups=False, **settings)) > plain


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [96, 90])
def test_refit_keeps_the_codes_and_lowers_the_output_error(columns, act_order, static_groups):
    weight, gram = layer_and_gram(columns=columns)
    settings = dict(bits=3, group_size=32, act_order=act_order, static_groups=static_groups)
    methods = [Gptq(**settings, refit=refit, dtype="float32") for refit in (False, True)]
    plain, refitted = (method.solve(weight, gram) for method in methods)
    assert torch.equal(plain[0], refitted[0]) and torch.equal(plain[2], refitted[2])
    errors = [output_error(rebuilt(method, weight, gram) - weight, gram) for method in methods]
    assert errors[1] < 0.97 * errors[0]


def test_order_is_stored_only_when_groups_follow_it():
    weight, gram = layer_and_gram()
    assert Gptq(static_groups=True).solve(weight, gram)[3] is None
    assert Gptq(act_order=False, static_groups=False).solve(weight, gram)[3] is None
    order = Gptq(static_groups=False).solve(weight, gram)[3]
    assert order.tolist() == torch.argsort(gram.diagonal(), descending=True).tolist()


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_weights_of_an_input_that_is_always_zero_do_not_matter(act_order, static_groups):
    weight, gram = layer_and_gram()
    gram[5] = gram[:, 5] = 0
    method = Gptq(act_order=act_order, static_groups=static_groups, dtype="float32")
    plain = rebuilt(method, weight, gram)
    assert plain.isfinite().all()
    assert (plain[:, 5] == 0).all()
    keep = [column for column in range(96) if column != 5]
    zeroed = output_error(weight[:, keep], gram[keep][:, keep])
    assert output_error((plain - weight)[:, keep], gram[keep][:, keep]) < 0.05 * zeroed
    weight[:, 5] = 1e3  # would take all the codes of its groups
    assert torch.equal(rebuilt(method, weight, gram), plain)


def test_damping_grows_until_the_factorization_succeeds():
    gram = torch.ones(32, 32)  # rank 1, and 1e-9 is lost in rounding
    gram[0, 1] = gram[1, 0] = 1.001  # not even semi-definite
    factor = inverse_factor(gram, 1e-9)
    least = torch.linalg.inv(factor.T @ factor)  # H + damping * mean(diag) * 1
    added = (least - gram.double()).diagonal()
    assert 1e-3 <= added.mean() <= 0.1 and added.std() < 1e-6
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-torch.eye(4), 0.01)
