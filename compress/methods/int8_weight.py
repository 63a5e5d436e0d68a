"""INT8 weight-only quantization, written out by hand: `int8_sym` and `int8_asym`.

A weight w is stored as an 8-bit code q and rebuilt as scale * (q - zero). Symmetric fixes
zero = 0 and spends codes -127 .. 127 on the largest magnitude. Asymmetric stretches -128 .. 127
over low .. high, scale = (high - low) / 255, so that weights leaning to one side use all codes.
One scale serves a whole tensor, one output row (the default) or a group of inputs of a row.
Only linear layers change; embeddings, norms, biases and the head stay in floating point.

Source: R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference: A whitepaper", 2018, "Quantizer design", https://arxiv.org/abs/1806.08342
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layers import SKIP, replace_linears
from compress.quant_linear import QuantLinear
from compress.quant_math import check_grid, grouped, stored_scale
from compress.registry import register
from compress.vocabulary import check_head_bits, finish

GRANULARITIES = ("tensor", "row", "group")


@dataclass(frozen=True)
class Int8Weight(Compressor):
    """Replace every Linear outside `skip` by a QuantLinear. Needs no calibration data.

    symmetric: codes in [-127, 127] and zero = 0; otherwise codes in [-128, 127].
    granularity: what shares one scale: tensor, row, or group (of group_size inputs).
    skip: layers whose dotted name ends in one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic.
    """

    symmetric: bool = True
    granularity: str = "row"
    group_size: int = 64
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"granularity must be one of {known}, not {self.granularity!r}")
        check_grid(8, self.group_size)
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
        shared = self._shared(weight)
        scale, zero = int8_scale(shared, self.symmetric, DTYPES[self.dtype])
        codes = int8_codes(shared, scale, zero) + 128  # stored unsigned
        rows = codes.reshape(len(weight), -1)[:, : weight.shape[1]]
        return QuantLinear.from_codes(
            rows.to(torch.uint8),
            scale[..., 0],
            None if self.symmetric else (zero[..., 0] + 128).to(torch.uint8),
            bias,
            bits=8,
            group_size=self.group_size if self.granularity == "group" else -1,
            dtype=DTYPES[self.dtype],
        )

    def _shared(self, weight: Tensor) -> Tensor:
        """(out, in) -> (scales, scales of a row, weights that share one scale)."""
        if self.granularity == "tensor":
            return weight.reshape(1, 1, -1)
        return grouped(weight, self.group_size if self.granularity == "group" else -1)


def int8_scale(shared: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero for weights that share them along the last axis.

    shared: (..., n) float32. Returns scale (..., 1) > 0, float32 already rounded to `dtype`, and
    zero (..., 1), a whole number in [-128, 127]: the code that means 0.0 exactly.
    """
    if symmetric:  # -128 stays unused, so that the codes of w and -w mirror each other
        scale = stored_scale(shared.abs().amax(-1, keepdim=True) / 127, dtype)
        return scale, torch.zeros_like(scale)
    # The range must contain 0, or `zero` would fall outside the 8-bit codes.
    low = shared.amin(-1, keepdim=True).clamp(max=0)
    high = shared.amax(-1, keepdim=True).clamp(min=0)
    scale = stored_scale((high - low) / 255, dtype)
    zero = torch.round(-128 - low / scale).clamp(-128, 127)
    return scale, zero


def int8_codes(shared: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes in [-128, 127], whole numbers held in float32, shape of `shared`.

    With scale and zero from `int8_scale` in float32, |weight - scale * (code - zero)| <= scale / 2
    up to rounding of the arithmetic; an all-zero row rebuilds to zeros.
    """
    return (torch.round(shared / scale) + zero).clamp(-128, 127)


register("int8_sym", Int8Weight(symmetric=True))
register("int8_asym", Int8Weight(symmetric=False))
