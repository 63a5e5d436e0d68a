"""Change the floating-point type, nothing else: `none` (the float32 parent) and `cast`.

`none` is the reference of every table: it goes through save and load like the rest. `cast`
stores and computes in bfloat16 (or float16), which halves the file; what a compressed model
gains over `cast` is what its method gains.

Source: D. Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019,
https://arxiv.org/abs/1905.12322
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layers import cast_parameters
from compress.registry import register


@dataclass(frozen=True)
class Cast(Compressor):
    """dtype: float32, bfloat16 or float16, for every parameter."""

    takes: ClassVar[tuple[str, ...]] = ("floats", "factors")
    leaves: ClassVar[str] = ""

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown dtype."""
        check_dtype(self.dtype)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Convert the parameters in place. Raises ValueError if one is not finite then."""
        return cast_parameters(model, DTYPES[self.dtype])


register("none", Cast(dtype="float32"))
register("cast", Cast(dtype="bfloat16"))
