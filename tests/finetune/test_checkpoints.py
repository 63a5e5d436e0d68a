"""Checkpoints: slices that make a whole, damage that is named."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.training import checkpoints
from finetune.training.parallel import Place, slice_of

ALONE = Place(0, 1, torch.device("cpu"), "none")


def trained(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_what_was_saved_comes_back_bit_for_bit_and_training_goes_on_alike(tmp_path):
    model, optimizer = trained(0)
    checkpoints.save(tmp_path, 3, model, optimizer, ALONE)
    other, other_optimizer = trained(1)
    other[1].bias.data.copy_(model[1].bias)
    checkpoints.newest(tmp_path).restore(other, other_optimizer, ALONE)
    x = torch.randn(4, 3)
    for network, opt in ((model, optimizer), (other, other_optimizer)):
        opt.zero_grad()
        network(x).square().sum().backward()
        opt.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_the_newest_are_kept_and_frozen_parameters_are_not_saved(tmp_path):
    model, optimizer = trained(0)
    for step in (5, 10, 15, 1_000_000):
        checkpoints.save(tmp_path, step, model, optimizer, ALONE)
    assert [f.name for f in checkpoints.found(tmp_path)] == ["step-000015", "step-1000000"]
    assert set(checkpoints.newest(tmp_path).parameters()) == {"0.weight", "0.bias", "1.weight"}
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_slices_of_two_processes_are_put_together(tmp_path):
    """5 rows over 2 processes: 3 and 2, as torch.chunk and fsdp cut them."""
    whole = torch.arange(10.0).view(5, 2)
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    for rank in range(2):
        mine = slice_of(whole, Place(rank, 2, torch.device("cpu"), "fsdp"))
        assert len(mine) == 3 - rank
        save_file({"model:w": mine.contiguous()}, folder / f"part-{rank}-of-2.safetensors")
    state = {"version": 1, "step": 1, "parts": 2, "cut": {"model:w": [5, 2]}}
    (folder / "state.json").write_text(json.dumps(state))
    assert torch.equal(checkpoints.newest(tmp_path).parameters()["w"], whole)
    (folder / "part-1-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-000001 is damaged.*goes on from the one before"):
        checkpoints.newest(tmp_path)


def test_fewer_rows_than_processes():
    parts = [slice_of(torch.ones(2, 4), Place(r, 3, torch.device("cpu"), "fsdp")) for r in range(3)]
    assert [len(part) for part in parts] == [1, 1, 0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(0)
    checkpoints.save(tmp_path, 3, model, optimizer, ALONE)
    other = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"shape \(5, 3\), not \(6, 3\)"):
        checkpoints.newest(tmp_path).restore(other, torch.optim.AdamW(other.parameters()), ALONE)


def test_half_a_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoints" / ".step-000009.part").mkdir(parents=True)
    assert checkpoints.newest(tmp_path) is None
