"""Rotary angles, norm, gate and GELU of decoder.py, each in few operations of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Rotary:
    """Cosines and signed sines of all positions so far, as the model's own module gives them.

    A channel c turns with c + width / 2: x * cos + roll(x, width / 2) * (-sin | sin).
    """

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device):
        self.module, self.dtype, self.device = module, dtype, device
        self.cos = self.sin = torch.empty(0)

    def at(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions start to stop, (seq, 1, width) each."""
        if stop > len(self.cos):
            positions = torch.arange(2 * stop, device=self.device)[None]
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            cos, sin = self.module(like, positions)
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self.cos, self.sin = cos[0, :, None], signed[0, :, None]
        return self.cos[start:stop], self.sin[start:stop]


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, as the LayerNorm of (x, -x), which has mean zero.

    torch fuses LayerNorm on a CPU and not this: a third of the time for one token.
    """

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight.detach(), eps
        self.twice = torch.cat((weight, weight)).detach()

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        both = torch.cat((x, -x), -1)
        y = torch.layer_norm(both, self.twice.shape, self.twice, None, self.eps)
        return y.narrow(-1, 0, len(self.weight)).contiguous()  # some libraries' kernels insist


class GatedUnit:
    """silu(gate) * up of the two halves of its input."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., 2 * inner) -> (..., inner)."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)


class Gelu:
    """GELU by erf ("none") or by tanh."""

    def __init__(self, approximate: str):
        self.approximate = approximate

    def __call__(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return F.gelu(x, approximate=self.approximate)
