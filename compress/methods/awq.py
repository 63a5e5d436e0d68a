"""AWQ: scale up the input channels that matter before rounding, and undo it in the layer before.

Rounding errors of a weight column count in proportion to the size of the inputs it meets. AWQ
multiplies column j by s[j] and divides input j by it: the function is unchanged, but the rounding
error of column j shrinks by about s[j]. s = (mean |x|) ** alpha, with or without a division by
(mean relative |w|) ** (1 - alpha); a grid search picks alpha by the squared output error. Dividing
the input costs nothing, since 1 / s folds into the norm (or the v or up projection) before. Then
the groups' ranges are shrunk to the least output error; unlike the paper, which looks at each group
alone and leaves those of queries and keys, in sweeps that see what the other groups err.

Everything is measured through H = E[x x^T]: the output error of a change D is tr(D H D^T), so
the search needs no forward pass. The scale of an attention output is shared by the query heads
that read one key-value head, which makes the fold exact under grouped-query attention as well.
A layer behind GELU (GPT-2's mlp.c_proj) cannot be scaled exactly; only its ranges are fitted.

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023, https://arxiv.org/abs/2306.00978
"""

from collections.abc import Iterator
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
from compress.output_error import fit_codes, output_error
from compress.quant_linear import QuantLinear
from compress.quant_math import check_grid, fit_range, grouped, rounded
from compress.registry import register
from compress.vocabulary import check_head_bits, finish

ROWS = 192  # of a weight, worked on at a time in the search: what fits in the processor's cache


@dataclass(frozen=True)
class Awq(Compressor):
    """Quantize every linear layer of the decoder blocks.

    bits: 2, 3, 4 or 8. group_size: inputs of a row that share a scale; -1 for the whole row.
    symmetric: no zero is stored. grid: number of values of alpha tried, 0 up to below 1; 0 means
    no scaling. sweeps: how often each group's range is shrunk anew to the least output error, the
    other groups' errors in view, before scales are fitted to the codes; 0 does neither.
    skip: layers whose dotted name in the block ends in one of these stay in floating point.
    head_bits: of embedding and head, see vocabulary.py; none leaves them in floating point.
    dtype: type of scales, of everything left alone, and of the arithmetic.
    """

    needs_calibration: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    grid: int = 20
    sweeps: int = 3
    skip: tuple[str, ...] = SKIP
    head_bits: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_grid(self.bits, self.group_size)
        check_dtype(self.dtype)
        check_head_bits(self.head_bits)
        if not 0 <= self.grid <= 1000:
            raise ValueError(f"grid must be between 0 and 1000, not {self.grid}")
        if not 0 <= self.sweeps <= 100:
            raise ValueError(f"sweeps must be between 0 and 100, not {self.sweeps}")

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Quantize `model` in place, block by block, and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no
        sense, or if a weight is not finite.
        """
        refuse_no_effect(model, self.skip)
        calibrate.run(model, calibration, self.solve_groups, "block", progress)
        return finish(model, DTYPES[self.dtype], self.head_bits, self.group_size)

    def solve_groups(self, groups: list[Group]) -> dict[str, nn.Module]:
        """Scale the block of `groups` in place, then give the quantized layers."""
        self.scale_groups(groups)
        replaced: dict[str, nn.Module] = {}
        for group in groups:
            for name, layer in group.chosen(self.skip).items():
                replaced[name] = self.quantize(layer, group.gram)
        return replaced

    def scale_groups(self, groups: list[Group]) -> None:
        """Scale the block of `groups` in place; its weights become float32."""
        own_weights(groups)
        for group in groups:
            if self.grid:
                self.scale(group)

    def scale(self, group: Group) -> None:
        """Choose s for `group`, multiply it into the layers, divide it out of what is before.

        The block's function stays the same; group.gram becomes that of the divided input.
        """
        target = Before.of(group)
        if target is None:
            return
        layers = group.chosen().values()
        weights = [layer.weight for layer in layers]
        # Each layer counts by its error relative to its own output: q and k would drown v.
        energy = [output_error(weight, group.gram) for weight in weights]
        best, least = torch.ones_like(group.magnitude), torch.inf
        for s in self.candidates(target.shared(group.magnitude), target.shared(evenness(weights))):
            error = sum(
                output_error(self._rounded(rows * s) / s - rows, group.gram) / (whole or 1.0)
                for weight, whole in zip(weights, energy, strict=True)
                for rows in weight.split(ROWS)
            )
            if error < least:
                best, least = s, error
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight * best, False)
        target.divide(best)
        group.gram /= best[:, None] * best

    def candidates(self, magnitude: Tensor, even: Tensor) -> Iterator[Tensor]:
        """The scales s, (in,), that the search tries; all positive, centred on 1.

        magnitude: mean |x| of each channel. even: see evenness.
        """
        magnitude, even = magnitude.clamp(min=1e-8), even.clamp(min=1e-8)
        for step in range(self.grid):
            alpha = step / self.grid
            for s in (magnitude**alpha, magnitude**alpha / even ** (1 - alpha)):
                yield (s / (s.max() * s.min()).sqrt()).clamp(min=1e-4)

    def quantize(self, layer: nn.Linear, gram: Tensor) -> QuantLinear:
        """Codes on ranges that the sweeps found, with scales fitted to them, see fit_codes."""
        dtype = DTYPES[self.dtype]
        codes, scale, zero = fit_codes(
            layer.weight, gram, self.group_size, self.bits, self.symmetric, dtype, self.sweeps
        )
        return QuantLinear.from_codes(
            codes.to(torch.uint8),
            scale,
            None if self.symmetric else zero,
            layer.bias,
            self.bits,
            self.group_size,
            dtype=dtype,
        )

    def _rounded(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) as plain rounding to the grid leaves it."""
        groups = grouped(weight, self.group_size)
        dtype = DTYPES[self.dtype]
        scale, zero = fit_range(groups, self.bits, self.symmetric, dtype)
        return rounded(groups, scale, zero, self.bits).flatten(1)[:, : weight.shape[1]]


def evenness(weights: list[Tensor]) -> Tensor:
    """Mean of |w| over the largest |w| of its row, (in,): channels with small weights are low.

    Multiplying such a channel up costs little, since it does not stretch the range of its group.
    """
    shares = [w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-12) for w in weights]
    return torch.cat(shares).mean(0)


register("awq", Awq())
