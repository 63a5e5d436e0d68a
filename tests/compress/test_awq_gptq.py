"""awq_gptq: each half alone is the method it comes from; together they lose less; a refusal."""

import copy

import pytest
import torch

from compress.base import TorchRunner
from compress.methods.awq import Awq
from compress.methods.awq_gptq import AwqGptq
from compress.methods.gptq import Gptq

SETTINGS = {"bits": 3, "group_size": 32, "dtype": "float32"}


def test_without_scales_it_is_gptq(model, token_ids):
    plain = Gptq(**SETTINGS, true_sequential=False).compress(copy.deepcopy(model), token_ids)
    mine = AwqGptq(**SETTINGS, grid=0).compress(model, token_ids)
    ours, theirs = (TorchRunner(m).logits(token_ids) for m in (mine, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_scales_are_those_of_awq(llama, token_ids):
    """Scales sit in the norms, which nothing else changes; first blocks have equal inputs."""
    awq = Awq(**SETTINGS).compress(copy.deepcopy(llama), token_ids)
    mine = AwqGptq(**SETTINGS).compress(copy.deepcopy(llama), token_ids)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        scaled, original = mine.model.layers[0], llama.model.layers[0]
        found = scaled.get_submodule(norm).weight
        torch.testing.assert_close(found, awq.model.layers[0].get_submodule(norm).weight)
        assert not torch.equal(found, original.get_submodule(norm).weight)


def test_channels_of_very_unequal_size(llama, token_ids):
    """Large inputs to small weights, the case that scaling is for: less is lost than by gptq."""
    with torch.no_grad():
        for layer in llama.model.layers:
            for norm, names in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                factor = torch.ones(64)
                factor[::16] = 12.0
                norm.weight.mul_(factor)
                parent = layer.self_attn if "q_proj" in names else layer.mlp
                for name in names:
                    parent.get_submodule(name).weight.div_(factor)
    before = TorchRunner(copy.deepcopy(llama)).logits(token_ids)
    errors = {}
    for method in (Gptq(**SETTINGS), Awq(**SETTINGS), AwqGptq(**SETTINGS)):
        after = TorchRunner(method.compress(copy.deepcopy(llama), token_ids)).logits(token_ids)
        errors[type(method).__name__] = float((after - before).norm() / before.norm())
    assert errors["AwqGptq"] < 0.95 * min(errors["Awq"], errors["Gptq"]), errors


def test_refusals():
    with pytest.raises(ValueError, match="true_sequential has to be false"):
        AwqGptq(true_sequential=True)
    with pytest.raises(ValueError, match="grid must be between 0 and 1000"):
        AwqGptq(grid=-1)
