"""Linear layers that read the same input, joined into one: rows below rows, nothing rounded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.dense_linear import DenseLinear
from compress.int4_layout import BLOCK
from compress.kernel_choice import kernel_for
from compress.quant_linear import GRID, QuantLinear
from compress.sparse_linear import SparseLinear


def fused(
    parent: nn.Module, names: Sequence[str], dtype: torch.dtype, own: bool
) -> Callable[[Tensor], Tensor]:
    """One function for the layers `names` of `parent`, their outputs side by side.

    dtype: of their input. own: the layers are ours, and become views into the joined one, so that
    no weight is held twice; else each is called as it is.
    """
    layers: list[Any] = [getattr(parent, name) for name in names]
    if own and all(type(layer) is type(layers[0]) for layer in layers):
        first = layers[0]
        if isinstance(first, SparseLinear):
            return _dense([layer.plain() for layer in layers])
        if isinstance(first, nn.Linear):
            return _dense(layers)
        if isinstance(first, QuantLinear) and (joined := _quantized(layers, dtype)):
            return joined.forward
    if len(layers) == 1:
        return layers[0].forward if own else layers[0]
    return lambda x: torch.cat([layer(x) for layer in layers], -1)


def _dense(layers: list[nn.Linear]) -> DenseLinear:
    """Plain layers as one; each keeps a view of its rows."""
    if len(layers) == 1:
        return DenseLinear(layers[0].weight, layers[0].bias)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    start = 0
    for layer in layers:
        layer.weight = nn.Parameter(weight[start : start + layer.out_features], False)
        start += layer.out_features
    return DenseLinear(weight, _biases(layers, weight.dtype))


def _quantized(layers: list[QuantLinear], dtype: torch.dtype) -> QuantLinear | None:
    """Layers of one grid as one; None if grids differ or columns are reordered."""
    first = layers[0]
    if len(layers) == 1:
        return first
    starts = [sum(layer.out_features for layer in layers[:index]) for index in range(len(layers))]
    alike = all(
        all(getattr(layer, name) == getattr(first, name) for name in GRID)
        and layer.order is None
        and (layer.offset is None) == (first.offset is None)
        and layer.scale.dtype == first.scale.dtype
        and start % BLOCK == 0  # or an int4 layout could not be cut there
        for layer, start in zip(layers, starts, strict=True)
    )
    if not alike:
        return None
    codes, scale, zero, offset = (
        torch.cat(parts) for parts in zip(*(layer.per_row() for layer in layers), strict=True)
    )
    joined = type(first)(
        codes,
        scale,
        None if all(layer.zero is None for layer in layers) else zero,
        _biases(layers, first.scale.dtype),
        first.bits,
        first.group_size,
        first.in_features,
        offset=None if first.offset is None else offset,
    )
    kernel_for(joined, 1, dtype)  # may lay the codes out anew
    for layer, start in zip(layers, starts, strict=True):
        layer.look_into(joined, start)
    return joined


def _biases(layers: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    """The layers' biases one after the other, with the zeros that None means; None if all are."""
    if all(layer.bias is None for layer in layers):
        return None
    none = [torch.zeros(layer.out_features, dtype=dtype) for layer in layers]
    pairs = zip(layers, none, strict=True)
    return torch.cat([zeros if layer.bias is None else layer.bias for layer, zeros in pairs])
