"""Random tensors by seed, and how far one tensor is from another: for tests of numbers."""

import torch


def random(*shape, seed, dtype=torch.float32):
    """Standard normal numbers, drawn in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(a, b):
    """The norm of the difference, relative to that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
