"""Posits: floating point whose precision tapers away from 1, `posit8_1` or `posit(n,es)`.

After the sign come a run of equal bits (the regime k, ended by the opposite bit), es exponent
bits e and the fraction f: the value is useed^k * 2^e * (1 + f), useed = 2^(2^es). Bits that do
not fit are cut and read as 0. Two codes are special: 0, and NaR, "not a real".

Rounding acts on the bit string. Between neighbours u and w of n bits lies one posit of n + 1 bits,
u with a 1 appended: below it inputs go to u, above it to w, and a tie goes to the even code. Where
the fraction has bits left that point is the middle; where the exponent bits are cut it is the
geometric mean. Nothing rounds to 0 or to NaR: beyond maxpos inputs saturate there, and what is
smaller than minpos but not 0 becomes minpos. NaN and infinity, which are NaR, come back as NaN.

Source: Posit Working Group, "Standard for Posit Arithmetic (2022)", sections 3 and 4,
https://posithub.org/docs/posit_standard-2.pdf (there es is always 2; `posit(8,1)` and the like
follow J. Gustafson and I. Yonemoto, "Beating Floating Point at its Own Game", 2017,
https://doi.org/10.14529/jsfi170206)
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from finetune.low_precision.minifloat import FLOAT32_BIAS, FLOAT32_MANTISSA_BITS

BITS = range(3, 17)


@dataclass(frozen=True)
class Posit:
    """bits: n, 3 to 16. exponent_bits: es, as long as every value fits float32."""

    bits: int
    exponent_bits: int

    tapered: ClassVar[bool] = True
    asymmetric: ClassVar[bool] = False
    mx_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError on a size that is not offered."""
        if self.bits not in BITS or self.exponent_bits < 0:
            raise ValueError(f"{self.name}: n must be 3 to 16 and es at least 0")
        if (self.bits - 2) * 2**self.exponent_bits > 126:
            raise ValueError(f"{self.name}: values do not fit float32; choose a smaller es")

    @property
    def name(self) -> str:
        """How a person writes it, without brackets."""
        return f"posit{self.bits}_{self.exponent_bits}"

    @property
    def largest(self) -> float:
        """maxpos = useed^(n - 2); minpos is its reciprocal."""
        return 2.0 ** ((self.bits - 2) * 2**self.exponent_bits)

    def round(self, values: Tensor) -> Tensor:
        """The posit that the standard's rounding gives for each float32; see the module.

        The bits of a float32 are its exponent and fraction in one fixed-point number t. In t the
        regime is what stands left of e and f, and within a regime the posits are evenly spaced,
        2^shift apart, with the ties halfway between, whether fraction or exponent bits are cut. So
        t is rounded to a multiple of 2^shift, halves to even codes, and read as a float32 again.
        """
        tail_bits = self.exponent_bits + FLOAT32_MANTISSA_BITS  # of t, for e and f
        # A code is even as t / 2^shift is; where no tail bit is left (next to minpos and maxpos)
        # that is the parity of the regime, which is right for odd n: even n count from 1 more.
        extra = 1 - self.bits % 2
        zero = (FLOAT32_BIAS << FLOAT32_MANTISSA_BITS) - (extra << tail_bits)
        magnitude = values.abs().clamp_(1 / self.largest, self.largest)
        t = magnitude.view(torch.int32).sub_(zero)
        regime = (t >> tail_bits).sub_(extra)
        # The run of k + 1 ones or -k zeros and the bit that ends it: (k or ~k) + 2 bits.
        shift = (regime ^ (regime >> 31)).add_(tail_bits + 3 - self.bits).clamp_(max=tail_bits)
        odd = (t >> shift).bitwise_and_(1)
        half = torch.ones_like(t).bitwise_left_shift_(shift - 1)
        t.add_(half).sub_(1).add_(odd)
        t.bitwise_right_shift_(shift).bitwise_left_shift_(shift).add_(zero)
        # The sign of 0 is 0; values - values is 0, but NaN where a value was not finite.
        return t.view(torch.float32).mul_(values.sign()).add_(values - values)

    def values(self) -> Tensor:
        """All values, ascending, float32, zero included, NaR not."""
        positive = positive_values(self.bits, self.exponent_bits)
        both = np.concatenate([-positive[::-1], [0.0], positive])
        return torch.from_numpy(both.astype(np.float32))


def positive_values(bits: int, exponent_bits: int) -> np.ndarray:
    """Values of the codes 1 to 2^(n - 1) - 1, which ascend with the code: float64, exact."""
    runs = []
    for regime in range(2 - bits, bits - 1):
        length = regime + 2 if regime >= 0 else 1 - regime  # the run and the bit that ends it
        rest = max(bits - 1 - length, 0)
        tail = np.arange(2**rest) << max(exponent_bits - rest, 0)  # bits that were cut are 0
        fraction_bits = max(rest - exponent_bits, 0)
        fraction = np.ldexp((tail % 2**fraction_bits).astype(np.float64), -fraction_bits)
        exponent = regime * 2**exponent_bits + (tail >> fraction_bits)
        runs.append(np.ldexp(1 + fraction, exponent))
    return np.concatenate(runs)
