"""Dynamic post-training quantization: int8 weights times int8 activations, or float16 weights.

Weights get one symmetric int8 scale a row, once. Activations get a scale and a zero of their own
for each token, at run time, so no calibration is needed. The product runs on integer kernels.
Per-tensor dynamic quantization, which many tutorials recommend, fails on language models: one
outlier channel takes all the codes. Rows and tokens of their own keep the damage local.
`dynamic_fp16` stores half-precision weights and computes in float32.

Source: T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
2022, section 3 (vector-wise quantization), https://arxiv.org/abs/2208.07339
Differs from it in two points: no float16 path for outlier features, and activations have a zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.dynamic_linear import Float16Linear, Int8DynamicLinear
from compress.layers import SKIP, replace_linears
from compress.methods.int8_weight import int8_codes, int8_scale
from compress.registry import register
from compress.vocabulary import check_head_bits, finish

WEIGHTS = ("int8", "float16")


@dataclass(frozen=True)
class Dynamic(Compressor):
    """weights: int8 (with int8 activations) or float16 (activations stay as they are).

    skip: layers whose dotted name ends in one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic outside the products.
    """

    weights: str = "int8"
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}")
        check_dtype(self.dtype)
        check_head_bits(self.head_bits)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Replace every Linear outside `skip` in place and return `model`.

        Raises ValueError if a weight is not finite, or if no layer was replaced (GPT-2's Conv1D
        left as they are would be the well-known way to change nothing).
        """
        replace_linears(model, self.skip, self.quantize, progress)
        return finish(model, DTYPES[self.dtype], self.head_bits)

    def quantize(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """(out, in) float32 -> the layer that takes its place."""
        dtype = DTYPES[self.dtype]
        if self.weights == "float16":
            half = weight.to(torch.float16)
            if not half.isfinite().all():
                raise ValueError("a weight is too large for float16")
            return Float16Linear(half, None if bias is None else bias.detach().to(dtype))
        scale, zero = int8_scale(weight, True, dtype)
        codes = int8_codes(weight, scale, zero) + 128  # stored unsigned
        return Int8DynamicLinear.from_codes(
            codes.to(torch.uint8), scale, None, bias, bits=8, group_size=-1, dtype=dtype
        )


register("dynamic", Dynamic(weights="int8"))
register("dynamic_fp16", Dynamic(weights="float16", dtype="float32"))
