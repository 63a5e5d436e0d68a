"""Depth pruning: whole decoder blocks go, those that do the least.

A block adds to the stream of hidden states that runs past it, and some blocks change it little.
`influence` measures 1 - cos of a block's input and output, the mean over the tokens of the
calibration; the blocks that turn the stream least go. `angle` measures the same across each run of
`blocks` blocks and takes the whole run that turns it least. `loss` takes them one by one, each time
that whose going leaves the least loss on the calibration.

A block less is a block's time less on any machine, whatever the kernels. What is left can be
trained afterwards (`recover`, `distill`). For the weights that it saves it costs more than
`prune_structured`. Records: 3 and 6 of smollm2-135m's 30 blocks, 8cfdb9522f37 and af411a536c41.

Source: X. Men et al., "ShortGPT", 2024 (influence), https://arxiv.org/abs/2403.03853; A. Gromov et
al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024 (angle),
https://arxiv.org/abs/2403.17887; B. Kim et al., "Shortened LLaMA", 2024 (loss),
https://arxiv.org/abs/2402.02834
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.base import Compressor, Progress, silent
from compress.block_shapes import keep_blocks
from compress.calibrate import checked_ids, first_inputs, through_block
from compress.layers import cast_parameters, decoder_blocks, family, model_dtype
from compress.registry import register

CRITERIA = ("influence", "angle", "loss")
SAMPLES = 4  # of the calibration, that `loss` scores every candidate on


@dataclass(frozen=True)
class PruneDepth(Compressor):
    """blocks: how many go. criterion: influence, angle or loss, see above."""

    needs_calibration: ClassVar[bool] = True
    leaves: ClassVar[str] = "floats"

    blocks: int = 1
    criterion: str = "loss"

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {CRITERIA}, not {self.criterion!r}")

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Drop blocks of `model` in place and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no sense,
        or no block would be left.
        """
        total = len(decoder_blocks(model))
        if self.blocks >= total:
            raise ValueError(f"blocks={self.blocks} leaves none of {total} blocks")
        calibration = checked_ids(calibration, model.config)
        choose = self._by_loss if self.criterion == "loss" else self._by_turn
        with torch.no_grad():
            gone = choose(model.eval(), calibration, progress)
        keep_blocks(model, [number for number in range(total) if number not in gone])
        return cast_parameters(model, model_dtype(model))

    def _by_turn(self, model: Any, calibration: Tensor, progress: Progress) -> list[int]:
        """The blocks to drop by the angles between what goes in and what comes out."""
        span = self.blocks if self.criterion == "angle" else 1
        blocks = [block for _, block in decoder_blocks(model)]
        turns = torch.zeros(len(blocks) + 1 - span, dtype=torch.float64)
        samples = calibration.split(1)
        for done, ids in enumerate(samples):
            progress(done, len(samples))
            (x,), context = inputs(model, ids)
            states = [x]
            for block in blocks:
                states.append(through_block(family(model), block, states[-1], context))
            for start in range(len(turns)):
                cosine = F.cosine_similarity(states[start], states[start + span], dim=-1)
                if self.criterion == "angle":
                    turns[start] += cosine.clamp(-1, 1).acos().mean() / math.pi
                else:
                    turns[start] += 1 - cosine.mean()
        progress(len(samples), len(samples))
        if self.criterion == "angle":
            first = int(turns.argmin())
            return list(range(first, first + span))
        return torch.argsort(turns, stable=True)[: self.blocks].tolist()

    def _by_loss(self, model: Any, calibration: Tensor, progress: Progress) -> list[int]:
        """The blocks to drop by the loss without them, one after the other."""
        ids, layout = calibration[:SAMPLES], family(model)
        blocks = dict(enumerate(block for _, block in decoder_blocks(model)))
        first, context = inputs(model, ids)
        gone: list[int] = []
        tries, done = self.blocks * len(blocks), 0  # a few less, in truth: some have gone by then
        for _ in range(self.blocks):
            losses: dict[int, float] = {}
            states = first
            for number, block in blocks.items():
                progress(done, tries)
                done += 1
                rest = [after for other, after in blocks.items() if other > number]
                losses[number] = loss(model, states, rest, context, ids)
                states = [through_block(layout, block, x, context) for x in states]
            gone.append(min(losses, key=lambda number: losses[number]))
            del blocks[gone[-1]]
        progress(tries, tries)
        return gone


def inputs(model: Any, ids: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first block reads, a sample each, and what its attention is called with besides."""
    states: list[Tensor] = []
    context = first_inputs(model, ids, model_dtype(model), states)
    return [x for chunk in states for x in chunk.split(1)], context


def loss(
    model: Any, states: list[Tensor], rest: list[Any], context: dict[str, Any], ids: Tensor
) -> float:
    """Mean -ln p of the tokens `ids` (samples, tokens) when `states` go through `rest` only."""
    layout, total = family(model), 0.0
    norm, head = model.get_submodule(layout.norm), model.get_output_embeddings()
    for x, tokens in zip(states, ids, strict=True):
        for block in rest:
            x = through_block(layout, block, x, context)
        logits = head(norm(x))[0, :-1].float()
        total += float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
    return total / (ids.numel() - len(ids))


register("prune_depth", PruneDepth())
