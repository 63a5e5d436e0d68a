"""`rotate`: the same function in other weights, off every grid; a plain folder."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress import layers
from compress.methods.rotate import random_rotation
from compress.quant_math import fit_range, grouped, rounded


@pytest.fixture
def gainful(model):
    """A tiny model of each family, whose norms do something."""
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or ".ln_" in parameter_name:
            start = 0.5 if parameter_name.endswith("weight") else -0.2
            parameter.data = torch.rand(parameter.shape, generator=generator) + start
    return model


@torch.no_grad()
def logits(model):
    ids = torch.arange(60).view(2, 30) % model.config.vocab_size
    return model(ids).logits.double()


def on_grid(weight):
    """What asymmetric rounding to 4 bits in groups of 32 makes of `weight` (out, in)."""
    groups = grouped(weight.float(), 32)
    scale, zero = fit_range(groups, 4, False, torch.float32)
    return rounded(groups, scale, zero, 4).flatten(1)[:, : weight.shape[1]]


def rtn_error(weight):
    return ((on_grid(weight) - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("keep_ones", [False, True])
def test_a_rotation_is_orthogonal_and_drawn_by_its_seed(keep_ones):
    turn = random_rotation(48, 3, keep_ones)
    assert (turn @ turn.T - torch.eye(48, dtype=torch.float64)).abs().max() < 1e-13
    assert torch.equal(turn, random_rotation(48, 3, keep_ones))
    assert not torch.equal(turn, random_rotation(48, 4, keep_ones))
    ones = torch.ones(48, dtype=torch.float64)
    assert torch.allclose(ones @ turn, ones) == keep_ones


def test_rotations_are_uniform():
    # Half of all orthogonal 2 x 2 matrices are reflections; Q[0, 0] is cos of a uniform angle.
    drawn = torch.stack([random_rotation(2, seed) for seed in range(400)])
    for share in (
        torch.linalg.det(drawn) > 0,
        drawn[:, 0, 0].abs() < 0.5**0.5,
        drawn[:, 0, 0] > 0,
    ):
        assert share.double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_function_stays_and_the_weights_do_not(gainful):
    before = logits(gainful)
    layout = layers.family(gainful)
    writer = f"{layout.blocks}.0.{layout.mlp.output}"
    old = gainful.get_submodule(writer).weight.clone()
    rotated = compress.apply("rotate", gainful)
    assert (logits(rotated) - before).abs().max() < 2e-5 * before.abs().max()
    new = rotated.get_submodule(writer).weight
    assert not torch.allclose(new, old, atol=1e-3)
    assert torch.allclose(new.norm(dim=0), old.norm(dim=0), rtol=1e-5)
    gains = [p for n, p in rotated.named_parameters() if n.endswith(("norm.weight", "ln_1.weight"))]
    assert gains and all((gain == 1).all() for gain in gains)


def test_gains_of_zero_lose_nothing(gpt2, llama):
    for model, norm in ((gpt2, "transformer.ln_f"), (llama, "model.norm")):
        gains = model.get_submodule(norm).weight
        gains.data[3], gains.data[5] = 0, 1e-6
        before = logits(model)
        after = logits(compress.apply("rotate", model))
        assert (after - before).abs().max() < 2e-5 * before.abs().max()


def test_a_llama_with_biases_and_a_tied_head():
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    before = logits(model)
    rotated = compress.apply("rotate", model)
    assert (logits(rotated) - before).abs().max() < 2e-5 * before.abs().max()
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight


def test_refusals_come_before_anything_is_changed(model):
    small = compress.apply("rtn(group_size=32)", model)
    before = {name: values.clone() for name, values in small.named_parameters()}
    with pytest.raises(ValueError, match="is compressed already: rotate first"):
        compress.apply("rotate", small)
    assert all(torch.equal(values, before[name]) for name, values in small.named_parameters())
    with pytest.raises(ValueError, match="dtype"):
        compress.get("rotate", dtype="int4")


def test_weights_leave_the_grid_that_they_lay_on(llama):
    layer = llama.model.layers[0].mlp.down_proj
    layer.weight.data = on_grid(layer.weight)
    assert rtn_error(layer.weight) < 1e-5
    rotated = compress.apply("rotate", llama)
    gaussian = rtn_error(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    # 32 normal draws span 4.14 deviations (4.2 in root mean square), a step is a 15th of that, and
    # an error even within a step has 1 / sqrt(12) of it.
    assert gaussian == pytest.approx(4.2 / 15 / 12**0.5, rel=0.02)
    after = rtn_error(rotated.model.layers[0].mlp.down_proj.weight)
    assert after == pytest.approx(gaussian, rel=0.1)


def test_what_is_saved_is_a_plain_model_with_a_head_of_its_own(gainful, tmp_path):
    from transformers import AutoModelForCausalLM

    rotated = compress.apply("rotate(seed=1)", gainful)
    compress.save(rotated, tmp_path / "rotated")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated", local_files_only=True)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, rotated.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)
    assert torch.allclose(logits(again.eval()), logits(rotated), atol=1e-4)
