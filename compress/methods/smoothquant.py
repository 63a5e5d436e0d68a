"""SmoothQuant: move outliers from activations into weights, then 8 bits for both: `smoothquant`.

A few input channels of a language model are many times larger than the others and leave those few
codes. Column j of a weight times s[j], and input j divided by s[j], is the same product; with
s = max|x| ** alpha / max|w| ** (1 - alpha) both sides carry a share of the difficulty. The division
folds into the norm, or the linear layer, before; a layer behind GELU stays as it is. Then weights
get one symmetric scale a row and activations one scale and zero a token at run time, as in
`dynamic`. The paper smooths only behind norms; here the last layer of each half is smoothed too
where that is exact.

Source: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022, equations 3 and 4, https://arxiv.org/abs/2211.10438
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.folding import Before, own_weights
from compress.layer_inputs import Group
from compress.layers import SKIP, refuse_no_effect
from compress.methods.dynamic import Dynamic
from compress.registry import register
from compress.vocabulary import check_head_bits, finish


@dataclass(frozen=True)
class SmoothQuant(Compressor):
    """Smooth every linear layer of the decoder blocks, then make it int8 times int8.

    alpha: share of the outliers that moves into the weights, 0 (none) to 1 (all).
    skip: layers whose dotted name in the block ends in one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic outside the products.
    """

    needs_calibration: ClassVar[bool] = True

    alpha: float = 0.5
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")
        check_dtype(self.dtype)
        check_head_bits(self.head_bits)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Quantize `model` in place, block by block, and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no
        sense, or if a weight is not finite.
        """
        refuse_no_effect(model, self.skip)
        calibrate.run(model, calibration, self.solve_groups, "block", progress)
        return finish(model, DTYPES[self.dtype], self.head_bits)

    def solve_groups(self, groups: list[Group]) -> dict[str, nn.Module]:
        """Smooth the block of `groups` in place, then give the quantized layers."""
        own_weights(groups)
        for group in groups:
            self.smooth(group)
        make = Dynamic(dtype=self.dtype)
        return {
            name: make.quantize(layer.weight.detach(), layer.bias)
            for group in groups
            for name, layer in group.chosen(self.skip).items()
        }

    def smooth(self, group: Group) -> None:
        """Multiply s into the layers of `group` and divide it out of what is before."""
        before = Before.of(group)
        if before is None:
            return
        layers = list(group.chosen().values())
        weight = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
        s = self.factors(before.shared(group.largest), before.shared(weight))
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight * s, False)
        before.divide(s)

    def factors(self, largest: Tensor, weight: Tensor) -> Tensor:
        """s, (in,), from the largest |x| and |w| of each channel; 1 where a channel is unused."""
        used = (largest > 0) & (weight > 0)
        s = largest.clamp(min=1e-5) ** self.alpha / weight.clamp(min=1e-5) ** (1 - self.alpha)
        return torch.where(used, s, 1.0)


register("smoothquant", SmoothQuant())
