"""smoothquant: outliers move into the weights, the function stays, 8 bits lose less."""

import pytest
import torch
from comparing import relative

import compress
from compress import calibrate, checkpoint
from compress.base import TorchRunner
from compress.folding import own_weights
from compress.methods.smoothquant import SmoothQuant

IDS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def test_factors_by_hand():
    s = SmoothQuant(alpha=0.5).factors(
        torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    )
    assert s.tolist() == [4.0, 0.5, 1.0]  # sqrt(16 / 1), sqrt(1 / 4), and an input that is never
    assert SmoothQuant(alpha=1.0).factors(torch.tensor([16.0]), torch.tensor([2.0])).item() == 16


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_smoothing_alone_changes_nothing(family, request, monkeypatch):
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: torch.float32)
    model = checkpoint.load(request.getfixturevalue(family))
    expected = TorchRunner(checkpoint.load(request.getfixturevalue(family))).logits(IDS)
    method = SmoothQuant(dtype="float32")
    moved = []

    def smooth(groups):
        before = [layer.weight.clone() for group in groups for layer in group.chosen().values()]
        own_weights(groups)
        for group in groups:
            method.smooth(group)
        after = [layer.weight for group in groups for layer in group.chosen().values()]
        moved.extend(relative(a, b) for a, b in zip(after, before, strict=True))
        return {}

    calibrate.run(model, IDS, smooth, "block", lambda done, total: None)
    assert relative(TorchRunner(model).logits(IDS), expected) < 1e-5
    assert max(moved) > 0.1


def test_loses_less_than_dynamic_where_a_channel_is_an_outlier(tiny_llama):
    def outlier():
        model = checkpoint.load(tiny_llama)
        for layer in model.model.layers:  # a norm that makes one channel 100 times larger
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data = norm.weight.data.clone()
                norm.weight.data[5] *= 100
            for linear in (
                *(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                *(layer.mlp.gate_proj, layer.mlp.up_proj),
            ):
                linear.weight.data = linear.weight.data.clone()
                linear.weight.data[:, 5] /= 100
        return model

    expected = TorchRunner(outlier()).logits(IDS)
    smooth = compress.apply("smoothquant", outlier(), IDS, dtype="float32")
    plain = compress.apply("dynamic", outlier(), dtype="float32")
    errors = [relative(TorchRunner(each).logits(IDS), expected) for each in (smooth, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_refuses_an_alpha_outside_0_to_1(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        compress.get("smoothquant", alpha=alpha)


def test_refuses_to_run_without_calibration(tiny_llama):
    with pytest.raises(ValueError, match="needs calibration"):
        compress.get("smoothquant").compress(checkpoint.load(tiny_llama))
