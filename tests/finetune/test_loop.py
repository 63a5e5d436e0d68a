"""The loop: the schedule by hand, equal sums however they are cut, and runs that are resumed."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from bench.errors import UsageError
from finetune.text.token_file import TokenFile, TokenWriter
from finetune.training import checkpoints
from finetune.training.batches import IGNORED, Batch, Windows, evaluation_windows
from finetune.training.journal import entries
from finetune.training.language_model import LossModel
from finetune.training.loop import LoopSettings, fit, prepare_process, rate_at, total_steps
from finetune.training.mean_loss import mean_loss
from finetune.training.parallel import Place

ALONE = Place(0, 1, torch.device("cpu"), "none")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 3,000 tokens that repeat with a period of 23: easy to learn."""
    path = tmp_path_factory.mktemp("text") / "t.tokens"
    with TokenWriter(path, 257, tokenizer_sha256="", sources=[]) as writer:
        writer.append(np.arange(3000) % 23 * 11, documents=1)
        return writer.finish()


def train(folder: Path, tiny: Path, text: TokenFile, evaluate=None, **changed):
    values = {"steps": 8, "batch": 4, "micro_batch": 4, "warmup": 0.25, "precision": "fp32"}
    values |= {"evaluate_every": 4, "save_every": 2, "learning_rate": 1e-2, "threads": 1}
    settings = LoopSettings(out=folder, tensorboard=False, **(values | changed))
    prepare_process(settings, ALONE)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    data = Windows(text, 32, settings.batch, settings.micro_batch, seed=0)
    held_out = evaluation_windows(text, 32, 6, 3)
    folder.mkdir(exist_ok=True)
    judge = evaluate or (lambda runner: mean_loss(runner, held_out, ALONE))
    figures = fit(model, data, judge, settings, ALONE)
    return figures, model


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    settings = LoopSettings(learning_rate=1.0, final_rate=0.1, warmup=0.2)
    rates = [rate_at(step, 10, settings) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    half = 0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 8)) / 2
    assert rates[6] == pytest.approx(half) and rates[9] < 0.15
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))
    assert rate_at(0, 10, LoopSettings(learning_rate=1.0, warmup=0.0)) == 1.0


def test_epochs_become_steps():
    data = SimpleNamespace(steps_per_epoch=40)
    assert total_steps(LoopSettings(epochs=2.5), data) == 100
    assert total_steps(LoopSettings(epochs=2.5, steps=7), data) == 7


def test_learning_lowers_the_loss_and_the_journal_has_every_step(tmp_path, tiny_llama, text):
    figures, _ = train(tmp_path / "run", tiny_llama, text, steps=30)
    log = entries(tmp_path / "run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 31))
    assert losses[-1] < 0.5 * losses[0]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["tokens_per_s"] > 0 and 0 <= figures["read_share"] < 1
    assert (tmp_path / "run" / "curves.svg").stat().st_size > 1000


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_a_run_that_died_goes_on_along_the_same_curve(fixture, tmp_path, text, request):
    tiny = request.getfixturevalue(fixture)
    train(tmp_path / "whole", tiny, text)

    def dies(runner):
        dies.calls += 1
        if dies.calls == 3:  # at the start, after step 4, after step 8
            raise MemoryError("as good as kill -9: after step 8, before its checkpoint")
        return {"loss": 1.0}

    dies.calls = 0
    with pytest.raises(MemoryError):
        train(tmp_path / "broken", tiny, text, dies)
    assert checkpoints.newest(tmp_path / "broken").step == 6
    train(tmp_path / "broken", tiny, text)
    whole, broken = ([e for e in entries(tmp_path / n) if "loss" in e] for n in ("whole", "broken"))
    assert whole == broken and len(whole) == 8
    ends = [checkpoints.newest(tmp_path / name).parameters() for name in ("whole", "broken")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_micro_batches_add_up_to_the_step(tmp_path, tiny_llama, text):
    train(tmp_path / "one", tiny_llama, text, steps=3)
    train(tmp_path / "four", tiny_llama, text, steps=3, micro_batch=1)
    one, four = ([e["loss"] for e in entries(tmp_path / n) if "loss" in e] for n in ("one", "four"))
    assert four == pytest.approx(one, rel=1e-5)


def test_the_gradient_is_that_of_the_mean_over_targets(tmp_path, tiny_llama, text):
    """Prompts and padding are read but do not count, whatever micro-batch they are in."""
    ids = torch.stack([text.window(start, 33) for start in (0, 50, 100, 150)])
    targets = ids[:, 1:].clone()
    for row, known in enumerate((1, 9, 30, 32)):
        targets[row, :-known] = IGNORED
    parts = [Batch(ids[:3, :-1], targets[:3]), Batch(ids[3:, :-1], targets[3:])]
    data = SimpleNamespace(steps_per_epoch=1, micro_batches=lambda step, rank, world: parts)
    settings = LoopSettings(
        out=tmp_path, steps=1, precision="fp32", clip=0.0, tensorboard=False, threads=1
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
    loss = torch.nn.functional.cross_entropy(
        model(ids[:, :-1]).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad()
    fit(model, data, lambda runner: {}, settings, ALONE)
    step = next(entry for entry in entries(tmp_path) if "loss" in entry)
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["gradient"] == pytest.approx(norm.item(), rel=1e-4)


def test_recomputed_activations_change_nothing(tmp_path, tiny_llama, text):
    train(tmp_path / "kept", tiny_llama, text, steps=3)
    train(tmp_path / "again", tiny_llama, text, steps=3, checkpointing=True)
    kept, again = ([e.get("loss") for e in entries(tmp_path / n)] for n in ("kept", "again"))
    assert kept == again


def test_a_step_of_adamw_by_hand(tmp_path, tiny_llama, text):
    """The first step moves each weight by rate * sign(gradient), and decay by rate * decay * w."""
    before = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
    _, after = train(
        tmp_path / "r", tiny_llama, text, steps=1, warmup=0.0, weight_decay=0.5, learning_rate=1e-3
    )
    matrices = [m.model.layers[0].mlp.up_proj.weight.detach() for m in (before, after)]
    old, new = matrices
    moved = (new - old * (1 - 1e-3 * 0.5)).abs()
    assert float((moved - 1e-3).abs().median()) < 1e-6
    assert float(moved.max()) < 1.001e-3
    norms = [m.model.norm.weight.detach() for m in (before, after)]  # vectors are not decayed
    assert float((norms[1] - norms[0]).abs().max()) < 1.001e-3


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, tiny_llama, text):
    with pytest.raises(FloatingPointError, match="lower --learning-rate"):
        train(tmp_path / "run", tiny_llama, text, steps=30, learning_rate=1e30, clip=0.0)


def test_batches_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(UsageError, match="--batch 5 cannot be shared by 2"):
        prepare_process(LoopSettings(batch=5), Place(0, 2, torch.device("cpu"), "ddp"))


def test_what_was_trained_with_a_method_s_rounding_loses_nothing_by_the_method(
    tmp_path, tiny_llama, text
):
    method = "rtn(bits=4,dtype=float32)"
    figures, trained = train(
        tmp_path / "run", tiny_llama, text, steps=12, fake_weights=f"method:{method}"
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
    plain.load_state_dict(trained.state_dict())
    held_out = evaluation_windows(text, 32, 6, 3)
    losses = []
    with torch.no_grad():
        losses.append(mean_loss(LossModel(plain), held_out, ALONE)["loss"])
        losses.append(mean_loss(LossModel(compress.apply(method, plain)), held_out, ALONE)["loss"])
    assert losses[1] == pytest.approx(figures["loss"], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3  # the rounding is not nothing


@pytest.mark.parametrize("kind", ["fake_activations", "fake_gradients"])
def test_rounded_activations_and_gradients_change_the_curve_and_still_learn(
    kind, tmp_path, tiny_llama, text
):
    train(tmp_path / "plain", tiny_llama, text)
    train(tmp_path / "rounded", tiny_llama, text, **{kind: "fp8_e5m2:row"})
    plain, rounded = (
        [e["loss"] for e in entries(tmp_path / name) if "loss" in e]
        for name in ("plain", "rounded")
    )
    assert plain != rounded and rounded[-1] < 0.9 * rounded[0]
