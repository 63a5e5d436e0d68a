"""gptq: a slow transcription of the equations, identity Hessian, better than rounding, refusals."""

import pytest
import torch

from compress.methods.gptq import Gptq, inverse_factor
from compress.methods.rtn import Rtn
from compress.quant_linear import QuantLinear
from compress.quant_math import fit_range, grouped, to_codes


def layer_and_gram(rows=24, columns=96, seed=0):
    """A weight and the Gram matrix of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(1000, columns, generator=generator) @ mixing * size
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def output_error(change, gram):
    return ((change @ gram) * change).sum().item()


def rebuilt(method, weight, gram):
    codes, scale, zero, order = method.solve(weight, gram)
    layer = QuantLinear.from_codes(
        codes, scale, zero, None, method.bits, method.group_size, order, torch.float32
    )
    return layer.weight()


def by_the_equations(weight, gram, bits, size, damping, order):
    """Column by column in float64; H^-1 shrinks by Gaussian elimination (the paper's eq. 2, 3).

    No Cholesky factor, no blocks, no lazy updates: another way to the same codes. Ranges are
    those of the original groups. Returns codes (out, in).
    """
    weight, columns = weight.double().clone(), weight.shape[1]
    scale, zero = fit_range(grouped(weight.float(), size), bits, False, torch.float32)
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(damped)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    left = list(order)
    for j in order:
        s, z = scale[:, j // size, 0].double(), zero[:, j // size, 0].double()
        code = (torch.round(weight[:, j] / s) + z).clamp(0, 2**bits - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (weight[:, j] - s * (code - z)) / inverse[j, j]
        weight[:, left] -= error[:, None] * inverse[j, left]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "bits, size, columns", [(4, 32, 96), (3, 64, 96), (2, 96, 96), (4, 16, 300)]
)
def test_codes_are_those_of_the_equations(bits, size, columns, act_order):
    weight, gram = layer_and_gram(columns=columns)
    method = Gptq(bits=bits, group_size=size, clip=False, act_order=act_order, dtype="float32")
    order = range(columns)
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    expected = by_the_equations(weight, gram, bits, size, method.damping, order)
    codes = method.solve(weight, gram)[0]
    # float32 against float64: a weight half-way between two codes may fall either way, and
    # then moves what follows in its row.
    assert (codes == expected).float().mean() > 0.995
    assert (codes == expected).all(1).float().mean() > 0.9


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_hessian_is_round_to_nearest(bits, act_order, static_groups):
    weight, _ = layer_and_gram(columns=160)
    method = Gptq(bits, 64, clip=False, act_order=act_order, static_groups=static_groups)
    codes, scale, zero, _ = method.solve(weight, torch.eye(160))
    groups = grouped(weight, 64)
    rtn_scale, rtn_zero = fit_range(groups, bits, False, torch.bfloat16)
    assert torch.equal(
        codes, to_codes(groups, rtn_scale, rtn_zero, bits).flatten(1)[:, :160].byte()
    )
    assert torch.equal(scale, rtn_scale[..., 0]) and torch.equal(zero, rtn_zero[..., 0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_well_below_rounding(bits, act_order, static_groups, symmetric):
    weight, gram = layer_and_gram()
    method = Gptq(
        bits, 32, symmetric, act_order=act_order, static_groups=static_groups, dtype="float32"
    )
    rtn = Rtn(bits, 32, symmetric, dtype="float32").quantize(weight, None).weight()
    ours = output_error(rebuilt(method, weight, gram) - weight, gram)
    assert ours < 0.6 * output_error(rtn - weight, gram)


def test_order_is_stored_only_when_groups_follow_it():
    weight, gram = layer_and_gram()
    assert Gptq(static_groups=True).solve(weight, gram)[3] is None
    assert Gptq(act_order=False, static_groups=False).solve(weight, gram)[3] is None
    order = Gptq(static_groups=False).solve(weight, gram)[3]
    assert order.tolist() == torch.argsort(gram.diagonal(), descending=True).tolist()


def test_an_input_that_is_always_zero_does_no_harm():
    weight, gram = layer_and_gram()
    gram[5] = gram[:, 5] = 0
    dead = rebuilt(Gptq(dtype="float32"), weight, gram)
    assert dead.isfinite().all()
    keep = [column for column in range(96) if column != 5]
    assert output_error((dead - weight)[:, keep], gram[keep][:, keep]) < 96


def test_damping_grows_until_the_factorization_succeeds():
    gram = torch.ones(32, 32)  # rank 1, and 1e-9 is lost in rounding
    gram[0, 1] = gram[1, 0] = 1.001  # not even semi-definite
    factor = inverse_factor(gram, 1e-9)
    least = torch.linalg.inv(factor.T @ factor)  # H + damping * mean(diag) * 1
    added = (least - gram.double()).diagonal()
    assert 1e-3 <= added.mean() <= 0.1 and added.std() < 1e-6
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-torch.eye(4), 0.01)


def test_layers_that_share_an_input_are_solved_together(llama, token_ids):
    method = Gptq(group_size=32)
    together = method.compress(llama, token_ids)
    attention = together.model.layers[0].self_attn
    assert attention.q_proj.bits == attention.k_proj.bits == attention.v_proj.bits == 4
    assert attention.k_proj.codes.shape == (32, 32)  # 2 heads of 16 rows; 64 codes in 32 bytes


@pytest.mark.parametrize("true_sequential", [True, False])
def test_both_orders_of_a_block_work(model, token_ids, true_sequential):
    from compress.base import TorchRunner

    before = TorchRunner(model).logits(token_ids)
    method = Gptq(bits=8, group_size=32, true_sequential=true_sequential, dtype="float32")
    after = TorchRunner(method.compress(model, token_ids)).logits(token_ids)
    assert (after - before).norm() < 0.03 * before.norm()


def test_refusals(llama, token_ids):
    with pytest.raises(ValueError, match="damping must be above 0"):
        Gptq(damping=0.0)
    with pytest.raises(ValueError, match="needs calibration"):
        Gptq().compress(llama)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Gptq().compress(llama, token_ids + 10**6)
    with pytest.raises(ValueError, match="int64 token ids"):
        Gptq().compress(llama, token_ids.float())
    llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1: "):
        Gptq().compress(llama, token_ids)
