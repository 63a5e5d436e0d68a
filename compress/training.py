"""Short training on calibration text: the loop that `recover` and `distill` share.

Float32 weights, AdamW, a cosine after a short warm-up, gradients clipped to norm 1; forward passes
in bfloat16 where the processor multiplies it natively. One sequence at a time goes through the
model, and its logits exist in pieces only. Which sequence comes when depends on the step alone, so
a run that was stopped goes on along the same curve from its last checkpoint.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compress.base import Compressor, Progress
from compress.calibrate import checked_ids, compute_dtype

PIECE = 256  # tokens whose logits exist at a time
CHECKPOINT_S = 60.0  # seconds between checkpoints
CHECKPOINT = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")

# (logits of some positions, the last hidden states that gave them, which ones) -> their mean loss
Loss = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class Trained(Compressor):
    """A method that trains. steps: of the optimizer. batch: sequences a step.

    learning_rate: the highest. sequences: of calibration text to draw, each as long as
    calibration's are.
    """

    needs_calibration: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("floats", "factors")
    leaves: ClassVar[str] = ""

    steps: int = 200
    batch: int = 4
    learning_rate: float = 1e-4
    sequences: int = 1000

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        for name in ("steps", "batch", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be above 0 and below 1, not {self.learning_rate}")

    def drawn(self, samples: int) -> int:
        """See Compressor."""
        return self.sequences

    def train(
        self,
        model: Any,
        calibration: Tensor | None,
        loss_of: Callable[[Tensor], Loss],
        progress: Progress,
        work: Path | None,
    ) -> None:
        """Train those parameters of `model` that require gradients, in place.

        calibration: (sequences, tokens) int64. loss_of: (tokens,) ids -> the loss of pieces of
        their logits. work: folder of the checkpoint, if there is to be one. Raises ValueError for a
        calibration that is missing or makes no sense, or a loss that is not finite.
        """
        calibration = checked_ids(calibration, model.config)
        model.eval()  # no dropout: steps are few, and repeatable
        parameters = [each for each in model.parameters() if each.requires_grad]
        for each in parameters:  # what was loaded may be a read-only map of its file
            each.data = each.data.clone()
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=0.0)
        start, saved = restore(work, parameters, optimizer), time.monotonic()
        for step in range(start, self.steps):
            progress(step, self.steps)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.pace(step)
            optimizer.zero_grad()
            for ids in calibration[self.sequence_numbers(step, len(calibration))]:
                value = backward(model, ids, loss_of(ids), 1 / self.batch)
                if not math.isfinite(value):
                    raise ValueError(f"the loss is {value} at step {step}; lower learning_rate")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if work and time.monotonic() - saved > CHECKPOINT_S:
                keep(work, step + 1, parameters, optimizer)
                saved = time.monotonic()
        progress(self.steps, self.steps)

    def pace(self, step: int) -> float:
        """The share of the learning rate: up to 1 over a twentieth, then by a cosine to 0.1."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        through = (step - warm) / max(1, self.steps - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * through))

    def sequence_numbers(self, step: int, count: int) -> list[int]:
        """The sequences of a step: all of them once in random order, then in another, and so on."""
        numbers = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            generator = torch.Generator().manual_seed(position // count)
            numbers.append(int(torch.randperm(count, generator=generator)[position % count]))
        return numbers


def next_token(ids: Tensor) -> Loss:
    """Cross-entropy of the tokens that follow, of a sequence (tokens,)."""
    return lambda logits, states, piece: F.cross_entropy(logits, ids[1:][piece])


def backward(model: Any, ids: Tensor, loss: Loss, weight: float) -> float:
    """Add the gradients of `weight` * the mean loss over the sequence `ids` (tokens,); that mean.

    Logits are made, and their gradients taken, PIECE positions at a time.
    """
    positions = len(ids) - 1
    fast = compute_dtype(ids.device) == torch.bfloat16
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=fast):
        hidden = model.base_model(ids[None], use_cache=False).last_hidden_state[0, :-1]
        leaf, total = hidden.detach().requires_grad_(True), 0.0
        for first in range(0, positions, PIECE):
            piece = slice(first, min(first + PIECE, positions))
            logits = model.get_output_embeddings()(leaf[piece])
            value = loss(logits.float(), leaf[piece], piece)
            value = value * ((piece.stop - piece.start) / positions)
            (value * weight).backward()
            total += float(value.detach())
    if hidden.requires_grad:
        hidden.backward(leaf.grad)
    return total


def keep(work: Path, step: int, parameters: list[Any], optimizer: Any) -> None:
    """Write a checkpoint: `step` steps are done."""
    tensors = {}
    for number, each in enumerate(parameters):
        tensors[f"value.{number}"] = each.data
        for name in MOMENTS:
            tensors[f"{name}.{number}"] = optimizer.state[each][name]
    work.mkdir(parents=True, exist_ok=True)
    new = work / f"{CHECKPOINT}.new"
    save_file(tensors, new, metadata={"step": str(step)})
    os.replace(new, work / CHECKPOINT)


def restore(work: Path | None, parameters: list[Any], optimizer: Any) -> int:
    """The steps that a checkpoint in `work` has done, 0 without one; loads what it holds."""
    if work is None or not (work / CHECKPOINT).is_file():
        return 0
    try:
        with safe_open(work / CHECKPOINT, framework="pt") as file:
            step = int(file.metadata()["step"])
            for number, each in enumerate(parameters):
                each.data.copy_(file.get_tensor(f"value.{number}"))
                optimizer.state[each] = {
                    "step": torch.tensor(float(step)),
                    **{name: file.get_tensor(f"{name}.{number}") for name in MOMENTS},
                }
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{work / CHECKPOINT} cannot be used; delete it: {error}") from None
    return step
