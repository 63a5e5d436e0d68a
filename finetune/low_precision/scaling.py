"""Quantize and rebuild: a number format together with what shares a scale.

Values that share a scale s become s * round(x / s). The scale brings the largest magnitude of its
values to the largest value of the format. Posits differ: a posit is most precise near 1 and
reaches far beyond what a tensor needs, so that the largest magnitude at maxpos would leave the bulk
of the values where few bits remain; their scale is the root mean square of the values that are
not 0, which brings the bulk to 1. int8_asym stretches its codes over lowest .. highest instead.

With `pow2` scales are powers of two, chosen as the OCP microscaling standard does: the exponent of
the largest magnitude minus that of the format's largest value. A magnitude may then exceed the
format's largest by less than a factor of two and saturates. For posits it is the power nearest to
the root mean square. Scales stay normal float32 numbers; values that are all 0 stay 0.

A NaN or an infinity makes all values that share its scale NaN: the loss shows it.

Source: B. D. Rouhani et al., "Microscaling Data Formats for Deep Learning", 2023, section 3 and
algorithm 1, https://arxiv.org/abs/2310.10537
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.int8_weight import int8_codes, int8_scale
from compress.quant_math import grouped, stored_scale
from finetune.low_precision import formats
from finetune.low_precision.formats import Format
from finetune.low_precision.minifloat import FLOAT32_BIAS, FLOAT32_MANTISSA_BITS

GRAMMAR = "FORMAT[:tensor|row|blockN][:pow2]"
GRANULARITIES = ("tensor", "row", "block")


@dataclass(frozen=True)
class Quantizer:
    """format: how a value is rounded. granularity: what shares a scale: the tensor, a row (the
    last axis: an output channel's weights, a token's activations) or a block along the last axis.

    block: values in a block, 0 for other granularities; a last block may be short.
    power_of_two: scales are powers of two.
    """

    format: Format
    granularity: str = "row"
    block: int = 0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on settings that make no sense."""
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"granularity must be one of {known}, not {self.granularity!r}")
        if (self.block >= 2) != (self.granularity == "block"):
            raise ValueError(f"a block must hold at least 2 values, not {self.block}")
        if self.power_of_two and (self.format.asymmetric or not self.format.mx_scales):
            raise ValueError(f"{self.format.name} takes no power-of-two scales; leave out pow2")

    @classmethod
    def parse(cls, text: str) -> "Quantizer":
        """Read FORMAT[:tensor|row|blockN][:pow2], such as fp8_e4m3:block32:pow2; default is row.

        Raises ValueError on anything else, with what would be right.
        """
        name, *parts = text.strip().split(":")
        form = formats.get(name.strip())
        power_of_two = parts[-1:] == ["pow2"]
        rest = parts[:-1] if power_of_two else parts
        granularity = ":".join(rest) if rest else "row"
        match = re.fullmatch(r"(tensor|row)|block(\d{1,9})", granularity)
        if not match:
            raise ValueError(f"cannot read {granularity!r} in {text!r}; write {GRAMMAR}")
        if match[1]:
            return cls(form, match[1], 0, power_of_two)
        return cls(form, "block", int(match[2]), power_of_two)

    def __str__(self) -> str:
        """The full text that `parse` reads back."""
        size = str(self.block) if self.granularity == "block" else ""
        return f"{self.format.name}:{self.granularity}{size}{':pow2' * self.power_of_two}"

    def __call__(self, values: Tensor) -> Tensor:
        """`values` as the format holds them, rebuilt; same shape and type."""
        return self.quantize(values)[0]

    def quantize(self, values: Tensor, mark: bool = False) -> tuple[Tensor, Tensor | None]:
        """Rebuilt values, and, if asked by `mark`, True where a value was not saturated.

        Both have the shape of `values`; the mark is None where the scale rules saturation out.
        """
        groups = self._grouped(values.detach().float())
        if self.format.asymmetric:
            scale, zero = int8_scale(groups, False, torch.float32)
            rebuilt = int8_codes(groups, scale, zero).sub_(zero).mul_(scale)
            return self._ungrouped(rebuilt, values).to(values.dtype), None
        scale = self.scale(groups)
        scaled = groups / scale
        inside = None
        if mark and (self.power_of_two or self.format.tapered):
            inside = self._ungrouped(scaled.abs() <= self.format.largest, values)
        rebuilt = self.format.round(scaled).mul_(scale)
        return self._ungrouped(rebuilt, values).to(values.dtype), inside

    def scale(self, groups: Tensor) -> Tensor:
        """(..., n) float32 values that share a scale -> scale (..., 1), float32 and above 0.

        Not for int8_asym, whose scale comes with a zero.
        """
        size = root_mean_square(groups) if self.format.tapered else largest_magnitude(groups)
        if not self.power_of_two:
            divisor = 1.0 if self.format.tapered else self.format.largest
            return stored_scale(size / divisor, torch.float32)
        if self.format.tapered:
            return power_of_two(size * math.sqrt(2), 0)  # floor(log2 x + 1/2): to the nearest
        return power_of_two(size, math.floor(math.log2(self.format.largest)))

    def _grouped(self, values: Tensor) -> Tensor:
        """Values that share a scale along the last axis; a last block is filled with zeros."""
        if self.granularity == "tensor":
            return values.reshape(1, -1)
        rows = values.reshape(-1, values.shape[-1])
        return grouped(rows, self.block) if self.granularity == "block" else rows

    def _ungrouped(self, groups: Tensor, values: Tensor) -> Tensor:
        """The inverse of `_grouped`."""
        if self.granularity == "block":
            groups = groups.flatten(1)[:, : values.shape[-1]]
        return groups.reshape(values.shape)


def largest_magnitude(groups: Tensor) -> Tensor:
    """(..., n) -> (..., 1); NaN where a value is NaN."""
    # Two reductions run 20 times faster than torch.aminmax along an axis.
    return torch.maximum(-groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))


def root_mean_square(groups: Tensor) -> Tensor:
    """(..., n) -> (..., 1), float32: over the values that are not 0, and 0 if all are.

    Zeros are exact in every format and so ask nothing of the scale. Squares are taken of shares of
    the largest magnitude, which neither overflow nor vanish.
    """
    largest = stored_scale(largest_magnitude(groups), torch.float32)
    total = (groups / largest).square_().sum(-1, keepdim=True)
    count = torch.count_nonzero(groups, dim=-1).unsqueeze(-1).clamp(min=1)
    return largest * (total / count).sqrt_()


def power_of_two(size: Tensor, exponent: int) -> Tensor:
    """2^(floor(log2 size) - exponent), exact, within the normal float32 numbers; NaN for NaN.

    floor(log2 size) is the exponent field of the float32 number.
    """
    field = (size.view(torch.int32) >> FLOAT32_MANTISSA_BITS) - exponent
    power = (field.clamp_(1, 2 * FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS).view(torch.float32)
    return torch.where(size.isfinite(), power, torch.nan)
