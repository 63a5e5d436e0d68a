"""awq: scaling alone changes nothing, the search lowers the output error, exact folds only."""

import pytest
import torch

from compress import calibrate
from compress.base import TorchRunner
from compress.layers import decoder_blocks
from compress.methods.awq import Awq, Before, output_error
from compress.methods.rtn import Rtn

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

    calibrate.run(model, token_ids, keep, "float", lambda done, total: None)
    return found


def test_scaling_leaves_the_function_unchanged(uneven, token_ids):
    before = TorchRunner(uneven).logits(token_ids).double()
    scaled = 0

    def scale_only(groups):
        nonlocal scaled
        method = Awq(bits=3, group_size=32, dtype="float32")
        for group in groups:
            old = [layer.weight.clone() for layer in group.layers]
            for layer in group.layers:
                layer.weight = torch.nn.Parameter(layer.weight.clone(), False)
            method.scale(group)
            new = [layer.weight for layer in group.layers]
            scaled += any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
        return {}

    calibrate.run(uneven, token_ids, scale_only, "float", lambda done, total: None)
    after = TorchRunner(uneven).logits(token_ids).double()
    assert scaled >= 5  # of 12 (Llama) or 8 (GPT-2) groups: it did something
    assert (after - before).norm() < 1e-5 * before.norm()


def test_gelu_stands_in_the_way(gpt2, llama, token_ids):
    for (_, name), group in groups_of(gpt2, token_ids).items():
        assert (Before.of(group) is None) == (name == "mlp.c_proj")
    assert all(Before.of(group) is not None for group in groups_of(llama, token_ids).values())


@torch.inference_mode()
def test_scale_lowers_the_output_error_and_prefers_large_inputs(uneven, token_ids):
    method = Awq(bits=3, group_size=32, clip=False, dtype="float32")
    for (_, name), group in groups_of(uneven, token_ids).items():
        if name not in ("self_attn.q_proj", "attn.c_attn"):
            continue
        for layer in group.layers:
            layer.weight = torch.nn.Parameter(layer.weight.clone(), False)
        weight = torch.cat([layer.weight for layer in group.layers])
        gram = group.gram.clone()
        plain = output_error(method._rounded(weight) - weight, gram)
        method.scale(group)
        scaled = torch.cat([layer.weight for layer in group.layers])
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
def test_clipping_lowers_the_output_error(uneven, token_ids):
    for group in groups_of(uneven, token_ids).values():
        layer = group.layers[0]
        method = Awq(bits=3, group_size=32, dtype="float32")

        def error(clip, layer=layer, group=group, method=method):
            change = method.quantize(layer, group.gram, clip).weight() - layer.weight
            blocks = change.view(len(change), -1, 32).transpose(0, 1)
            own = torch.stack(
                [group.gram[i : i + 32, i : i + 32] for i in range(0, change.shape[1], 32)]
            )
            return ((blocks @ own) * blocks).sum().item()

        assert error(True) < error(False)


def test_without_scaling_and_clipping_it_is_round_to_nearest(model, token_ids):
    name, block = decoder_blocks(model)[0]
    expected = {
        child: Rtn(3, 32).quantize(layer.weight, layer.bias).weight()
        for child, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    compressed = Awq(bits=3, group_size=32, grid=0, clip=False).compress(model, token_ids)
    block = compressed.get_submodule(name)
    assert len(expected) in (4, 7)
    for child, weight in expected.items():
        assert torch.equal(block.get_submodule(child).weight(), weight)


def test_beats_rounding_on_the_model_output(uneven, token_ids):
    import copy

    before = TorchRunner(uneven).logits(token_ids)

    def error(method):
        compressed = method.compress(copy.deepcopy(uneven), token_ids)
        return (TorchRunner(compressed).logits(token_ids) - before).norm().item()

    settings = dict(bits=3, group_size=32, dtype="float32")
    assert error(Awq(**settings)) < 0.9 * error(Rtn(**settings))


def test_refusals(llama, token_ids):
    with pytest.raises(ValueError, match="grid must be"):
        Awq(grid=-1)
    with pytest.raises(ValueError, match="needs calibration"):
        Awq().compress(llama)
    llama.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2: "):
        Awq().compress(llama, token_ids)
