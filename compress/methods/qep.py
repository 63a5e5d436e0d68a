"""QEP: GPTQ towards what the float model puts out, not towards what the layer makes of its input.

By the time a layer W is quantized, layers before it are, and its input x is no longer the float
model's input f. Least squares for the outputs W f on the inputs x asks for
W + W E[(f - x) x^T] H^-1, with H = E[x x^T] damped as GPTQ damps it. All of that fits the noise of
the calibration text as well, so `strength` of it is taken; GPTQ then quantizes that weight.

Source: Y. Arai and Y. Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise
Post-Training Quantization", 2025, https://arxiv.org/abs/2504.09629
Differs from it in two points: the last layer of each half of a block (attention's output, the
MLP's) adds to the residual stream, which has drifted as well, so its target is the sum of both; and
the GPTQ is that of `gptq`, with the differences named there. The authors' program leaves out the
MLP's last layer unless it is told otherwise.
"""

from dataclasses import dataclass

from torch import Tensor

from compress.layer_inputs import Group
from compress.methods.gptq import Gptq
from compress.registry import register


@dataclass(frozen=True)
class Qep(Gptq):
    """The settings of `gptq`, and strength: share of the correction, 0 (gptq) to 1 (all of it).

    damping tames the correction as well as the feedback of errors. Inputs have to be those of the
    layers already quantized: true_sequential has to be true. The float model's inputs are computed
    and held beside them.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {self.strength}")
        if not self.true_sequential:
            raise ValueError("inputs drift as layers are quantized: true_sequential has to be true")

    def mode(self) -> str:
        """See Gptq."""
        return "drift" if self.strength else super().mode()

    def drift(self, weight: Tensor, group: Group) -> Tensor | None:
        """A share of what the layer's input and the residual stream have drifted by."""
        return self.strength * group.drift(weight) if self.strength else None


register("qep", Qep())
