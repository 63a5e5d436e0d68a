"""Fake quantization: exact gradients, training, what the model keeps, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.low_precision import Quantizer, fake_quantize_linears, remove
from finetune.low_precision.fake_quant import FakeQuant
from finetune.low_precision.method_weights import MethodQuantizer

FORMATS = (
    *("int8_sym", "int8_asym", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"),
    *("posit8_1", "nf4"),
)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))


def rounding_net(**settings):
    model = net()
    fake_quantize_linears(model, **settings)
    return model


# Gradients.


@pytest.mark.parametrize("text", [*FORMATS, "method:rtn(bits=4)", "method:int8_sym"])
def test_gradients_pass_straight_through_the_weight(text):
    layer, x = nn.Linear(32, 8), torch.randn(5, 32)
    rebuilt = MethodQuantizer.parse(text) if "method" in text else Quantizer.parse(text)
    rounded = rebuilt(layer.weight.detach()).requires_grad_()
    assert not torch.equal(rounded, layer.weight)
    (F.linear(x, rounded) + layer.bias).square().sum().backward()
    bias_gradient, layer.bias.grad = layer.bias.grad, None
    fake_quantize_linears(layer, weights=text)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, rounded.grad)
    assert torch.equal(layer.bias.grad, bias_gradient)


def test_a_saturated_activation_gets_no_gradient_and_a_saturated_weight_does():
    row = torch.tensor([[7.0, 2.4, -6.5, 6.0]], requires_grad=True)  # scale 1, largest 6
    fp4 = Quantizer.parse("fp4_e2m1:pow2")
    for clipped, expected in ((True, [[0, 2, 0, 4]]), (False, [[1, 2, 3, 4]])):
        (gradient,) = torch.autograd.grad(
            (FakeQuant.apply(row, fp4, clipped) * torch.tensor([1.0, 2, 3, 4])).sum(), row
        )
        assert gradient.tolist() == expected
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = row.detach().clone()
    fake_quantize_linears(layer, weights="fp4_e2m1:pow2", activations="fp4_e2m1:pow2")
    layer(row).backward()
    assert row.grad.tolist() == [[0, 2, 0, 6]] and layer.weight.grad.tolist() == [[6, 2, -6, 6]]


def test_the_gradient_of_the_output_is_rounded_before_it_is_used():
    layer, x = nn.Linear(32, 8), torch.randn(5, 32, requires_grad=True)
    output_gradient = torch.randn(5, 8)
    fake_quantize_linears(layer, gradients="fp4_e2m1")
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))  # forward: as it is
    y.backward(output_gradient)
    rounded = Quantizer.parse("fp4_e2m1")(output_gradient)
    assert not torch.equal(rounded, output_gradient)
    assert torch.equal(layer.bias.grad, rounded.sum(0))
    assert torch.equal(layer.weight.grad, rounded.T @ x)
    assert torch.equal(x.grad, rounded @ layer.weight)


@pytest.mark.parametrize(
    "settings",
    [
        dict(weights="int8_sym"),
        dict(weights="fp8_e4m3"),
        dict(weights="int8_sym", activations="int8_asym", gradients="int8_sym"),
        dict(weights="fp8_e4m3:block32:pow2", activations="fp8_e4m3", gradients="fp8_e5m2:tensor"),
        dict(weights="posit8_1", activations="posit8_1", gradients="posit(8,2)"),
        dict(weights="method:rtn(bits=4)"),
    ],
    ids=str,
)
def test_thirty_steps_reduce_the_loss(settings):
    model = rounding_net(**settings)
    x = torch.randn(64, 32)
    goal = (net()(x).sin() * 2).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# What the model keeps.


def test_names_parameters_hooks_and_classes_stay():
    model = net()
    before, calls = dict(model.named_parameters()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert fake_quantize_linears(model, weights="fp4_e2m1", skip=("2",)) == ["0"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() == model.state_dict().keys()
    assert all(after[name] is before[name] for name in before)
    assert isinstance(model[0], nn.Linear) and type(model[2]) is nn.Linear
    assert "FakeQuant(" in repr(model) and "weights=fp4_e2m1:row" in repr(model)
    x = torch.randn(3, 32)
    rounded = model(x)
    assert torch.equal(copy.deepcopy(model)(x), rounded)
    assert (
        remove(model) == ["0"] and type(model[0]) is nn.Linear and "rounding" not in vars(model[0])
    )
    assert torch.equal(model(x), net()(x)) and not torch.equal(rounded, model(x))
    assert len(calls) == 4  # the copy has the hook too


@pytest.mark.parametrize("family, target, count", [("llama", "q_proj", 21), ("gpt2", "c_attn", 8)])
def test_peft_wraps_before_and_after(request, family, target, count):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, ids = request.getfixturevalue(f"tiny_{family}"), torch.arange(12)[None]
    settings = dict(weights="nf4:block64", activations="int8_asym")
    lora = dict(init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    targets = [target, "lm_head"] if family == "llama" else [target]  # GPT-2's head is tied
    logits = []
    for fake_first in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if fake_first:
            names = fake_quantize_linears(model, **settings)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **lora))
        if not fake_first:
            names = fake_quantize_linears(wrapped, **settings)
        assert len(names) == count and not any("lora_" in name for name in names)
        wrapped(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
        logits.append(wrapped.eval()(ids).logits)
        assert len(remove(wrapped)) == count
        assert not torch.equal(wrapped(ids).logits, logits[-1])
        wrapped.merge_and_unload()
    assert torch.equal(*logits)


@pytest.fixture
def one_process():
    """torch.distributed with a world of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fake_first", [True, False])
def test_fsdp2_and_ddp_see_the_same_model(one_process, fake_first):
    from torch.distributed.fsdp import fully_shard

    x, settings = torch.randn(4, 32), dict(weights="method:rtn(bits=4)", gradients="fp8_e5m2")
    plain = rounding_net(**settings)
    plain(x).square().mean().backward()
    sharded = net()
    if fake_first:
        fake_quantize_linears(sharded, **settings)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh)
    if not fake_first:
        fake_quantize_linears(sharded, **settings)
    sharded(x).square().mean().backward()
    replicated = nn.parallel.DistributedDataParallel(rounding_net(**settings))
    replicated(x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(sharded.get_parameter(name).grad.full_tensor(), parameter.grad)
        assert torch.equal(replicated.module.get_parameter(name).grad, parameter.grad)
    assert sharded.state_dict().keys() == plain.state_dict().keys()
    assert remove(sharded) == ["0", "2"]


def test_a_layer_that_fsdp2_holds_by_itself_is_not_taken_apart(one_process):
    from torch.distributed.fsdp import fully_shard

    model = rounding_net(weights="int8_sym")
    fully_shard(model[0], mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="0 is a FSDPFakeQuantLinear; undo what was applied"):
        remove(model)


# Refusals.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "nothing to round"),
        (dict(weights="int9"), "weights: no number format 'int9'"),
        (dict(weights="nf4:col"), "cannot read 'col' in 'nf4:col'; write FORMAT"),
        (dict(weights="nf4:"), "cannot read ''"),
        (dict(gradients="fp8_e5m2:pow2:row"), "cannot read 'pow2:row'"),
        (dict(activations="fp8_e4m3:block1"), "a block must hold at least 2 values"),
        (dict(activations="int8_asym:pow2"), "int8_asym takes no power-of-two scales"),
        (dict(weights="nf4:block64:pow2"), "nf4 takes no power-of-two scales"),
        (dict(activations="method:rtn"), "activations: 'method:rtn' is for weights only"),
        (dict(weights="method:gptq"), "'gptq' does not quantize a weight without data.*int8_sym"),
        (dict(weights="method:cast"), "'cast' does not quantize a weight without data"),
        (dict(weights="method:rtm"), "no method 'rtm'; did you mean rtn"),
        (dict(weights="method:rtn", skip=("lm_head", "0")), "skips .*make both the same"),
        (dict(weights="nf4", skip=("0", "2")), "no linear layer to fake-quantize outside skip"),
    ],
    ids=str,
)
def test_refusals(settings, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        fake_quantize_linears(model, **settings)
    assert type(model[0]) is nn.Linear


def test_refuses_twice_and_nothing_to_remove():
    model = rounding_net(weights="nf4")
    with pytest.raises(ValueError, match=r"0 is fake-quantized already; call remove"):
        fake_quantize_linears(model, weights="nf4")
    remove(model)
    with pytest.raises(ValueError, match="no fake-quantized layer to remove"):
        remove(model)


def test_refuses_a_layer_with_arithmetic_of_its_own():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="1: Doubled computes in a way of its own; add it to skip"):
        fake_quantize_linears(nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)), weights="nf4")


def test_weights_that_are_not_finite_stop_training():
    model = rounding_net(weights="method:rtn")
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model(torch.ones(1, 32))
