"""The chunked loss against torch's own cross-entropy, and by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.training import projection_loss


class OtherLinear(nn.Linear):
    """Not a plain nn.Linear, so it takes the general way."""


@pytest.fixture(params=[nn.Linear, OtherLinear])
def head(request):
    torch.manual_seed(0)
    return request.param(12, 37, bias=False)


def both(head, hidden, targets):
    """(loss, hidden gradient, weight gradient) of ours and of torch."""
    found = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        if ours:
            loss, _ = projection_loss.projection_loss(x, head, targets)
        else:
            loss = F.cross_entropy(head(x), targets, reduction="sum")
        (loss * 0.25).backward()
        found.append((loss.detach(), x.grad, head.weight.grad.clone()))
    return found


def test_equals_torch_whatever_the_pieces(head, monkeypatch):
    hidden, targets = torch.randn(100, 12), torch.randint(37, (100,))
    for piece in (37 * 16, 37 * 33, 1 << 22):  # 16 rows, 33 rows, all at once
        monkeypatch.setattr(projection_loss, "PIECE", piece)
        ours, reference = both(head, hidden, targets)
        for mine, theirs in zip(ours, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_no_logits_tell_anything(head):
    nn.init.zeros_(head.weight)
    loss, _ = projection_loss.projection_loss(torch.randn(5, 12), head, torch.arange(5))
    assert loss.item() == pytest.approx(5 * math.log(37), rel=1e-6)


def test_right_guesses_are_counted(head):
    hidden = torch.randn(50, 12)
    best = head(hidden).argmax(-1)
    wrong = (best + 1) % 37
    targets = torch.where(torch.arange(50) < 20, best, wrong)
    assert int(projection_loss.projection_loss(hidden, head, targets)[1]) == 20


def test_bfloat16_arithmetic_gives_float32_loss_and_gradients_near_float32s():
    torch.manual_seed(1)
    head, hidden = nn.Linear(64, 300, bias=False), torch.randn(40, 64)
    targets = torch.randint(300, (40,))
    x = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = projection_loss.projection_loss(x, head, targets)
    loss.backward()
    y, exact = hidden.clone().requires_grad_(), head.weight
    F.cross_entropy(F.linear(y, exact), targets, reduction="sum").backward()
    assert loss.dtype == x.grad.dtype == torch.float32
    assert float((x.grad - y.grad).norm() / y.grad.norm()) < 0.01


def test_nothing_to_score_is_zero(head):
    loss, correct = projection_loss.projection_loss(
        torch.zeros(0, 12, requires_grad=True), head, torch.zeros(0, dtype=torch.int64)
    )
    assert loss.item() == 0 and int(correct) == 0
