"""Blocks of any sizes: they run, are saved and loaded with equal logits, and count as promised."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import compress
from compress import checkpoint
from compress.base import TorchRunner, generate
from compress.block_shapes import Shape, keep_blocks, keep_units, settle, shapes
from compress.layers import conv1d_to_linear, decoder_blocks, family
from compress.unit_budget import ranked, uniform


def llama(blocks=2, groups=2, repeat=2, width=16, channels=48, tied=False, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=groups * repeat,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def gpt2(blocks=2, heads=4, width=8, channels=48, tied=True):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_embd=heads * width,
        n_inner=channels,
        n_layer=blocks,
        n_head=heads,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return conv1d_to_linear(model).eval()


def ids(samples=3, tokens=12, seed=0):
    return torch.randint(0, 61, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def numbers(model):
    return sum(each.numel() for each in model.parameters())


def round_trip(model, folder):
    """Saved and loaded: the same parameters and logits, whole and token by token."""
    before = TorchRunner(model).logits(ids())
    checkpoint.save(model, folder)
    again = checkpoint.load(folder)
    assert numbers(again) == numbers(model) and shapes(again) == shapes(model)
    runner = TorchRunner(again)
    assert torch.equal(runner.logits(ids()), before)
    own = again(ids(), use_cache=False).logits
    torch.testing.assert_close(before, own, rtol=1e-3, atol=1e-4)  # transformers' forward pass
    told = generate(runner, ids(), 4)
    expected = ids()
    for _ in range(4):
        expected = torch.cat([expected, runner.logits(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(told, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_units_that_stay_compute_what_they_did(make):
    """Without units whose output is zero the function is the same."""
    model = make()
    layout, was = family(model), shapes(model)[0]
    each = ((layout.attention, was.groups, 1), (layout.mlp, was.channels, 7))
    for _, block in decoder_blocks(model):
        for half, count, gone in each:
            output = block.get_submodule(half.output)
            size = output.in_features // count
            output.weight.data[:, gone * size : (gone + 1) * size] = 0
    before = model(ids()).logits
    for _, block in decoder_blocks(model):
        for half, count, gone in each:
            keep = torch.tensor([unit for unit in range(count) if unit != gone])
            keep_units(block, layout, half, keep)
    settle(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_uniform_llama_is_an_ordinary_folder(tmp_path):
    model = llama(groups=3, repeat=1)
    for _, block in decoder_blocks(model):
        keep_units(block, family(model), family(model).attention, torch.tensor([0, 2]))
        keep_units(block, family(model), family(model).mlp, torch.arange(0, 48, 2))
    settle(model)
    round_trip(model, tmp_path / "small")
    assert {file.name for file in (tmp_path / "small").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_blocks_of_different_sizes(make, tmp_path):
    model = make(blocks=3)
    layout = family(model)
    (_, first), (_, second), _ = decoder_blocks(model)
    keep_units(first, layout, layout.attention, torch.tensor([1]))
    keep_units(second, layout, layout.mlp, torch.arange(16))
    settle(model)
    groups = shapes(model)[1].groups
    assert shapes(model) == [Shape(1, 48), Shape(groups, 16), Shape(groups, 48)]
    round_trip(model, tmp_path / "mixed")
    about = json.loads((tmp_path / "mixed" / "compression.json").read_text())
    assert about["blocks"] == [[1, 48], [groups, 16], [groups, 48]]


@pytest.mark.parametrize(
    "blocks",
    ["x", [], [[1, 16]], [[1, 16], [1]], [[0, 16], [1, 16]], [[1, 49], [1, 16]], [[3, 4], [1, 4]]],
)
def test_sizes_that_make_no_sense_are_refused(blocks, tmp_path):
    model = llama()
    checkpoint.save(model, tmp_path / "m")
    about = {"format": "slimbench", "version": 1, "layers": {}, "blocks": blocks}
    (tmp_path / "m" / "compression.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"compression\.json: 'blocks'"):
        checkpoint.load(tmp_path / "m")


def test_blocks_that_go_leave_the_others_as_they_were(tmp_path):
    model = llama(blocks=3)
    names = [block for _, block in decoder_blocks(model)]
    keep_blocks(model, [0, 2])
    assert [block for _, block in decoder_blocks(model)] == [names[0], names[2]]
    assert model.config.num_hidden_layers == 2
    round_trip(model, tmp_path / "short")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_a_config_cannot_say_is_not_exported(make, tmp_path):
    model = make()
    block = decoder_blocks(model)[0][1]
    keep_units(block, family(model), family(model).attention, torch.tensor([0]))
    settle(model)
    with pytest.raises(ValueError, match="gguf cannot hold this model: its blocks have sizes"):
        compress.export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_the_budget_by_hand():
    """3 groups of 100 weights and 50 channels of 10: 800; a fifth off leaves at most 640."""
    assert uniform(Shape(3, 50), [100, 10], 0.2, True, 1) == Shape(3, 34)
    assert uniform(Shape(3, 50), [100, 10], 0.2, True, 8) == Shape(3, 32)
    assert uniform(Shape(3, 50), [100, 10], 0.4, True, 1) == Shape(2, 28)
    assert uniform(Shape(3, 50), [100, 10], 0.4, False, 1) == Shape(3, 18)
    assert uniform(Shape(3, 50), [100, 10], 0.8, True, 1) == Shape(1, 6)
    with pytest.raises(ValueError, match=r"leaves a block nothing.* lose 0\.863"):
        uniform(Shape(3, 50), [100, 10], 0.9, True, 1)
    with pytest.raises(ValueError, match=r"lose 0\.613"):
        uniform(Shape(3, 50), [100, 10], 0.7, False, 1)


def test_ranked_takes_the_least_over_the_mean_of_their_half():
    scores = [
        [
            torch.tensor([1.0, 1.0]),
            torch.tensor([4.0, 1.0, 3.0, 8.0]),
        ],  # over the mean: 1 .25 .75 2
        [torch.tensor([1.0, 9.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])],  # groups: .2 1.8
    ]
    was = [Shape(2, 4)] * 2  # 2 * 2 * 5 + 2 * 4 * 2 = 36 weights
    assert ranked(was, scores, [5, 2], 0.1, True, 1) == [Shape(2, 4), Shape(1, 4)]
    assert ranked(was, scores, [5, 2], 0.1, False, 1) == [Shape(2, 2), Shape(2, 4)]
    assert ranked(was, scores, [5, 2], 0.18, True, 1) == [Shape(2, 3), Shape(1, 4)]
    with pytest.raises(ValueError, match="leaves a block nothing"):
        ranked(was, scores, [5, 2], 0.7, True, 1)
    # In steps of 3, the odd one and then three at a time, but one by one before nothing is left.
    nine = [[torch.ones(1), torch.arange(1.0, 8.0)]]
    assert ranked([Shape(1, 7)], nine, [5, 2], 0.1, False, 3) == [Shape(1, 6)]
    assert ranked([Shape(1, 7)], nine, [5, 2], 0.2, False, 3) == [Shape(1, 3)]
    assert ranked([Shape(1, 7)], nine, [5, 2], 0.5, False, 3) == [Shape(1, 2)]


# The same examples each time: a failure here is one that can be looked at.
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["llama", "gpt2"]),
    groups=st.integers(1, 4),
    repeat=st.integers(1, 3),
    channels=st.integers(1, 70),
    tied=st.booleans(),
    ratio=st.integers(1, 99),
    iterations=st.integers(1, 30),
    spread=st.sampled_from(["uniform", "global"]),
    importance=st.sampled_from(["reconstruction", "activation", "magnitude", "taylor"]),
    heads=st.booleans(),
)
def test_any_ratio_gives_the_promised_number_of_weights(
    tmp_path_factory,
    kind,
    groups,
    repeat,
    channels,
    tied,
    ratio,
    iterations,
    spread,
    importance,
    heads,
):
    if kind == "llama":
        groups = 2 if (groups, repeat) == (3, 3) else groups  # 9 heads do not divide 48
        model = llama(2, groups, repeat, 16, channels, tied, bias=repeat == 3)
    else:
        model = gpt2(2, groups, 8 * repeat, channels, tied)
    width = model.get_input_embeddings().weight.shape[1]
    bias = kind == "gpt2" or repeat == 3
    if kind == "llama":
        group = 16 * (2 * repeat + 2) * width + bias * 16 * (repeat + 2)
        channel = 3 * width + bias * 2
    else:
        group, channel = 8 * repeat * (4 * width + 3), 2 * width + 1
    was, fixed = 2 * (groups * group + channels * channel), numbers(model)
    fixed -= was
    method = compress.get(
        "prune_structured",
        ratio=ratio / 100,
        iterations=iterations,
        spread=spread,
        importance=importance,
        heads=heads,
        round_to=8,
    )
    least = 2 * ((1 if heads else groups) * group + channel)
    possible = math.floor((1 - ratio / 100) * was + 1e-6) >= least
    try:
        model = method.compress(model, ids())
    except ValueError as error:
        assert "leaves a block nothing" in str(error)
        assert not possible
        return
    assert possible
    left = numbers(model) - fixed
    assert left == sum(s.groups * group + s.channels * channel for s in shapes(model))
    step = max(group * 2, 2 * 8 * channel)
    assert left <= (1 - ratio / 100) * was + 1e-6
    assert left > (1 - ratio / 100) * was - step
    round_trip(model, tmp_path_factory.mktemp("made") / "m")
