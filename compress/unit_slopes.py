"""How the loss leans on every unit: the first-order importance of pruning.

Scale a unit's output by a gate g. The loss without the unit is, to first order, lower by dL/dg at
g = 1, which is the sum of weight times gradient over the unit's columns of the layer behind it. The
importance is the mean of its square over the samples.

Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, eq. 8,
https://arxiv.org/abs/1906.10771
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.block_shapes import by_unit, halves, units
from compress.calibrate import checked_ids
from compress.layers import decoder_blocks, family

SAMPLES = 16  # of the calibration: forward and backward through the whole model each


def slopes(model: Any, calibration: Tensor | None) -> list[list[Tensor]]:
    """The importance of every unit, (units,) float32, of each block's attention and MLP.

    calibration: (samples, tokens) int64, of which the first SAMPLES are used. Raises ValueError if
    it is missing or makes no sense.
    """
    layout = family(model)
    ends: list[list[Any]] = [
        [(block.get_submodule(half.output), units(block, layout, half)) for half in halves(layout)]
        for _, block in decoder_blocks(model)
    ]
    found = [[torch.zeros(count) for _, count in block] for block in ends]
    weights: list[Any] = [layer.weight for block in ends for layer, _ in block]
    samples = checked_ids(calibration, model.config)[:SAMPLES]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for ids in samples.split(1):
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            gradients = iter(torch.autograd.grad(loss, weights))
            for block, sums in zip(ends, found, strict=True):
                for (layer, count), total in zip(block, sums, strict=True):
                    products = (layer.weight.detach() * next(gradients)).float().sum(0)
                    total += by_unit(products, count).sum((0, 2)).square() / len(samples)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return found
