"""spill: so many bytes in memory and the rest on disk, one limit for all, nothing left behind."""

import pytest
import torch

from compress import spill
from compress.spill import Limit, Store


def hundred(value):
    """400 bytes."""
    return torch.full((10, 10), float(value))


def test_a_store_holds_no_more_than_its_limit(tmp_path):
    limit = Limit(1000)
    store = Store(tmp_path, limit)
    for value in range(5):
        store.append(hundred(value))  # two fit
    store.put(4, hundred(9))
    store.put(5, hundred(7))
    assert (store.held, limit.left) == (800, 200)
    assert [tensor[0, 0].item() for tensor in store] == [0, 1, 2, 3, 9, 7]
    assert all(tensor.shape == (10, 10) for tensor in store)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, even by a crash


def test_stores_share_one_limit_and_give_it_back(tmp_path):
    limit = Limit(1000)
    first = Store(tmp_path, limit)
    second = first.like()
    assert second.limit is limit and list(second) == []
    first.append(hundred(1))
    second.append(hundred(2))
    second.append(hundred(3))  # on disk
    assert (first.held, second.held, limit.left) == (400, 400, 200)
    assert [tensor[0, 0].item() for tensor in second] == [2, 3]
    del second
    assert limit.left == 600
    first.append(hundred(4))
    assert (first.held, limit.left) == (800, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_from_disk_bit_for_bit(tmp_path, dtype):
    store = Store(tmp_path, Limit(0))
    tensor = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    store.append(tensor.transpose(0, 2))
    (kept,) = store
    assert store.held == 0 and kept.dtype == dtype
    assert torch.equal(kept, tensor.transpose(0, 2))


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    store = Store(tmp_path, Limit(0))
    with pytest.raises(OSError, match="No space left"):
        store.append(hundred(1))
    assert list(store) == [] and list(tmp_path.iterdir()) == []
