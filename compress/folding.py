"""Moving a factor of each channel from a layer's input into the layer before, function unchanged.

What AWQ and SmoothQuant share: a column j of a weight times s[j] and input j divided by s[j] is the
same product, and the division costs nothing where the norm or the linear layer before takes it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.layer_inputs import Group
from compress.layers import named_finite


def own_weights(groups: list[Group]) -> None:
    """Give the layers of `groups` float32 weights that nothing else shares.

    Raises ValueError, naming the layer, if one is not finite.
    """
    for group in groups:
        for name, layer in group.chosen().items():
            layer.weight = nn.Parameter(named_finite(name, layer), False)


@dataclass
class Before:
    """The parameters before a group's input, and how their channels meet its input channels.

    Dividing channel c of `parameters` by s[c] divides the group's input channels by `s` of the
    same index, where the input is `heads` runs of `repeat` copies of `width` channels.
    """

    parameters: list[Tensor]  # each with the channels along its first axis
    heads: int
    repeat: int
    width: int

    @classmethod
    def of(cls, group: Group) -> "Before | None":
        """What is before `group`; None where a non-linearity forbids an exact fold."""
        channels = len(group.gram)
        if group.names == group.half.inputs:
            norm: Any = group.block.get_submodule(group.half.norm)
            return cls(_owned(norm), 1, 1, channels)
        if group.half.before_output is None:
            return None
        before: Any = group.block.get_submodule(group.half.before_output)
        parameters = _owned(before)
        if len(parameters[0]) >= channels:  # the last rows: GPT-2's c_attn holds q, k and v
            return cls([p[-channels:] for p in parameters], 1, 1, channels)
        attention: Any = group.block.get_submodule(group.half.module)
        width = attention.head_dim
        heads = len(parameters[0]) // width  # key-value heads
        return cls(parameters, heads, channels // len(parameters[0]), width)

    def shared(self, magnitude: Tensor) -> Tensor:
        """Mean of `magnitude` over the input channels that one parameter channel feeds."""
        runs = magnitude.view(self.heads, self.repeat, self.width)
        return runs.mean(1, keepdim=True).expand_as(runs).reshape(-1)

    def divide(self, s: Tensor) -> None:
        """Divide by s, (in,), equal over shared channels."""
        per_channel = s.view(self.heads, self.repeat, self.width)[:, 0].reshape(-1)
        for parameter in self.parameters:
            parameter.div_(per_channel if parameter.dim() == 1 else per_channel[:, None])


def _owned(module: nn.Module) -> list[Tensor]:
    """Weight and bias of `module`, made float32 and writable."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().float().clone(), False))
    return [parameter.data for parameter in module.parameters(recurse=False)]
