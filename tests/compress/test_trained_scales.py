"""Training under codes: the same function, gradients by hand, codes that stay."""

import pytest
import torch
from torch.nn import functional as F

import compress
from compress import checkpoint
from compress.base import TorchRunner
from compress.quant_linear import QuantLinear
from compress.trained_scales import ScaledCodes

RANDOM = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 257, (6, 20), generator=RANDOM)


def drawn(*shape, top):
    return torch.randint(0, top, shape, generator=RANDOM, dtype=torch.uint8)


@pytest.mark.parametrize("extra", ["zero", "offset", "order", "one scale"])
def test_the_same_function_and_its_gradient_by_hand(extra):
    rows = 1 if extra == "one scale" else 6
    scale = torch.rand(rows, 3, generator=RANDOM)
    layer = QuantLinear.from_codes(
        drawn(6, 40, top=16),  # two groups of 16 and one of 8
        scale,
        drawn(6, 3, top=16) if extra == "zero" else None,
        torch.rand(6, generator=RANDOM),
        4,
        16,
        order=torch.randperm(40, generator=RANDOM) if extra == "order" else None,
        dtype=torch.float32,
        offset=torch.rand(rows, 3, generator=RANDOM) if extra == "offset" else None,
    )
    x = torch.randn(5, 40, generator=RANDOM)
    opened = ScaledCodes(layer, trained=True)
    y = opened(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight(), layer.bias), rtol=1e-5, atol=1e-4)
    y.square().sum().backward()
    # y is linear in the scale: what a change of one entry does to y is its group's share of y.
    change = torch.zeros_like(scale)
    change[0, 2] = 0.5
    layer.scale = scale + change
    moved = F.linear(x, layer.weight(), layer.bias) - y.detach()
    wanted = float((2 * y.detach() * moved).sum()) / 0.5
    assert float(opened.scale.grad[0, 2]) == pytest.approx(wanted, rel=1e-3)
    torch.testing.assert_close(opened.bias.grad, 2 * y.detach().sum(0))


@pytest.mark.parametrize(
    "family, method",
    [("tiny_llama", "rtn(bits=2)"), ("tiny_gpt2", "rtn(bits=3,group_size=32,head_bits=4)")],
)
def test_codes_stay_and_the_model_comes_nearer_to_its_parent(family, method, request, tmp_path):
    folder = request.getfixturevalue(family)
    said = F.log_softmax(TorchRunner(checkpoint.load(folder)).logits(IDS), -1)

    def apart(model):
        other = F.log_softmax(TorchRunner(model).logits(IDS), -1)
        return float(F.kl_div(other, said, reduction="sum", log_target=True))

    rounded = compress.apply(method, checkpoint.load(folder), IDS)
    settings = "steps=30,share=1.0,temperature=1.0,learning_rate=0.003"
    learnt = compress.apply(f"{method}+distill({settings})", checkpoint.load(folder), IDS)
    assert apart(learnt) < 0.6 * apart(rounded)
    names = [name for name, each in rounded.named_modules() if isinstance(each, QuantLinear)]
    for name in names:
        before, after = (model.get_submodule(name) for model in (rounded, learnt))
        for mine, theirs in zip(after.codes_and_zero(), before.codes_and_zero(), strict=True):
            assert torch.equal(mine, theirs)
        assert after.scale.dtype == before.scale.dtype
        head = name == "lm_head" or name.endswith(".table")
        assert (head and "head_bits" in method) or not torch.equal(after.scale, before.scale)
    compress.save(learnt, tmp_path / "learnt")
    again = TorchRunner(compress.load(tmp_path / "learnt")).logits(IDS)
    assert torch.equal(again, TorchRunner(learnt).logits(IDS))


def test_what_rounds_its_inputs_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"q_proj rounds its inputs: nothing can be trained"):
        compress.apply("dynamic+distill(steps=1)", checkpoint.load(tiny_llama), IDS)
