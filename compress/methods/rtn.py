"""Round to nearest: the grid of GPTQ and AWQ without what makes them clever. `rtn`, `rtn_clip`.

Each group of weights gets its scale and zero from its own minimum and maximum, and every weight
goes to the nearest code. `clip=true` searches for the range with the least squared error of the
weights instead. The baseline to beat: same grid, same packing, no calibration data.

Source: E. Frantar et al., "GPTQ", 2022, section 4 (the RTN baseline),
https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layers import SKIP, replace_linears
from compress.quant_linear import QuantLinear
from compress.quant_math import check_grid, fit_range, grouped, to_codes
from compress.registry import register
from compress.vocabulary import check_head_bits, finish


@dataclass(frozen=True)
class Rtn(Compressor):
    """Replace every Linear outside `skip` by a QuantLinear.

    bits: 2, 3, 4 or 8. group_size: inputs of a row that share a scale; -1 for the whole row.
    symmetric: no zero is stored. clip: shrink each range to the least squared error.
    skip: layers whose dotted name ends in one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = False
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_grid(self.bits, self.group_size)
        check_dtype(self.dtype)
        check_head_bits(self.head_bits)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Quantize `model` in place and return it.

        Raises ValueError if a weight is not finite, or if no layer was replaced.
        """
        replace_linears(model, self.skip, self.quantize, progress)
        return finish(model, DTYPES[self.dtype], self.head_bits, self.group_size)

    def quantize(self, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        """(out, in) float32 -> the quantized layer."""
        groups = grouped(weight, self.group_size)
        dtype = DTYPES[self.dtype]
        scale, zero = fit_range(groups, self.bits, self.symmetric, dtype, self.clip)
        codes = to_codes(groups, scale, zero, self.bits).flatten(1)[:, : weight.shape[1]]
        return QuantLinear.from_codes(
            codes.to(torch.uint8),
            scale[..., 0],
            None if self.symmetric else zero[..., 0],
            bias,
            self.bits,
            self.group_size,
            dtype=dtype,
        )


register("rtn", Rtn())
register("rtn_clip", Rtn(clip=True))
