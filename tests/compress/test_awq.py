"""awq: scaling alone changes nothing, the search lowers the output error, exact folds only."""

import copy

import pytest
import torch
from torch import nn

from compress import calibrate
from compress.base import TorchRunner, silent
from compress.folding import Before
from compress.layers import LinearFromConv1D, decoder_blocks
from compress.methods.awq import Awq
from compress.methods.rtn import Rtn
from compress.output_error import output_error
from compress.quant_linear import QuantLinear

OUTLIERS = [3, 17, 40]


@pytest.fixture
def uneven(model):
    """The tiny model with three large channels behind every norm, as real models have."""
    for name, module in model.named_modules():
        if "norm" in name or ".ln_" in name:
            module.weight.data[OUTLIERS] *= 20
    return model


def groups_of(model, token_ids):
    """Every Group that calibration shows, by (block, first layer)."""
    found = {}

    def keep(groups):
        for group in groups:
            found[len(found) // 4, group.names[0]] = group
        return {}

    calibrate.run(model, token_ids, keep, "block", silent)
    return found


def test_scaling_leaves_the_function_unchanged(uneven, token_ids):
    before = TorchRunner(uneven).logits(token_ids).double()
    scaled = 0

    def scale_only(groups):
        nonlocal scaled
        method = Awq(bits=3, group_size=32, dtype="float32")
        for group in groups:
            old = [layer.weight.clone() for layer in group.chosen().values()]
            method.scale(group)
            new = [layer.weight for layer in group.chosen().values()]
            scaled += any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
        return {}

    calibrate.run(uneven, token_ids, scale_only, "block", silent)
    after = TorchRunner(uneven).logits(token_ids).double()
    assert scaled >= 5  # of 12 (Llama) or 8 (GPT-2) groups: it did something
    assert (after - before).norm() < 1e-5 * before.norm()


def test_gelu_stands_in_the_way(gpt2, llama, token_ids):
    for (_, name), group in groups_of(gpt2, token_ids).items():
        assert (Before.of(group) is None) == (name == "mlp.c_proj")
    assert all(Before.of(group) is not None for group in groups_of(llama, token_ids).values())


@torch.inference_mode()
def test_scale_lowers_the_output_error_and_prefers_large_inputs(uneven, token_ids):
    method = Awq(bits=3, group_size=32, sweeps=0, dtype="float32")
    for (_, name), group in groups_of(uneven, token_ids).items():
        if name not in ("self_attn.q_proj", "attn.c_attn"):
            continue
        weight = torch.cat([layer.weight for layer in group.chosen().values()])
        gram = group.gram.clone()
        plain = output_error(method._rounded(weight) - weight, gram)
        method.scale(group)
        scaled = torch.cat([layer.weight for layer in group.chosen().values()])
        s = (scaled / weight).median(0).values
        assert output_error(method._rounded(scaled) - scaled, group.gram) < 0.9 * plain
        rest = [channel for channel in range(64) if channel not in OUTLIERS]
        assert s[OUTLIERS].min() > 1.5 * s[rest].median()


def test_query_heads_of_one_key_value_head_share_their_scale(llama, token_ids):
    group = groups_of(llama, token_ids)[0, "self_attn.o_proj"]
    before = Before.of(group)
    assert (before.heads, before.repeat, before.width) == (2, 2, 16)
    shared = before.shared(torch.arange(64.0)).view(2, 2, 16)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert shared[0, 0, 0].item() == 8  # mean of channels 0 and 16


@torch.inference_mode()
def test_sweeps_lower_the_output_error_of_every_layer(uneven, token_ids):
    for group in groups_of(uneven, token_ids).values():
        for layer in group.chosen().values():

            def error(sweeps, layer=layer, group=group):
                method = Awq(bits=3, group_size=32, sweeps=sweeps, dtype="float32")
                change = method.quantize(layer, group.gram).weight() - layer.weight
                return output_error(change, group.gram)

            assert error(Awq().sweeps) < 0.9 * error(0)


def test_without_scaling_and_fitting_it_is_round_to_nearest(model, token_ids):
    name, block = decoder_blocks(model)[0]
    expected = {
        child: Rtn(3, 32).quantize(layer.weight, layer.bias).weight()
        for child, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    compressed = Awq(bits=3, group_size=32, grid=0, sweeps=0).compress(model, token_ids)
    block = compressed.get_submodule(name)
    assert len(expected) in (4, 7)
    for child, weight in expected.items():
        assert torch.equal(block.get_submodule(child).weight(), weight)


def test_beats_rounding_on_the_model_output(uneven, token_ids):
    before = TorchRunner(uneven).logits(token_ids)

    def error(method):
        compressed = method.compress(copy.deepcopy(uneven), token_ids)
        return (TorchRunner(compressed).logits(token_ids) - before).norm().item()

    settings = dict(bits=3, group_size=32, dtype="float32")
    plain = error(Rtn(**settings))
    assert error(Awq(**settings, sweeps=0)) < plain
    ours = error(Awq(**settings))
    assert ours < 0.9 * plain
    assert ours < error(Rtn(**settings, clip=True))


@pytest.mark.parametrize(
    "family, skip",
    [("llama", ("lm_head", "k_proj", "down_proj")), ("gpt2", ("lm_head", "attn.c_proj", "c_fc"))],
)
def test_skipped_layers_stay_in_floating_point(family, skip, request, token_ids):
    compressed = Awq(group_size=32, skip=skip).compress(request.getfixturevalue(family), token_ids)
    skipped = 0
    for _, block in decoder_blocks(compressed):
        for name, layer in block.named_modules():
            if name.endswith(skip):
                skipped += 1
                assert type(layer) is (nn.Linear if family == "llama" else LinearFromConv1D)
                assert layer.weight.dtype == torch.bfloat16
            elif name.endswith(("proj", "c_attn", "c_fc")):
                assert type(layer) is QuantLinear
    assert skipped == {"llama": 6, "gpt2": 4}[family]


def test_refusals(llama, token_ids):
    with pytest.raises(ValueError, match="grid must be"):
        Awq(grid=-1)
    with pytest.raises(ValueError, match="sweeps must be"):
        Awq(sweeps=-1)
    with pytest.raises(ValueError, match="needs calibration"):
        Awq().compress(llama)
    llama.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError) as caught:
        Awq().compress(llama, token_ids)
    named = "model.layers.2: mlp.down_proj: the weight holds NaN or infinity"
    assert str(caught.value) == named
