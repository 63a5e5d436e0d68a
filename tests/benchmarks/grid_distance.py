"""How far a model's weights are from a 4-bit grid: 4-bit results on a grid flatter every method.

    python tests/benchmarks/grid_distance.py MODEL...

Rounds every matrix of the decoder to 16 levels between the least and the largest weight of each
32 of a row, and prints the median and the range over matrices of the relative error. It is 0 for
weights that come from a 4-bit file with such groups, 0.078 for Gaussian ones.
"""

import statistics
import sys

import torch
from torch import Tensor, nn

import compress
from bench import models
from compress.layers import decoder_blocks
from compress.quant_math import grouped


def relative_error(weight: Tensor) -> float:
    """|rounded - weight| / |weight| of round to nearest in groups of 32, least value kept."""
    groups = grouped(weight.float(), 32)
    low = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-12)
    change = torch.round((groups - low) / step) * step + low - groups
    return (change.norm() / groups.norm()).item()


def main() -> None:
    """See the top of this file."""
    for name in sys.argv[1:]:
        errors = [
            relative_error(layer.weight)
            for _, block in decoder_blocks(compress.load(models.resolve(name).folder))
            for layer in block.modules()
            if isinstance(layer, nn.Linear)
        ]
        median = statistics.median(errors)
        print(f"{name}: {median:.4f} ({min(errors):.4f} to {max(errors):.4f})")


if __name__ == "__main__":
    main()
