"""Random tensors by seed, and how far one tensor is from another: for tests of numbers."""

import torch


def random(*shape, seed, dtype=torch.float32):
    """Standard normal numbers, drawn in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(a, b):
    """The norm of the difference, relative to that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def layer_and_gram(rows=24, columns=96, seed=0):
    """A weight and the Gram matrix of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(1000, columns, generator=generator) @ mixing * size
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)
