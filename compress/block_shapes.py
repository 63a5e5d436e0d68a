"""How many heads and MLP channels each decoder block has, and blocks with fewer of them.

A unit is what can go from a half of a block and leave the rest in working order: of attention the
query heads that share keys and values, with these (a single head where none are shared); of the
MLP one channel. Its weights are rows of the half's input layers and columns of its output layer,
nothing else: that is the whole dependency graph of both model families.

Where config.json can say the shapes, it does, and the folder is an ordinary one. Blocks that
differ, GPT-2's with fewer heads (its config has no width of a head), and Llama's with a number that
does not divide the hidden size (transformers refuses it) are in compression.json as `blocks`, one
[units of attention, channels] a block, none larger than what config.json says.
"""

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers import Family, Half, decoder_blocks, family, linear_of


@dataclass(frozen=True)
class Shape:
    """Units of a decoder block: groups of heads that share keys, channels of the MLP."""

    groups: int
    channels: int


def halves(layout: Family) -> tuple[Half, Half]:
    """Attention and MLP, in the order of Shape's fields."""
    return layout.attention, layout.mlp


def head_width(block: Any, layout: Family) -> int:
    """Numbers of a query of one head."""
    return int(block.get_submodule(layout.attention.module).head_dim)


def units(block: Any, layout: Family, half: Half) -> int:
    """How many units `half` of `block` has."""
    if half is layout.mlp:
        return int(block.get_submodule(half.output).in_features)
    values = block.get_submodule(half.inputs[-1])
    return int(values.out_features) // (half.parts * head_width(block, layout))


def shape_of(block: Any, layout: Family) -> Shape:
    """The units of `block`."""
    return Shape(*(units(block, layout, half) for half in halves(layout)))


def shapes(model: Any) -> list[Shape]:
    """The units of every block. Raises ValueError for a model type that is not known."""
    layout = family(model)
    return [shape_of(block, layout) for _, block in decoder_blocks(model)]


def unit_weights(block: Any, layout: Family, half: Half) -> int:
    """Numbers, biases of rows too, that go with one unit of `half`."""
    count = units(block, layout, half)
    rows = 0
    for name in half.inputs:
        layer = block.get_submodule(name)
        rows += layer.out_features // count * (layer.in_features + (layer.bias is not None))
    output = block.get_submodule(half.output)
    return rows + output.in_features // count * output.out_features


def by_unit(tensor: Tensor, count: int, parts: int = 1) -> Tensor:
    """(rows, ...) of a layer of `half.inputs` -> (parts, units, rows a unit, ...)."""
    return tensor.unflatten(0, (parts, count, -1))


def keep_units(block: Any, layout: Family, half: Half, keep: Tensor) -> None:
    """Leave `half` of `block` with the units `keep` only, in place.

    keep: (n,) int64, ascending; at least one.
    """
    count = units(block, layout, half)

    def kept(rows: Tensor, parts: int) -> Tensor:
        return by_unit(rows.detach(), count, parts)[:, keep].flatten(0, 2)

    for name in half.inputs:
        layer = block.get_submodule(name)
        bias = None if layer.bias is None else kept(layer.bias, half.parts)
        block.set_submodule(name, _like(layer, kept(layer.weight, half.parts), bias))
    output = block.get_submodule(half.output)
    columns = kept(output.weight.T, 1).T
    block.set_submodule(half.output, _like(output, columns, output.bias))
    _tell(block, layout)


def _like(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of the same class with other tensors."""
    made = linear_of(type(layer), weight.contiguous(), bias)
    return made.requires_grad_(layer.weight.requires_grad)


def _tell(block: Any, layout: Family) -> None:
    """GPT-2's attention keeps its sizes besides its layers."""
    attention: Any = block.get_submodule(layout.attention.module)
    if hasattr(attention, "split_size"):
        attention.num_heads = units(block, layout, layout.attention)
        attention.split_size = attention.num_heads * attention.head_dim


def keep_blocks(model: Any, keep: list[int]) -> None:
    """Leave `model` with the blocks `keep` only, in place; caches count them anew."""
    layout = family(model)
    blocks = model.get_submodule(layout.blocks)
    left = nn.ModuleList([blocks[number] for number in keep])
    for number, block in enumerate(left):
        attention: Any = block.get_submodule(layout.attention.module)
        attention.layer_idx = number
    model.set_submodule(layout.blocks, left)
    settle(model)


def settle(model: Any) -> None:
    """Make model.config say what its blocks are, as far as it can: no size less than a block's."""
    found, config = shapes(model), model.config
    groups, channels = (max(each) for each in zip(*map(astuple, found), strict=True))
    if config.model_type == "gpt2":
        config.n_inner = channels
    else:
        config.head_dim = head_width(decoder_blocks(model)[0][1], family(model))
        repeat = config.num_attention_heads // config.num_key_value_heads
        if config.hidden_size % (groups * repeat) == 0:  # transformers reads no other number
            config.num_key_value_heads, config.num_attention_heads = groups, groups * repeat
        config.intermediate_size = channels
    config.num_hidden_layers = len(found)


def unsaid(model: Any) -> list[list[int]] | None:
    """What compression.json must say of the blocks; None where config.json says it."""
    output = decoder_blocks(model)[0][1].get_submodule(family(model).mlp.output)
    if not hasattr(output, "in_features"):  # transformers' own Conv1D, which nothing here reshapes
        return None
    found = shapes(model)
    return None if found == _said(model) else [list(astuple(shape)) for shape in found]


def _said(model: Any) -> list[Shape]:
    """The shapes that transformers makes of model.config."""
    config = model.config
    if config.model_type == "gpt2":
        shape = Shape(config.n_head, config.n_inner or 4 * config.n_embd)
    else:
        shape = Shape(config.num_key_value_heads, config.intermediate_size)
    return [shape] * config.num_hidden_layers


def reshape(model: Any, blocks: Any) -> None:
    """Give an empty model, as config.json describes it, the blocks of compression.json.

    blocks: what `unsaid` gave, from an untrusted file. Raises ValueError if it makes no sense.
    """
    layout, named = family(model), decoder_blocks(model)
    most = shapes(model)
    if not isinstance(blocks, list) or len(blocks) != len(named):
        raise ValueError(f"'blocks' must list the sizes of {len(named)} blocks")
    for number, sizes in enumerate(blocks):
        bound = astuple(most[number])
        fits = isinstance(sizes, list) and len(sizes) == len(bound)
        if not fits or any(
            type(size) is not int or not 0 < size <= limit
            for size, limit in zip(sizes, bound, strict=True)
        ):
            raise ValueError(f"'blocks': {sizes!r} is not a shape within {list(bound)}")
        for half, size in zip(halves(layout), sizes, strict=True):
            keep_units(named[number][1], layout, half, torch.arange(size))
