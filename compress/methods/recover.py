"""Recovery: train a pruned model on text for a little while, all of it or by LoRA.

A model that has lost heads, channels or blocks still knows most of what it knew; some hundred steps
on running text bring much of it back. With a rank the matrices stay and a product of two thin ones
is learnt beside each (LoRA) and added to it afterwards: the result is a plain model either way.

What it is trained on it also gets better at, pruned or not: where the text is of the kind that the
model is judged by, compare with `recover` alone, not with the parent. `distill` learns from the
parent instead, which adds no knowledge of the text. Records: smollm2-135m after 20 % of structured
pruning, trained on C4 and judged on WikiText-2, b514c0ee15ff; gpt2-mini after half, f21b52a7ad00.

Source: X. Ma et al., "LLM-Pruner", 2023, section 3.3, https://arxiv.org/abs/2305.11627; E. Hu et
al., "LoRA", 2021, https://arxiv.org/abs/2106.09685
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.base import Progress, silent
from compress.layers import cast_parameters, model_dtype, named_linears
from compress.registry import register
from compress.training import Trained, next_token


@dataclass(frozen=True)
class Recover(Trained):
    """rank: of LoRA's matrices beside every linear layer of the blocks; 0 trains all weights."""

    extras: ClassVar[tuple[str, ...]] = ("work",)

    rank: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, not {self.rank}")

    def compress(
        self,
        model: nn.Module,
        calibration: Tensor | None = None,
        progress: Progress = silent,
        work: Path | None = None,
    ) -> nn.Module:
        """Train `model` on the next tokens of `calibration`, in place, and return it.

        calibration: (sequences, tokens) int64. work: see Trained.train. Raises what that raises,
        ValueError if a weight is not finite or LoRA is asked for and peft is not installed.
        """
        dtype = model_dtype(model)
        cast_parameters(model, torch.float32)
        model.requires_grad_(not self.rank)
        adapted = self.adapted(model) if self.rank else None
        self.train(model, calibration, next_token, progress, work)
        if adapted is not None:
            model = adapted.merge_and_unload()
        return cast_parameters(model.requires_grad_(False), dtype)

    def adapted(self, model: nn.Module) -> Any:
        """`model` with LoRA's matrices inside it, as a peft model."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError("rank: LoRA needs peft: pip install 'slimbench[finetune]'") from None
        if not (names := [name for name, _ in named_linears(model)]):
            raise ValueError("rank: there is no plain matrix to put LoRA's beside")
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=names)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(model, config)


register("recover", Recover())
