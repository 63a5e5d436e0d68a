"""gptq on whole models: what is solved together, both orders of a block, skip, refusals."""

import copy

import pytest
import torch
from torch import nn

from compress.base import TorchRunner
from compress.layers import decoder_blocks
from compress.methods.gptq import Gptq
from compress.quant_linear import QuantLinear


@pytest.fixture
def solved(monkeypatch):
    """Shapes of the weights that `solve` is given, call by call."""
    shapes, solve = [], Gptq.solve

    def spy(self, weight, gram, drift=None):
        assert gram.shape == (weight.shape[1], weight.shape[1])
        shapes.append(tuple(weight.shape))
        return solve(self, weight, gram, drift)

    monkeypatch.setattr(Gptq, "solve", spy)
    return shapes


@pytest.mark.parametrize("true_sequential", [True, False])
def test_layers_that_share_an_input_are_solved_together(llama, token_ids, solved, true_sequential):
    Gptq(group_size=32, true_sequential=true_sequential).compress(llama, token_ids)
    # q, k and v have 64 + 32 + 32 rows; gate and up 160 + 160
    assert solved == 3 * [(128, 64), (64, 64), (320, 64), (64, 160)]
    attention = llama.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    assert [(layer.bits, tuple(layer.codes.shape)) for layer in layers] == [
        (4, (64, 32)),  # 64 codes in 32 bytes
        (4, (32, 32)),
        (4, (32, 32)),
    ]


def test_each_layer_of_a_shared_solution_gets_its_own_rows(llama, token_ids):
    """Without the other rows the answer is the same: rows share H and nothing else."""
    settings = {"bits": 3, "group_size": 32, "dtype": "float32"}
    together = Gptq(**settings).compress(copy.deepcopy(llama), token_ids).model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        others = tuple({"q_proj", "k_proj", "v_proj"} - {name})
        alone = Gptq(**settings, skip=others).compress(copy.deepcopy(llama), token_ids)
        expected = alone.model.layers[0].self_attn.get_submodule(name).weight()
        mine = together.get_submodule(name).weight()
        assert (mine == expected).float().mean() > 0.9  # a tie may fall either way


@pytest.mark.parametrize("true_sequential", [True, False])
def test_both_orders_of_a_block_work(model, token_ids, true_sequential):
    before = TorchRunner(model).logits(token_ids)
    method = Gptq(bits=8, group_size=32, true_sequential=true_sequential, dtype="float32")
    after = TorchRunner(method.compress(model, token_ids)).logits(token_ids)
    assert (after - before).norm() < 0.03 * before.norm()


@pytest.mark.parametrize("true_sequential", [True, False])
def test_skipped_layers_keep_their_weights(llama, token_ids, solved, true_sequential):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    skip = ("lm_head", "k_proj", "down_proj")
    method = Gptq(group_size=32, skip=skip, true_sequential=true_sequential, dtype="float32")
    method.compress(llama, token_ids)
    assert solved == 3 * [(96, 64), (64, 64), (320, 64)]  # q and v alone; no down_proj
    for block_name, block in decoder_blocks(llama):
        for name, layer in block.named_modules():
            if name.endswith(skip):
                assert type(layer) is nn.Linear
                assert torch.equal(layer.weight, before[f"{block_name}.{name}.weight"])
            elif name.endswith("proj"):
                assert type(layer) is QuantLinear


def test_refusals(llama, token_ids):
    with pytest.raises(ValueError, match="damping must be above 0"):
        Gptq(damping=0.0)
    with pytest.raises(ValueError, match="needs calibration"):
        Gptq().compress(llama)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Gptq().compress(llama, token_ids + 10**6)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Gptq().compress(llama, token_ids - 1000)
    with pytest.raises(ValueError, match="int64 token ids"):
        Gptq().compress(llama, token_ids.float())
    with pytest.raises(ValueError, match="int64 token ids"):
        Gptq().compress(llama, token_ids[:0])


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(llama, token_ids, value, true_sequential):
    llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(ValueError) as caught:
        Gptq(true_sequential=true_sequential).compress(llama, token_ids)
    named = "model.layers.1: mlp.down_proj: the weight holds NaN or infinity"
    assert str(caught.value) == named
