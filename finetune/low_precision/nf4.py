"""NF4: the 16 quantiles of a normal distribution that QLoRA stores weights as, `nf4`.

Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E,
https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CELLS = 16  # per unit: borders lie at least 0.08 apart, so that a cell holds one at most


@dataclass(frozen=True)
class NormalFloat4:
    """Values between -1 and 1, densest near 0, with an exact zero; code 0 .. 15 is the position."""

    name: ClassVar[str] = "nf4"
    largest: ClassVar[float] = 1.0
    tapered: ClassVar[bool] = False
    asymmetric: ClassVar[bool] = False
    mx_scales: ClassVar[bool] = False

    def round(self, values: Tensor) -> Tensor:
        """Nearest of the 16, float32, ties to the even code; saturates; NaN and infinity give NaN.

        A look-up of the cell tells how many borders lie below it and which one may lie in it: one
        comparison with that one decides. Ten times faster than a binary search of the borders.
        """
        levels, below, border = (part.to(values.device) for part in TABLES)
        flat = values.flatten()
        cell = cell_of(flat)
        index = below.index_select(0, cell).add_(flat > border.index_select(0, cell))
        # flat - flat is 0, but NaN where the value was not finite: a look-up cannot tell.
        return levels.index_select(0, index).add_(flat - flat).view(values.shape)

    def values(self) -> Tensor:
        """All 16 values, ascending, float32."""
        return torch.tensor(VALUES)


def cell_of(values: Tensor) -> Tensor:
    """Which cell of width 1 / CELLS a value lies in, int32; never falls as the value rises."""
    return values.add(1).mul_(CELLS).clamp_(0, 2 * CELLS).nan_to_num_().to(torch.int32)


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """The values, and for each cell the number of borders in the cells below, and its border."""
    values = np.array(VALUES, dtype=np.float32)
    ties = (values[:-1].astype(np.float64) + values[1:]) / 2  # exact
    borders = ties.astype(np.float32)
    # The greatest float32 that goes to the lower value; an exact tie does if that code is even.
    too_high = (borders > ties) | ((borders == ties) & (np.arange(15) % 2 == 1))
    borders = np.where(too_high, np.nextafter(borders, np.float32(-2)), borders)
    cells = cell_of(torch.from_numpy(borders)).numpy()
    below = np.searchsorted(cells, np.arange(2 * CELLS + 1)).astype(np.int32)
    border = np.full(2 * CELLS + 1, np.inf, dtype=np.float32)
    border[cells] = borders
    return torch.from_numpy(values), torch.from_numpy(below), torch.from_numpy(border)


TABLES = _tables()
