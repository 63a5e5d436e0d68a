"""Small floating-point formats: `fp8_e4m3`, `fp8_e5m2`, `fp6_e3m2`, `fp6_e2m3`, `fp4_e2m1`.

A value is (-1)^sign * 2^exponent * 1.mantissa, with subnormals below the least exponent. Rounding
goes to the nearest value, ties to the even mantissa, and saturates: what lies beyond the largest
value, infinity included, becomes the largest value (the saturating conversion of the OCP
standards). NaN stays NaN. Zeros keep their sign.

fp8_e4m3 is the OCP format that has no infinity and one NaN per sign (ml_dtypes calls it
float8_e4m3fn): its largest value is 448. fp8_e5m2 has infinities, which saturation never makes.
The formats of 6 and 4 bits have neither infinity nor NaN.

Source: P. Micikevicius et al., "FP8 Formats for Deep Learning", 2022,
https://arxiv.org/abs/2209.05433, and B. D. Rouhani et al., "Microscaling Data Formats for Deep
Learning", 2023, table 1, https://arxiv.org/abs/2310.10537
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

FLOAT32_BIAS, FLOAT32_MANTISSA_BITS = 127, 23
EXPONENT_FIELD = 0xFF << FLOAT32_MANTISSA_BITS


@dataclass(frozen=True)
class Minifloat:
    """One sign bit, exponent_bits, mantissa_bits; the exponent bias is that of IEEE 754.

    largest: the largest finite value, which depends on what codes are spent on infinity and NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float

    tapered: ClassVar[bool] = False
    asymmetric: ClassVar[bool] = False
    mx_scales: ClassVar[bool] = True

    @property
    def least_exponent(self) -> int:
        """Of the normal numbers: 1 - bias."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def round(self, values: Tensor) -> Tensor:
        """Nearest representable value of each float32; see the module for ties and the ends.

        The step between neighbours of x is 2^(exponent of x - mantissa_bits), and no finer than
        that of the least exponent. It is a power of two, so dividing by it is exact, and torch
        rounds halves to even: the step's multiples are the mantissas.
        """
        clamped = values.clamp(-self.largest, self.largest)
        # The exponent field alone, read as a float32, is the power of two at or below |x|.
        bits = clamped.view(torch.int32).bitwise_and(EXPONENT_FIELD)
        least = (self.least_exponent + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS
        bits.clamp_(min=least).sub_(self.mantissa_bits << FLOAT32_MANTISSA_BITS)
        step = bits.view(torch.float32)
        return clamped.div_(step).round_().mul_(step)

    def values(self) -> Tensor:
        """All finite values, ascending, float32, zero once."""
        codes = np.arange(2 ** (self.exponent_bits + self.mantissa_bits))
        exponent, mantissa = codes >> self.mantissa_bits, codes % 2**self.mantissa_bits
        whole = np.where(exponent > 0, mantissa + 2**self.mantissa_bits, mantissa)
        power = np.maximum(exponent, 1) - 1 + self.least_exponent - self.mantissa_bits
        positive = np.ldexp(whole.astype(np.float64), power)
        positive = positive[positive <= self.largest]  # above stand infinity and NaN
        both = np.concatenate([-positive[:0:-1], positive])
        return torch.from_numpy(both.astype(np.float32))


MINIFLOATS = (
    Minifloat("fp8_e4m3", 4, 3, 448.0),
    Minifloat("fp8_e5m2", 5, 2, 57344.0),
    Minifloat("fp6_e3m2", 3, 2, 28.0),
    Minifloat("fp6_e2m3", 2, 3, 7.5),
    Minifloat("fp4_e2m1", 2, 1, 6.0),
)
