"""recover and distill: gradients by hand, logits in pieces, runs that stop and go on, teachers."""

import copy

import pytest
import torch
from torch.nn import functional as F

import compress
from compress import checkpoint
from compress.block_shapes import shapes
from compress.layers import decoder_blocks
from compress.methods.distill import Distill, evenly
from compress.methods.recover import Recover, next_token
from compress.training import CHECKPOINT, backward

IDS = torch.randint(0, 257, (6, 20), generator=torch.Generator().manual_seed(0))


def trainable(folder):
    model = checkpoint.load(folder)
    for each in model.parameters():
        each.data = each.data.clone()
    return model.requires_grad_(True)


def loss(model, ids=IDS):
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten())


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("piece", [5, 256])
def test_pieces_of_the_logits_give_the_whole_gradient(family, piece, request, monkeypatch):
    monkeypatch.setattr("compress.training.PIECE", piece)
    monkeypatch.setattr("compress.training.compute_dtype", lambda device: torch.float32)
    folder = request.getfixturevalue(family)
    ours, plain = trainable(folder), trainable(folder)
    value = backward(ours, IDS[0], next_token(IDS[0]), 0.25)
    expected = loss(plain, IDS[:1])
    (0.25 * expected).backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-3, atol=1e-6)


def test_distillation_is_the_textbook_loss(tiny_llama, monkeypatch):
    """share T^2 KL + (1 - share) cross-entropy + hidden (1 - cos), on whole logits."""
    monkeypatch.setattr("compress.training.compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr("compress.training.PIECE", 7)
    teacher, student = checkpoint.load(tiny_llama), trainable(tiny_llama)
    student.model.layers[1].mlp.down_proj.weight.data *= 0.5
    plain = copy.deepcopy(student)
    method = Distill(share=0.3, temperature=3.0, hidden=0.2)
    value = backward(student, IDS[0], method.losses(teacher)(IDS[0]), 1.0)
    said, wanted = (model(IDS[:1]).logits[0, :-1] for model in (plain, teacher))
    states = [model.model(IDS[:1]).last_hidden_state[0, :-1] for model in (plain, teacher)]
    p = F.softmax(wanted / 3, -1)
    apart = (p * (p.log() - F.log_softmax(said / 3, -1))).sum(-1).mean()
    expected = 0.3 * 9 * apart + 0.7 * F.cross_entropy(said, IDS[0, 1:])
    expected = expected + 0.2 * (1 - F.cosine_similarity(*states, dim=-1)).mean()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(student)[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_recovery_learns_its_text(rank, tiny_llama):
    model = checkpoint.load(tiny_llama)
    before = float(loss(model))
    method = Recover(steps=30, batch=2, learning_rate=3e-3, rank=rank)
    trained = method.compress(model, IDS)
    assert float(loss(trained)) < before - 0.3
    assert shapes(trained) == shapes(checkpoint.load(tiny_llama))
    plain = checkpoint.load(tiny_llama).state_dict().keys()
    assert trained.state_dict().keys() == plain
    assert not any(each.requires_grad for each in trained.parameters())
    frozen = torch.equal(
        trained.model.embed_tokens.weight, checkpoint.load(tiny_llama).model.embed_tokens.weight
    )
    assert frozen == bool(rank)  # LoRA leaves everything but the blocks' matrices


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    rank, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("compress.training.CHECKPOINT_S", 0.0)
    method = Recover(steps=8, batch=2, rank=rank)
    whole = method.compress(checkpoint.load(tiny_llama), IDS).state_dict()

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.compress(checkpoint.load(tiny_llama), IDS, stop, work=tmp_path / "work")
    assert [file.name for file in (tmp_path / "work").iterdir()] == [CHECKPOINT]
    seen = []
    again = method.compress(
        checkpoint.load(tiny_llama),
        IDS,
        lambda done, total: seen.append(done),
        work=tmp_path / "work",
    )
    assert seen == [5, 6, 7, 8]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_damaged_checkpoint_is_named(tiny_llama, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"\x10" * 100)
    with pytest.raises(ValueError, match=r"training\.safetensors cannot be used; delete it"):
        Recover(steps=2).compress(checkpoint.load(tiny_llama), IDS, work=tmp_path)


def test_every_sequence_comes_once_before_any_comes_again():
    method = Recover(batch=4)
    numbers = [number for step in range(6) for number in method.sequence_numbers(step, 12)]
    assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(12))
    assert numbers[:12] != numbers[12:]


def test_the_pace_by_hand():
    """40 steps: up over 2, then a half cosine from 1 towards .1."""
    pace = [Recover(steps=40).pace(step) for step in range(40)]
    assert pace[:3] == [0.5, 1.0, 1.0]
    assert pace[21] == pytest.approx(0.55)
    assert pace[3:] == sorted(pace[3:], reverse=True) and 0.1 < pace[-1] < 0.11


def test_students(tiny_llama, tiny_gpt2):
    assert (
        evenly(3, 5) == [0, 2, 4] and evenly(6, 12) == [0, 2, 4, 7, 9, 11] and evenly(1, 4) == [0]
    )
    model = checkpoint.load(tiny_llama)
    blocks = [block for _, block in decoder_blocks(model)]
    half = Distill(steps=1).student(model, alone=True)
    assert [block for _, block in decoder_blocks(half)] == [blocks[0], blocks[2]]
    model = checkpoint.load(tiny_llama)
    assert len(decoder_blocks(Distill(steps=1).student(model, alone=False))) == 3
    for folder in (tiny_llama, tiny_gpt2):
        fresh = Distill(steps=1, blocks=1, width=32, channels=48).student(
            checkpoint.load(folder), alone=True
        )
        assert fresh(IDS).logits.shape == (6, 20, 257)
        assert (fresh.config.hidden_size, len(decoder_blocks(fresh))) == (32, 1)
        assert shapes(fresh)[0].channels == 48
    with pytest.raises(ValueError, match="blocks=9"):
        Distill(blocks=9).student(checkpoint.load(tiny_llama), alone=True)
    with pytest.raises(ValueError, match="width 40 is no multiple"):
        Distill(width=40).student(checkpoint.load(tiny_llama), alone=True)


def test_in_a_pipeline_the_teacher_is_what_came_first(tiny_llama):
    """All of the loss is the teacher's: the student that it brings nearest is the one it taught."""
    parent = checkpoint.load(tiny_llama)
    said = F.log_softmax(parent(IDS).logits, -1)

    def apart(method):
        small = compress.apply(method, checkpoint.load(tiny_llama), IDS)
        other = F.log_softmax(small(IDS).logits, -1)
        return float(F.kl_div(other, said, reduction="sum", log_target=True))

    taught = apart("prune_depth+distill(steps=40,share=1.0,temperature=1.0,learning_rate=0.003)")
    assert taught < 0.5 * apart("prune_depth")


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("recover", dict(steps=0)),
        ("recover", dict(batch=0)),
        ("recover", dict(sequences=0)),
        ("recover", dict(learning_rate=0.0)),
        ("recover", dict(rank=-1)),
        ("distill", dict(share=1.5)),
        ("distill", dict(temperature=0.0)),
        ("distill", dict(blocks=-1)),
    ],
)
def test_settings_that_make_no_sense(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        compress.get(name, **wrong)


def test_a_loss_that_is_not_finite_stops(tiny_llama):
    model = trainable(tiny_llama)
    model.lm_head.weight.data *= 1e38
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 0"):
        Recover(steps=2).compress(model, IDS)
