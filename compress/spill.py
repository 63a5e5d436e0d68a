"""Lists of tensors that move to disk when they outgrow memory: the inputs of a decoder block."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Limit:
    """Bytes that stores sharing this may still hold in memory."""

    left: int


class Store:
    """A list of tensors: in memory while the limit lasts, on disk beyond it."""

    def __init__(self, folder: Path, limit: Limit):
        self.folder, self.limit, self.held = folder, limit, 0
        self.tensors: list[Tensor] = []

    def like(self) -> "Store":
        """An empty store with the same folder, sharing the same limit."""
        return Store(self.folder, self.limit)

    def append(self, tensor: Tensor) -> None:
        """Keep a tensor. Raises OSError if neither memory nor disk is left for it."""
        size = tensor.numel() * tensor.element_size()
        if size <= self.limit.left:
            self.limit.left -= size
            self.held += size
            self.tensors.append(tensor)
            return
        handle, path = tempfile.mkstemp(dir=self.folder)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(handle, 0, size)  # a full disk: an error now, no crash later
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps the bytes until the tensor is dropped
        self.tensors.append(mapped.view(tensor.shape).copy_(tensor))

    def put(self, index: int, tensor: Tensor) -> None:
        """Replace tensor `index`, where it lies; or append it as the next one."""
        if index == len(self.tensors):
            self.append(tensor)
        else:
            self.tensors[index].copy_(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __del__(self) -> None:
        self.limit.left += self.held
