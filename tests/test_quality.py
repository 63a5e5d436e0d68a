"""What compression does to a model that has learned something: gpt2-mini, on text it never saw.

Random weights say nothing about accuracy. These are the claims of the papers, on our own model.
"""

import math

import pytest
import torch

import compress
from bench import data, models
from compress.base import TorchRunner

WINDOW, WINDOWS = 256, 40


@pytest.fixture(scope="module")
def mini():
    return models.resolve("gpt2-mini")


@pytest.fixture(scope="module")
def texts(mini):
    """(windows to score, calibration samples) of the sample text that comes with the bench."""
    tokenizer = models.tokenizer(mini)
    scored = data.evaluation_blocks("sample", tokenizer, WINDOW, WINDOWS).ids
    return scored, data.calibration_blocks("sample", tokenizer, 48, WINDOW, seed=0).ids


@pytest.fixture(scope="module")
def loss(mini, texts):
    """Mean -ln p of the scored text after a method, as it is written; each worked out once."""
    known: dict[str, float] = {}

    def after(method: str) -> float:
        if method not in known:
            model = compress.apply(method, compress.load(mini.folder, torch.float32), texts[1])
            runner, nll = TorchRunner(model), 0.0
            for ids in texts[0].split(8):
                logits = runner.logits(ids)[:, :-1].flatten(0, 1)
                nll += float(torch.nn.functional.cross_entropy(
                    logits, ids[:, 1:].flatten(), reduction="sum"))  # fmt: skip
            known[method] = nll / (texts[0].numel() - len(texts[0]))
        return known[method]

    return after


def test_the_model_has_learned(loss):
    """Better by far than guessing among 4096 tokens, or than their frequencies (about 6.6)."""
    assert loss("none") < 5.2 < math.log(4096)


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_and_awq_beat_round_to_nearest(bits, loss):
    parent, rtn = loss("none"), loss(f"rtn(bits={bits})")
    assert rtn - parent > 0.002  # there is something to win
    for method in ("gptq", "awq"):
        assert loss(f"{method}(bits={bits})") - parent < 0.9 * (rtn - parent)


def test_eight_bits_cost_next_to_nothing(loss):
    for method in ("int8_sym", "int8_asym", "cast"):
        assert abs(math.expm1(loss(method) - loss("none"))) < 0.005
    assert math.expm1(loss("dynamic") - loss("none")) < 0.025


def test_more_bits_are_better(loss):
    losses = [loss(f"rtn(bits={bits})") for bits in (2, 3, 4, 8)]
    assert losses == sorted(losses, reverse=True)


def test_making_up_for_what_went_is_most_of_structured_pruning(loss):
    parent = loss("none")
    ours = loss("prune_structured") - parent
    plain = loss("prune_structured(refit=false)") - parent
    assert ours < 0.3 * plain


def test_sparsegpt_beats_magnitude(loss):
    parent = loss("none")
    assert loss("prune_sparse") - parent < 0.3 * (
        loss("prune_sparse(importance=magnitude)") - parent
    )


def test_an_svd_that_knows_the_inputs_beats_one_that_does_not(loss):
    parent = loss("none")
    ours, plain = (
        loss(f"low_rank(ratio=0.4,whiten={each})") - parent for each in ("true", "false")
    )
    assert ours < 0.8 * plain


def test_recovery_brings_back_what_pruning_took(loss):
    pruned = loss("prune_depth(blocks=2)")
    assert loss("prune_depth(blocks=2)+recover(steps=20)") < pruned - 0.1


def test_a_student_learns_more_from_its_teacher_than_alone(loss):
    taught, alone = (loss(f"distill(blocks=3,steps=20,share={share})") for share in (0.5, 0.0))
    assert taught < alone < loss("prune_depth(blocks=2)")
