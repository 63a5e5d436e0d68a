"""Layers of codes while they are trained: scales and biases move, codes and zeros stay.

A code is a whole number and has no gradient; the scale beside it has one, and is all that the
layer can still learn without being rounded again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dynamic_linear import Int8DynamicLinear
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear


class ScaledCodes(nn.Module):
    """y = x (scale * (code - zero) + offset)^T + bias, scale and bias in float32 with gradients.

    trained: False where the codes are an embedding's too, which has no such layer.
    """

    def __init__(self, layer: QuantLinear, trained: bool):
        super().__init__()
        self.held = [layer]  # no part of this module: its tensors are not trained
        self.scale = nn.Parameter(layer.scale.float(), trained)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.float(), trained)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        (layer,) = self.held
        codes, zero = layer.codes_and_zero()
        columns, size = codes.shape[1], layer.group_size

        def spread(groups: Tensor) -> Tensor:
            return groups.repeat_interleave(size, 1)[:, :columns]

        weight = (codes.float() - spread(zero.float())) * spread(self.scale)
        if layer.offset is not None:
            weight = weight + spread(layer.offset.float())
        if layer.order is not None:
            x = x.index_select(-1, layer.order)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def closed(self) -> QuantLinear:
        """The layer, with what was learnt in the type that it stores. Codes are the same."""
        (layer,) = self.held
        layer.scale = self.scale.detach().to(layer.scale.dtype)
        if self.bias is not None and layer.bias is not None:
            layer.bias = self.bias.detach().to(layer.bias.dtype)
        layer.as_stored()
        return layer


def open_codes(model: Any) -> None:
    """Put a ScaledCodes where each QuantLinear of `model` stands.

    Raises ValueError, naming it, for a layer that rounds its inputs: that has no gradient either.
    """
    tables = [each.table for each in model.modules() if isinstance(each, QuantEmbedding)]
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Int8DynamicLinear):
            raise ValueError(f"{name} rounds its inputs: nothing can be trained through it")
        if isinstance(layer, QuantLinear) and not name.endswith(".table"):
            shared = any(layer is table for table in tables)
            model.set_submodule(name, ScaledCodes(layer, trained=not shared))


def close_codes(model: Any) -> None:
    """Put the layers back, with what was learnt. Raises ValueError for a scale not finite."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ScaledCodes):
            if not torch.isfinite(layer.scale).all():
                raise ValueError(f"{name}: a scale is not finite any more; lower learning_rate")
            model.set_submodule(name, layer.closed())
