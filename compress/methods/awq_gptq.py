"""AWQ's scales, then GPTQ's rounding: channels that matter scaled up, errors absorbed.

Scaling moves rounding error away from the channels with large inputs; error feedback moves what is
left into columns still to be rounded. The two do not compete: scales are chosen by the error of
plain rounding, before the first column is rounded, and fold into the layer before; H of the
divided input is that of the input, divided. `awq` says how the scales are found, `gptq` how the
columns are rounded and the ranges shrunk.

Source: J. Lin et al., "AWQ", 2023, https://arxiv.org/abs/2306.00978;
E. Frantar et al., "GPTQ", 2022, Algorithm 1, https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass

from torch import nn

from compress.layer_inputs import Group
from compress.methods.awq import Awq
from compress.methods.gptq import Gptq
from compress.registry import register


@dataclass(frozen=True)
class AwqGptq(Gptq):
    """The settings of `gptq`, and `awq`'s grid: the number of values of alpha tried; 0: no scaling.

    Scaling changes the layer before, so all groups of a block see inputs of its float layers:
    true_sequential has to be false.
    """

    true_sequential: bool = False
    grid: int = 20

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        super().__post_init__()
        self.awq()
        if self.true_sequential:
            raise ValueError("scales change the layer before: true_sequential has to be false")

    def awq(self) -> Awq:
        """The method that finds the scales."""
        return Awq(self.bits, self.group_size, self.symmetric, self.grid, dtype=self.dtype)

    def solve_groups(self, groups: list[Group]) -> dict[str, nn.Module]:
        """Scale the block of `groups` in place, then give the quantized layers."""
        self.awq().scale_groups(groups)
        return super().solve_groups(groups)


register("awq_gptq", AwqGptq())
