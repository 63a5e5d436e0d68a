"""Distillation: a smaller student learns to say what its teacher says.

Loss at each position: share * T^2 KL(teacher || student), both softened by the temperature T, plus
(1 - share) * the cross-entropy of the token that follows, plus hidden * (1 - cos) between the last
hidden states where they are of one width. The teacher runs beside the student: none of its logits
is kept.

Alone, the student is made of some of the teacher's blocks, every second one unless told otherwise,
as DistilGPT2 was, or is a new model of other sizes. After another method in a pipeline the student
is what that made and the teacher the model it was made from: `prune_structured+distill`. Codes stay
what they are then, and their scales learn: `rtn(bits=2)+distill`.

Each step costs the teacher's forward pass besides the student's own; `share=0` is the same student
without a teacher, to compare with.

Records on gpt2-mini, with a teacher and without: 3 of 5 blocks 2f29fdcd168a and 09f8c4073ba4, after
structured pruning 53d0878b5484 and e3e7e0c7f463. Scales of 2-bit codes: 6b1f0cae5ffa.

Source: V. Sanh et al., "DistilBERT", 2019, section 3, https://arxiv.org/abs/1910.01108; G. Hinton
et al., "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.base import Progress, silent
from compress.block_shapes import keep_blocks
from compress.layers import cast_parameters, decoder_blocks, model_dtype
from compress.model_config import new_model
from compress.registry import register
from compress.trained_scales import close_codes, open_codes
from compress.training import Loss, Trained, next_token


@dataclass(frozen=True)
class Distill(Trained):
    """share, temperature, hidden: of the loss, see above.

    blocks: of the student, evenly spaced among the model's; 0 for all, or half where the model is
    its own teacher. width, channels: of hidden states and MLP of a new student with untrained
    weights; 0 for the model's.
    """

    takes: ClassVar[tuple[str, ...]] = ("floats", "factors", "codes")
    extras: ClassVar[tuple[str, ...]] = ("parent", "work")

    share: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0
    blocks: int = 0
    width: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {self.share}")
        if self.temperature <= 0 or self.hidden < 0:
            raise ValueError("temperature must be above 0, and hidden not below")
        if min(self.blocks, self.width, self.channels) < 0:
            raise ValueError("blocks, width and channels must be 0 or more")

    def compress(
        self,
        model: nn.Module,
        calibration: Tensor | None = None,
        progress: Progress = silent,
        parent: Callable[[], Any] | None = None,
        work: Path | None = None,
    ) -> nn.Module:
        """The student, trained.

        calibration: (sequences, tokens) int64. parent: gives the teacher; None: `model` itself.
        work: see Trained.train. Raises what that raises, ValueError for sizes that make no model,
        weights that
        are not finite, or layers that round their inputs.
        """
        dtype = model_dtype(model)
        teacher: Any = copy.deepcopy(model) if parent is None else parent()
        cast_parameters(teacher, torch.float32).eval().requires_grad_(False)
        student: Any = self.student(model, alone=parent is None)
        cast_parameters(student, torch.float32).requires_grad_(True)
        same = student.config.hidden_size == teacher.config.hidden_size
        if self.hidden and not same:
            raise ValueError("hidden: student and teacher have hidden states of different widths")
        open_codes(student)
        self.train(student, calibration, self.losses(teacher), progress, work)
        close_codes(student)
        return cast_parameters(student.requires_grad_(False), dtype)

    def student(self, model: Any, alone: bool) -> Any:
        """What is to be trained, made of `model`. alone: no method has made it smaller before."""
        total = len(decoder_blocks(model))
        if self.blocks > total:
            raise ValueError(f"blocks={self.blocks}: the model has {total}")
        if self.width or self.channels:
            return new_model(model, self.blocks or total, self.width, self.channels)
        count = self.blocks or (-(-total // 2) if alone else total)
        if count < total:
            keep_blocks(model, evenly(count, total))
        return model

    def losses(self, teacher: Any) -> Callable[[Tensor], Loss]:
        """The loss of every sequence against what `teacher` says of it."""
        if not self.share and not self.hidden:
            return next_token
        head, heat = teacher.get_output_embeddings(), self.temperature

        def loss_of(ids: Tensor) -> Loss:
            with torch.no_grad():
                states = teacher.base_model(ids[None], use_cache=False).last_hidden_state[0, :-1]

            def loss(logits: Tensor, own: Tensor, piece: slice) -> Tensor:
                total = (1 - self.share) * F.cross_entropy(logits, ids[1:][piece])
                if self.hidden:
                    near = F.cosine_similarity(own.float(), states[piece].float(), dim=-1)
                    total = total + self.hidden * (1 - near).mean()
                if self.share:
                    with torch.no_grad():
                        wanted = F.log_softmax(head(states[piece]).float() / heat, -1)
                    said = F.log_softmax(logits / heat, -1)
                    apart = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
                    total = total + self.share * heat**2 * apart
                return total

            return loss

        return loss_of


def evenly(count: int, total: int) -> list[int]:
    """`count` of `total` numbers from the first to the last, as far apart as they can be."""
    return [round(index * (total - 1) / max(1, count - 1)) for index in range(count)]


register("distill", Distill())
