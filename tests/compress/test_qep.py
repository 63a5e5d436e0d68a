"""qep: the target in closed form, nothing at strength 0, outputs nearer to the float model's."""

import copy

import pytest
import torch

from compress.base import TorchRunner
from compress.layer_inputs import Group
from compress.layers import FAMILIES
from compress.methods.gptq import Gptq
from compress.methods.qep import Qep

SETTINGS = {"bits": 2, "group_size": 32, "dtype": "float32"}


def test_the_target_is_least_squares_for_the_float_models_outputs():
    """All of the correction: the V of least sum |W f - V x|^2, as lstsq finds it."""
    generator = torch.Generator().manual_seed(0)
    f, noise = (torch.randn(400, 20, generator=generator).double() for _ in range(2))
    x = f @ torch.randn(20, 20, generator=generator).double() / 20**0.5 + 0.1 * noise
    weights = {name: torch.randn(7, 20, generator=generator) for name in ("q", "k")}
    drift = {
        name: (((f - x) @ weight.double().T).T @ x / 400).float()
        for name, weight in weights.items()
    }
    gram = (x.T @ x / 400).float()
    group = Group(torch.nn.Module(), FAMILIES["gpt2"].mlp, ("q", "k"), gram, gram[0], drift)
    both = torch.cat(list(weights.values()))
    expected = torch.linalg.lstsq(x, f @ both.double().T).solution.T
    found = Qep(strength=1, damping=1e-9).target(both, group, ["q", "k"])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    half = Qep(strength=0.5, damping=1e-9).target(both, group, ["q", "k"])
    torch.testing.assert_close(half, (both + found) / 2, rtol=1e-5, atol=1e-5)
    only = Qep(strength=1, damping=1e-9).target(weights["k"], group, ["k"])  # q was skipped
    torch.testing.assert_close(only, found[7:], rtol=1e-5, atol=1e-5)


def test_none_of_the_correction_is_gptq(model, token_ids):
    plain = Gptq(**SETTINGS).compress(copy.deepcopy(model), token_ids)
    mine = Qep(**SETTINGS, strength=0).compress(model, token_ids)
    ours, theirs = (TorchRunner(m).logits(token_ids) for m in (mine, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_logits_on_the_calibration_come_nearer_to_the_float_models(model, token_ids):
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
