"""Number formats of a few bits, by name: rounding float32 to the nearest value each can hold.

    formats.get("fp8_e4m3").round(torch.tensor([0.3]))   # 0.3125

Names: int8_sym, int8_asym, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1, nf4, posit8_1 and
every other posit(n,es), also written positN_ES. A format knows nothing of scales: see scaling.py.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from compress.registry import did_you_mean
from finetune.low_precision.minifloat import MINIFLOATS
from finetune.low_precision.nf4 import NormalFloat4
from finetune.low_precision.posit import Posit


class Format(Protocol):
    """What every format offers.

    largest: the largest value; -largest is the smallest, except in an asymmetric format.
    tapered: most precise near 1, so that scales aim there. asymmetric: a code other than 0 may
    stand for 0.0. mx_scales: scales that are powers of two are defined for it.
    """

    tapered: ClassVar[bool]
    mx_scales: ClassVar[bool]

    @property
    def name(self) -> str:
        """As `get` takes it."""
        ...

    @property
    def largest(self) -> float:
        """See the class."""
        ...

    @property
    def asymmetric(self) -> bool:
        """See the class."""
        ...

    def round(self, values: Tensor) -> Tensor:
        """Nearest representable value of each float32, ties to the even code, NaN for NaN."""
        ...

    def values(self) -> Tensor:
        """All representable values, ascending, float32."""
        ...


@dataclass(frozen=True)
class Int8:
    """Whole numbers, ties to even, saturating: -127 .. 127, or -128 .. 127 where asymmetric.

    Symmetric leaves -128 unused, so that the codes of x and -x mirror each other.
    """

    asymmetric: bool

    largest: ClassVar[float] = 127.0
    tapered: ClassVar[bool] = False
    mx_scales: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """int8_sym or int8_asym."""
        return "int8_asym" if self.asymmetric else "int8_sym"

    def round(self, values: Tensor) -> Tensor:
        """Nearest whole number within the range; infinity saturates, NaN stays."""
        return values.round().clamp_(-128 if self.asymmetric else -127, 127)

    def values(self) -> Tensor:
        """All representable values, ascending, float32."""
        return torch.arange(-128 if self.asymmetric else -127, 128, dtype=torch.float32)


_NAMED: tuple[Format, ...] = (
    *(Int8(asymmetric=False), Int8(asymmetric=True)),
    *MINIFLOATS,
    *(Posit(8, 1), NormalFloat4()),
)
FORMATS: dict[str, Format] = {format.name: format for format in _NAMED}


def get(name: str) -> Format:
    """The format `name`. Raises ValueError, with the nearest names, if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    if posit := re.fullmatch(r"posit(?:(\d{1,2})_(\d)|\((\d{1,2}), ?(\d)\))", name):
        bits, exponent_bits = (int(part) for part in posit.groups() if part)
        return Posit(bits, exponent_bits)
    raise ValueError(f"no number format {name!r}; {did_you_mean(name, [*FORMATS, 'posit(n,es)'])}")
