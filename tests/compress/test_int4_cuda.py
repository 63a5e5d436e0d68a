"""int4_cuda on a stand-in for torch's CUDA kernel: another order of tiles, the same arithmetic."""

import pytest
import torch
from comparing import random, relative

from compress import int4_cuda, int4_layout, kernels
from compress.methods.rtn import Rtn


def packed(both, tiles):
    """As torch describes its order: (rows / 8, in / (16 tiles), 32, tiles / 2) of int32."""
    assert both.dtype == torch.uint8 and both.is_contiguous() and tiles in (2, 4, 8)
    rows, columns = both.shape[0], 2 * both.shape[1]
    assert rows % 8 == 0 and columns % (16 * tiles) == 0
    codes = torch.stack((both >> 4, both & 15), -1).view(rows, columns)
    # Tiles of 8 rows and 16 * tiles inputs; inside them any order will do that says which it is.
    tiled = codes.view(rows // 8, 8, columns // (16 * tiles), 16 * tiles).transpose(1, 2)
    eights = tiled.reshape(rows // 8, columns // (16 * tiles), 32, tiles // 2, 8).long()
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def product(x, words, size, grid):
    """What the kernel computes: (code - 8) * scale + offset, rounded once to bfloat16."""
    rows, tiles = 8 * words.shape[0], 2 * words.shape[3]
    columns = 16 * tiles * words.shape[1]
    assert x.dtype == grid.dtype == torch.bfloat16 and x.is_contiguous() and grid.is_contiguous()
    assert grid.shape == (columns // size, rows, 2) and size in (32, 64, 128, 256)
    codes = (words[..., None].long() >> torch.arange(0, 32, 4)) & 15
    codes = codes.view(rows // 8, words.shape[1], 8, 16 * tiles).transpose(1, 2)
    codes = codes.reshape(rows, columns)
    scale, offset = (part.repeat_interleave(size, 0).T.double() for part in grid.unbind(-1))
    return (x.double() @ ((codes - 8) * scale + offset).T).bfloat16()


@pytest.fixture
def on_cuda(monkeypatch):
    """CPU tensors take the way of CUDA's."""
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", packed)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", product)
    monkeypatch.setattr(int4_layout, "pack", padded)
    monkeypatch.setattr(int4_layout, "is_known", int4_cuda.is_known)
    int4_cuda.is_known.cache_clear()
    yield
    int4_cuda.is_known.cache_clear()


def padded(codes):
    return int4_cuda.pack(torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 16)))


@pytest.mark.parametrize("rows, columns", [(16, 32), (48, 64), (96, 1152)])
def test_codes_come_back(on_cuda, rows, columns):
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    words = int4_cuda.pack(codes)
    assert words.shape[0] == rows // 8 and words.dtype == torch.int32
    assert torch.equal(int4_layout.unpack(words, 0, rows), codes.T)
    numbers = torch.tensor([3, rows - 1, 0])
    assert torch.equal(int4_layout.rows(words, numbers), codes[numbers])
    assert int4_cuda.is_known(torch.device("cpu"))


def test_an_order_that_is_not_understood_is_not_used(on_cuda, monkeypatch):
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda b, t: packed(b.flip(0), t))
    assert not int4_cuda.is_known(torch.device("cpu"))
    layer = Rtn().quantize(random(96, 128, seed=0), None)
    assert not kernels.fits_int4pack(layer, torch.bfloat16)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (3, False), (2, True)])
@pytest.mark.parametrize("rows", [90, 96])
def test_a_layer_held_for_cuda_means_the_same_weights(on_cuda, bits, symmetric, rows):
    layer = Rtn(bits=bits, symmetric=symmetric).quantize(random(rows, 128, seed=0), None)
    x, twin = random(20, 128, seed=1).bfloat16(), layer.twin()
    assert kernels.fits_int4pack(layer, torch.bfloat16)
    kernels.prepare_int4pack(twin)
    assert twin.codes.ndim == 4
    exact = x.double() @ layer.weight(torch.float64).T
    assert relative(kernels.int4pack(twin, x), exact) < 0.004
    assert torch.equal(twin.weight(), layer.weight())
    assert torch.equal(twin.state_dict()["codes"], layer.state_dict()["codes"])
    assert relative(kernels.rebuild(twin, x, torch.float32), exact) < 0.004


def test_rows_of_a_joined_layer(on_cuda):
    whole = Rtn().quantize(random(192, 128, seed=0), None)
    part = Rtn().quantize(random(64, 128, seed=1), None)
    kernels.prepare_int4pack(whole)
    part.look_into(whole, 128)
    x = random(2, 128, seed=2).bfloat16()
    assert torch.equal(kernels.int4pack(part, x), kernels.int4pack(whole, x)[:, 128:])
