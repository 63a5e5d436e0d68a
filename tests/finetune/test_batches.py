"""Windows: every token once an epoch, in an order that depends on nothing but seed and step."""

import numpy as np
import pytest
import torch

from finetune.text.token_file import TokenWriter
from finetune.training.batches import Windows, evaluation_windows


@pytest.fixture
def numbers(tmp_path):
    """A file of the tokens 0, 1, 2 ... 999, so that a token is its own place."""
    with TokenWriter(tmp_path / "n.tokens", 1000, tokenizer_sha256="", sources=[]) as writer:
        writer.append(np.arange(1000), documents=1)
        return writer.finish()


def test_a_window_is_consecutive_and_targets_are_the_next_tokens(numbers):
    batches = Windows(numbers, 50, batch=4, micro_batch=3, seed=0).micro_batches(7, 0, 1)
    assert [tuple(batch.ids.shape) for batch in batches] == [(3, 50), (1, 50)]
    for batch in batches:
        assert torch.equal(batch.targets, batch.ids + 1)
        assert torch.equal(batch.ids - batch.ids[:, :1], torch.arange(50).expand_as(batch.ids))


def test_an_epoch_holds_every_window_once_and_the_next_another_order(numbers):
    windows = Windows(numbers, 50, batch=6, micro_batch=6, seed=3)
    assert windows.count == 18 and windows.steps_per_epoch == 3
    epochs, offsets = [], set()
    for epoch in range(2):
        starts = [
            int(row[0])
            for step in range(3 * epoch, 3 * epoch + 3)
            for row in windows.micro_batches(step, 0, 1)[0].ids
        ]
        offset = min(starts)
        assert sorted(starts) == [offset + 50 * i for i in range(18)] and offset < 50
        epochs.append(starts)
        offsets.add(offset)
    assert epochs[0] != epochs[1] and len(offsets) == 2


def test_processes_share_out_the_very_rows_of_one_process(numbers):
    def rows(rank, world):
        batches = Windows(numbers, 50, batch=6, micro_batch=2, seed=1).micro_batches(5, rank, world)
        return [tuple(row.tolist()) for batch in batches for row in batch.ids]

    for world in (2, 3):
        shared = [rows(rank, world) for rank in range(world)]
        assert sorted(row for part in shared for row in part) == sorted(rows(0, 1))
        assert {len(part) for part in shared} == {6 // world}


def test_evaluation_windows_are_the_first_ones_in_order(numbers):
    batches = evaluation_windows(numbers, 100, most=3, rows=2)
    assert [batch.ids[:, 0].tolist() for batch in batches] == [[0, 100], [200]]
    assert sum(len(batch.ids) for batch in evaluation_windows(numbers, 100, 99, 4)) == 9


def test_too_little_text_is_refused(numbers):
    with pytest.raises(ValueError, match="too few for windows of 600"):
        Windows(numbers, 600, 1, 1, 0)
    with pytest.raises(ValueError, match="less than one window"):
        evaluation_windows(numbers, 1000, 1, 1)
