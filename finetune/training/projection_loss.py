"""Cross-entropy of a vocabulary projection without the full logits.

logits = hidden @ weight.T is by far the largest tensor of a small language model's training step
(tokens x vocabulary, in float32 for the loss, and again for its gradient). Here the tokens are
taken a few hundred at a time: logits, loss and the gradient with respect to logits live in the
cache and are gone before the next piece. The gradients of hidden and weight are worked out in the
forward pass, since by then all that they need is at hand; backward only scales them.

Source: the gradient of softmax cross-entropy is softmax(logits) - onehot(target); taking it in the
forward pass: P.-L. Hsu et al., "Liger Kernel", 2024, section 3.2, https://arxiv.org/abs/2410.10989
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

PIECE = 1 << 22  # logits at a time: 16 MB in float32


def projection_loss(hidden: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (float32 scalar) and how many targets had no likelier token.

    hidden: (n, width). head: the module that maps width to vocabulary; a plain nn.Linear takes the
    fast way, anything else (LoRA on the head) recomputes each piece of logits in the backward
    pass. targets: (n,) int64, none ignored.
    """
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else head.out_features
    rows = max(16, PIECE // vocabulary)
    if type(head) is torch.nn.Linear and head.bias is None:
        learns = torch.is_grad_enabled()
        loss, correct = _LinearCrossEntropy.apply(hidden, head.weight, targets, rows, learns)
        return loss, correct
    losses, hits = [], []
    for piece, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        loss, hit = checkpoint(_piece_loss, head, piece, wanted, use_reentrant=False)
        losses.append(loss)
        hits.append(hit)
    return torch.stack(losses).sum(), torch.stack(hits).sum()


def _piece_loss(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, (logits.gather(1, targets[:, None]) == logits.amax(-1, keepdim=True)).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T, and the count of right guesses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, learns: bool
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)  # (vocabulary, width)
            # needs_input_grad says what requires gradients, also under no_grad.
            wants_hidden, wants_weight = (learns and wanted for wanted in ctx.needs_input_grad[:2])
            hidden_grad = torch.empty_like(hidden, dtype=dtype) if wants_hidden else None
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
            for start in range(0, len(hidden), rows):
                piece = hidden[start : start + rows].to(dtype)
                wanted = targets[start : start + rows, None]
                logits = piece @ matrix.T  # (rows, vocabulary)
                logits = logits.float()
                highest = logits.amax(-1, keepdim=True)
                chosen = logits.gather(1, wanted)
                correct += (chosen == highest).sum()  # argmax costs ten times as much
                grad = logits.sub_(highest).exp_()  # softmax before it is divided by its sum
                total = grad.sum(-1, keepdim=True)
                loss += (total.log() + highest - chosen).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                grad.div_(total).scatter_add_(1, wanted, torch.full_like(total, -1))
                low = grad.to(dtype)
                if hidden_grad is not None:
                    hidden_grad[start : start + rows] = low @ matrix
                if weight_grad is not None:
                    weight_grad += low.T @ piece
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * loss_grad).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None
