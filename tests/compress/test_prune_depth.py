"""prune_depth: the block that does nothing goes, by each criterion; by loss as by brute force."""

import pytest
import torch

import compress
from compress import checkpoint
from compress.layers import decoder_blocks

IDS = torch.randint(0, 257, (4, 24), generator=torch.Generator().manual_seed(0))


def loss(model):
    logits = model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten()))


@pytest.mark.parametrize("criterion", ["influence", "angle"])
@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_block_that_adds_nothing_goes(criterion, idle, tiny_llama):
    model = checkpoint.load(tiny_llama)
    names = [block for _, block in decoder_blocks(model)]
    for layer in (names[idle].self_attn.o_proj, names[idle].mlp.down_proj):
        layer.weight.data = torch.zeros_like(layer.weight)
    before = model(IDS).logits
    small = compress.apply(f"prune_depth(criterion={criterion})", model, IDS)
    left = [block for _, block in decoder_blocks(small)]
    assert left == names[:idle] + names[idle + 1 :]
    torch.testing.assert_close(small(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert small.config.num_hidden_layers == 2
    assert [block.self_attn.layer_idx for block in left] == [0, 1]


def test_by_loss_is_brute_force(tiny_llama):
    """One after the other, each time the block without which the whole model's loss is least."""
    expected, alive = [], [0, 1, 2]
    for _ in range(2):
        losses = {}
        for gone in alive:
            model = checkpoint.load(tiny_llama)
            blocks = model.model.layers
            stay = [number for number in alive if number != gone]
            model.model.layers = torch.nn.ModuleList(blocks[number] for number in stay)
            model.config.num_hidden_layers = len(stay)
            losses[gone] = loss(model)
        expected.append(min(losses.values()))
        alive.remove(min(losses, key=losses.get))
        small = compress.apply(
            f"prune_depth(blocks={len(expected)})", checkpoint.load(tiny_llama), IDS
        )
        assert loss(small) == pytest.approx(expected[-1], rel=1e-5)


def test_refusals(tiny_llama):
    with pytest.raises(ValueError, match="blocks=3 leaves none of 3"):
        compress.apply("prune_depth(blocks=3)", checkpoint.load(tiny_llama), IDS)
    with pytest.raises(ValueError, match="criterion"):
        compress.get("prune_depth", criterion="size")
    with pytest.raises(ValueError, match="blocks"):
        compress.get("prune_depth", blocks=0)
