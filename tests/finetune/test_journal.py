"""The journal: raw lines, cut back on a resume, drawn as a picture."""

import pytest

from finetune.training.journal import FILE, Journal, _smooth, draw_curves, entries


def test_a_resumed_journal_reads_as_if_nothing_had_happened(tmp_path):
    first = Journal(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        first.write(step, {"loss": 1.0 / step})
    first.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    again = Journal(tmp_path, 3, tensorboard=False)
    again.write(4, {"loss": 0.25})
    again.close()
    assert entries(tmp_path) == [{"step": s, "loss": 1.0 / s} for s in range(1, 5)]


def test_a_new_run_starts_with_an_empty_journal(tmp_path):
    for _ in range(2):
        journal = Journal(tmp_path, 0, tensorboard=False)
        journal.write(1, {"loss": 2.0})
        journal.close()
    assert len(entries(tmp_path)) == 1


def test_tensorboard_gets_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path, 0, tensorboard=True)
    journal.write(1, {"loss": 3.0})
    journal.write(2, {"loss": 2.5})
    journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 2.5)]


def test_the_running_mean_by_hand():
    """Weights 0.5 and 0.25, made to add up to 1: (0.25 * 1 + 0.5 * 4) / 0.75."""
    assert _smooth([1.0, 4.0], share=0.5) == pytest.approx([1.0, 3.0])


def test_equal_logs_give_equal_pictures(tmp_path):
    journal = Journal(tmp_path, 0, tensorboard=False)
    journal.write(1, {"loss": 3.0})
    journal.write(1, {"validation_loss": 2.0, "validation_accuracy": 0.5})
    journal.close()
    first = draw_curves(tmp_path).read_bytes()
    assert draw_curves(tmp_path).read_bytes() == first and b"<svg" in first
