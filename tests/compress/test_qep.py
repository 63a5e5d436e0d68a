"""qep: the target in closed form, nothing at strength 0, outputs nearer to the float model's."""

import copy

import pytest
import torch

from compress import calibrate
from compress.base import TorchRunner
from compress.layer_inputs import Group
from compress.layers import FAMILIES
from compress.methods.gptq import Gptq
from compress.methods.qep import Qep

SETTINGS = {"bits": 2, "group_size": 32, "dtype": "float32"}


@pytest.mark.parametrize("order", [{}, {"act_order": False}, {"static_groups": False}], ids=str)
@pytest.mark.parametrize("strength", [1, 0.5])
def test_the_target_is_least_squares_for_the_float_models_outputs(strength, order):
    """All of the correction: the V of least sum |W f - V x|^2, as lstsq finds it."""
    generator = torch.Generator().manual_seed(0)
    f, noise = (torch.randn(400, 20, generator=generator).double() for _ in range(2))
    x = f @ torch.randn(20, 20, generator=generator).double() / 20**0.5 + 0.1 * noise
    weight = torch.randn(7, 20, generator=generator)
    gram, ahead = (x.T @ x / 400).float(), ((f - x).T @ x / 400).float()
    half = FAMILIES["llama"].mlp
    group = Group(torch.nn.Module(), half, half.inputs, gram, gram[0], gram[0], ahead)
    least_squares = torch.linalg.lstsq(x, f @ weight.double().T).solution.T
    target = weight + strength * (least_squares.float() - weight)
    method = Qep(group_size=8, strength=strength, damping=1e-9, **order, dtype="float32")
    found = method.solve(weight, gram, method.drift(weight, group))
    expected = method.solve(target, gram)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[0], method.solve(weight, gram)[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-6)


def test_the_last_layer_of_a_half_makes_up_for_what_follows_it():
    half, ahead = FAMILIES["gpt2"].mlp, torch.randn(3, 5)
    last = Group(
        torch.nn.Module(), half, (half.output,), torch.eye(5), torch.ones(5), torch.ones(5), ahead
    )
    assert torch.equal(Qep(strength=0.25).drift(torch.randn(3, 5), last), ahead / 4)


def test_none_of_the_correction_is_gptq(model, token_ids):
    plain = Gptq(**SETTINGS).compress(copy.deepcopy(model), token_ids)
    mine = Qep(**SETTINGS, strength=0).compress(model, token_ids)
    ours, theirs = (TorchRunner(m).logits(token_ids) for m in (mine, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_logits_on_the_calibration_come_nearer_to_the_float_models(model, token_ids, monkeypatch):
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: torch.float32)
    before = TorchRunner(copy.deepcopy(model)).logits(token_ids)
    errors = []
    for method in (Gptq(**SETTINGS), Qep(**SETTINGS), Qep(**SETTINGS, strength=1)):
        after = TorchRunner(method.compress(copy.deepcopy(model), token_ids)).logits(token_ids)
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[1] < 0.97 * errors[0] and errors[2] < 0.97 * errors[0], errors


def test_refusals():
    with pytest.raises(ValueError, match=r"strength must be between 0 and 1, not 1\.5"):
        Qep(strength=1.5)
    with pytest.raises(ValueError, match="true_sequential has to be true"):
        Qep(true_sequential=False)
