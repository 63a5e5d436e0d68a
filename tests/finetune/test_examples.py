"""examples: rows by hand, equal steps for every world size, padding, cutting, fingerprints."""

import pytest
import torch

from bench import models
from finetune.tasks import Example
from finetune.training.batches import IGNORED, Batch
from finetune.training.examples import Encoded, ExampleBatches, encode, keep_end, padded, token_ids


@pytest.fixture(scope="module")
def tokenizer(own_cache):
    """One token a byte; 256 ends a text."""
    return models.tokenizer(models.resolve("tiny-gpt2"))


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


EXAMPLES = [
    Example(f"question {number}{'!' * (number * 7 % 23)}:", f" answer {number}")
    for number in range(50)
]


def batches(tokenizer, **changes):
    settings = {"max_tokens": 64, "batch": 8, "micro_batch": 3, "seed": 5} | changes
    return ExampleBatches(EXAMPLES, tokenizer, **settings)


def test_row_by_hand(tokenizer):
    q, a, space, b = (ids(tokenizer, char)[0] for char in "qa b")
    row = encode(Example("qa", " b"), tokenizer, 10)
    assert row == Encoded([q, a, space, b], [IGNORED, space, b, 256], False)


def test_an_empty_prompt_is_the_token_that_texts_begin_with(tokenizer):
    a, b = ids(tokenizer, "ab")
    assert encode(Example("", "ab"), tokenizer, 10) == Encoded([256, a, b], [a, b, 256])


def test_a_long_prompt_loses_its_beginning(tokenizer):
    whole = encode(Example("0123456789", " x"), tokenizer, 12)
    assert len(whole.ids) == 12 and not whole.cut
    row = encode(Example("0123456789", " x"), tokenizer, 11)
    assert row.cut and row.ids == ids(tokenizer, "123456789 x")
    assert row.targets == [IGNORED] * 8 + [*ids(tokenizer, " x"), 256]


def test_a_long_target_loses_its_end(tokenizer):
    row = encode(Example("ab", "0123456789"), tokenizer, 4)
    assert row.cut and row.ids == ids(tokenizer, "b012")
    assert row.targets == ids(tokenizer, "0123")


def test_a_beginning_of_text_survives_the_cut(tokenizer):
    assert keep_end(tokenizer, [256, 1, 2, 3, 4], 3) == [256, 3, 4]
    assert keep_end(tokenizer, [256, 1, 2], 1) == [2]
    assert keep_end(tokenizer, [9, 1, 2, 3, 4], 3) == [2, 3, 4]
    assert keep_end(tokenizer, [9, 1, 2], 3) == [9, 1, 2]


def test_prompt_and_target_are_parted_as_they_stand_in_one_text():
    class Merging:
        """Joins "a " and "b" to one token, and begins every text with 1."""

        bos_token_id, eos_token_id, pad_token_id = 1, 2, None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            tokens = {"a": [5], "a b": [6], " b": [7], "ac": [5, 8], "": []}[text]
            return {"input_ids": [1] * add_special_tokens + tokens}

    assert token_ids(Merging(), "a", "c") == ([1, 5], [8])
    assert token_ids(Merging(), "a", " b") == ([1, 5], [7])  # not 6, which holds both
    assert token_ids(Merging(), "", "a") == ([1], [5])


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    class NoEnd:
        eos_token_id = None

    with pytest.raises(ValueError, match="no eos_token"):
        encode(EXAMPLES[0], NoEnd(), 10)


def test_padding_by_hand():
    rows = [Encoded([1, 2, 3], [IGNORED, 3, 4]), Encoded([5], [6])]
    batch = padded(rows, padding=0, most=100)
    assert batch.ids.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 3, 4] + [IGNORED] * 5, [6] + [IGNORED] * 7]
    assert padded(rows, padding=0, most=5).ids.shape == (2, 5)  # never beyond the context


def sequences(found: list[Batch]) -> list[tuple]:
    """Every row without its padding, sorted: what a step learns."""
    rows = []
    for batch in found:
        assert batch.ids.shape == batch.targets.shape
        for line, targets in zip(batch.ids, batch.targets, strict=True):
            length = int((targets != IGNORED).nonzero().max()) + 1
            assert (targets[length:] == IGNORED).all()
            rows.append((tuple(line[:length].tolist()), tuple(targets[:length].tolist())))
    return sorted(rows)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_all_ranks_together_have_the_rows_of_one_process(tokenizer, world):
    data = batches(tokenizer)
    for step in (0, 3, 5, 6, 20):
        alone = sequences(data.micro_batches(step, 0, 1))
        parts = [data.micro_batches(step, rank, world) for rank in range(world)]
        assert sequences([batch for part in parts for batch in part]) == alone
        assert len(alone) == 8
        assert len({len(part) for part in parts}) == 1, "collectives need equal turns"
        shapes = [[len(batch.ids) for batch in part] for part in parts]
        assert all(shape == shapes[0] for shape in shapes)


def test_rows_are_those_that_encode_gives(tokenizer):
    data = batches(tokenizer)
    known = {(tuple(row.ids), tuple(row.targets)) for row in data.encoded}
    for step in range(data.steps_per_epoch):
        for ids_, targets in sequences(data.micro_batches(step, 0, 1)):
            assert (ids_, targets) in known


def test_an_epoch_has_every_example_at_most_once_and_epochs_differ(tokenizer):
    data = batches(tokenizer)
    assert data.steps_per_epoch == 6  # 50 // 8
    epochs = [[data.rows(6 * epoch + step) for step in range(6)] for epoch in range(3)]
    flat = [[row for step in epoch for row in step] for epoch in epochs]
    for rows in flat:
        assert len(rows) == 48 == len(set(rows))
    assert flat[0] != flat[1] != flat[2]
    assert set(flat[0]) | set(flat[1]) | set(flat[2]) == set(range(50)), "not always the same 48"


def test_a_step_is_a_function_of_its_number(tokenizer):
    data, other = batches(tokenizer), batches(tokenizer)
    later = [data.rows(step) for step in (17, 2, 9)]
    assert later == [other.rows(step) for step in (17, 2, 9)]
    assert later != [batches(tokenizer, seed=6).rows(step) for step in (17, 2, 9)]


def test_like_lengths_share_a_batch(tokenizer):
    data = batches(tokenizer, micro_batch=8)
    rows = [len(row.ids) for row in data.encoded]
    spread = [
        max(rows[i] for i in data.rows(step)) - min(rows[i] for i in data.rows(step))
        for step in range(5)
    ]
    assert sum(spread) < max(rows) - min(rows) + 5, "one pool: lengths of batches do not overlap"
    widths = [batch.ids.shape[1] for step in range(6) for batch in data.micro_batches(step, 0, 1)]
    assert all(width % 8 == 0 for width in widths) and len(set(widths)) > 1


def test_fingerprint_changes_with_the_batches_only(tokenizer):
    base = batches(tokenizer).fingerprint()
    assert base == batches(tokenizer, micro_batch=8).fingerprint()
    for change in ({"seed": 6}, {"batch": 4}, {"max_tokens": 20}):
        assert batches(tokenizer, **change).fingerprint() != base
    assert batches(tokenizer, max_tokens=20).cut == 49  # "question 0: answer 0" just fits


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="50 examples do not fill a batch of 51"):
        batches(tokenizer, batch=51)
    with pytest.raises(ValueError, match="batch of 8 cannot be shared by 3"):
        batches(tokenizer).micro_batches(0, 0, 3)


def test_the_loss_of_a_step_does_not_depend_on_micro_batches(tokenizer, tiny_gpt2):
    import compress
    from finetune.training.language_model import LossModel

    model = LossModel(compress.load(tiny_gpt2).double())
    sums = []
    for micro_batch in (1, 3, 8):
        found = [
            model(*batch)
            for batch in batches(tokenizer, micro_batch=micro_batch).micro_batches(1, 0, 1)
        ]
        sums.append(
            [float(sum(getattr(part, name) for part in found)) for name in ("nll", "scored")]
        )
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[0] == pytest.approx(sums[2], rel=1e-5)
    assert sums[0][1] == sum(len(" answer 1") + 1 + (i > 9) for i in batches(tokenizer).rows(1))
    assert torch.is_grad_enabled()
