"""Structured pruning: whole heads and MLP channels go, what stays is a smaller plain model.

From every half of a block the least important units go (block_shapes.py): of attention the heads
that share keys and values, with these, of the MLP channels. The layer behind them then makes up for
what they gave it, by least squares on the calibration text: W' = W H[:, K] H[K, K]^-1 with
H = E[x x^T] and K the inputs that stay. What a set S of them costs under that correction,
tr(W_S ([H^-1]_SS)^-1 W_S^T), can choose them too (importance=reconstruction; H^-1 and W are brought
up to date as units go, so that of two that can stand in for each other one stays). The default, the
energy that a unit gives, left smollm2-135m the lower perplexity at both ratios tried.

Helps every runtime, since there is less to multiply and no kernel is needed, and any other method
can follow. Costs far more quality than fewer bits for the same bytes: train it afterwards
(`recover`, `distill`), and do not use it where a quantized model would do. Records (results/runs):
smollm2-135m 10 % 9fed02f19afd, 30 % f5ba512292f4, 20 % trained again b514c0ee15ff; gpt2-mini, where
together with training and 3 bits it is the smallest row and no worse than the parent, 6ee449ce060f.

Source: E. Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023,
https://arxiv.org/abs/2302.04089; P. Molchanov et al., "Importance Estimation for Neural Network
Pruning", 2019 (taylor), https://arxiv.org/abs/1906.10771; M. Sun et al., "A Simple and Effective
Pruning Approach for Large Language Models", 2023 (activation), https://arxiv.org/abs/2306.11695
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.base import Compressor, Progress, part_of, silent
from compress.block_shapes import (
    Shape,
    by_unit,
    halves,
    keep_units,
    settle,
    shapes,
    unit_weights,
    units,
)
from compress.layer_inputs import Group
from compress.layers import (
    Family,
    cast_parameters,
    decoder_blocks,
    family,
    model_dtype,
    named_finite,
)
from compress.output_error import check_damping
from compress.registry import register
from compress.unit_budget import check_budget, ranked, uniform
from compress.unit_choice import choose, inverse, unit_costs, unit_energies
from compress.unit_slopes import slopes

IMPORTANCE = ("activation", "reconstruction", "magnitude", "taylor")
Scores = list[list[Tensor]]  # of every block: of each half: (units,)


@dataclass(frozen=True)
class PruneStructured(Compressor):
    """Remove units from the decoder blocks.

    ratio: at least this share of the weights in the blocks' linear layers goes, and less than one
    step of units more. spread: "uniform" leaves all blocks alike (of Llama, a folder that every
    program reads); "global" takes units from where they matter least, by importance over the mean
    of their half. heads: whether attention's units go too; of blocks that stay alike the share
    `ratio` of them, rounded down, and channels make up the rest. round_to: the channels of a block
    are left a multiple of this, if there are so many, for the kernels' sake.
    importance: "activation", the mean square of what the unit gives; "reconstruction", see above;
    "magnitude" of its weights; "taylor", the squared change of the loss without it, to first order.
    iterations: rounds over the model, each taking an equal part by what the model is by then.
    refit: whether the layer behind makes up for what went. damping: share of the mean of H's
    diagonal added to it.
    """

    needs_calibration: ClassVar[bool] = True
    leaves: ClassVar[str] = "floats"

    ratio: float = 0.2
    spread: str = "uniform"
    heads: bool = True
    round_to: int = 32
    importance: str = "activation"
    iterations: int = 1
    refit: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        check_budget(self.ratio, self.spread)
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be one of {IMPORTANCE}, not {self.importance!r}")
        if not 1 <= self.iterations <= 30:
            raise ValueError(f"iterations must be from 1 to 30, not {self.iterations}")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, not {self.round_to}")
        check_damping(self.damping)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Prune `model` in place and return it.

        calibration: (samples, tokens) int64. Raises ValueError if it is missing or makes no sense,
        if a weight is not finite, or if the ratio leaves a block nothing.
        """
        before, layout = shapes(model), family(model)
        first = decoder_blocks(model)[0][1]
        weights = [unit_weights(first, layout, half) for half in halves(layout)]
        looks = self.spread == "global" and self.importance != "taylor"
        passes = self.iterations * (1 + looks)
        parts = (part_of(progress, number, passes) for number in range(passes))
        for turn in range(1, self.iterations + 1):
            share = self.ratio * turn / self.iterations
            scores = slopes(model, calibration) if self.importance == "taylor" else None
            if looks:
                scores = self.look(model, calibration, next(parts))
            if self.spread == "global":
                assert scores is not None
                wanted = ranked(before, scores, weights, share, self.heads, self.round_to)
            else:
                wanted = [uniform(was, weights, share, self.heads, self.round_to) for was in before]
            self.prune(model, calibration, wanted, scores, next(parts))
            settle(model)
        return cast_parameters(model, model_dtype(model))

    def look(self, model: nn.Module, calibration: Tensor | None, progress: Progress) -> Scores:
        """The importance of every unit of `model` as it is."""
        found: Scores = []

        def solve(groups: list[Group]) -> dict[str, nn.Module]:
            found.append([self.importances(each, family(model)) for each in groups[1::2]])
            return {}

        calibrate.run(model, calibration, solve, "block", progress)
        return found

    def prune(
        self,
        model: nn.Module,
        calibration: Tensor | None,
        wanted: list[Shape],
        scores: Scores | None,
        progress: Progress,
    ) -> None:
        """Leave every block with the units of `wanted`, those of the highest scores."""
        layout = family(model)
        unknown: list[Any] = [None, None]
        known: Iterator[Any] = iter(scores or [unknown] * len(wanted))
        sizes = map(astuple, wanted)

        def solve(groups: list[Group]) -> dict[str, nn.Module]:
            ends = groups[1::2]
            for group, keep, score in zip(ends, next(sizes), next(known), strict=True):
                self.prune_half(group, layout, keep, score)
            return {}

        calibrate.run(model, calibration, solve, "block", progress)

    def importances(self, group: Group, layout: Family) -> Tensor:
        """(units,) of the half that ends in `group`."""
        block: Any = group.block
        half = group.half
        count, ((name, output),) = units(block, layout, half), group.chosen().items()
        weight = named_finite(name, output)
        if self.importance == "activation":
            return unit_energies(weight, group.gram, count)
        if self.importance == "reconstruction":
            return unit_costs(weight.double(), inverse(group.gram, self.damping), count)
        squares = by_unit(weight.T.square(), count).sum((0, 2, 3))
        for name in half.inputs:
            rows = named_finite(name, block.get_submodule(name))  # (rows, in)
            squares += by_unit(rows.square(), count, half.parts).sum((0, 2, 3))
        return squares

    def prune_half(self, group: Group, layout: Family, keep: int, scores: Tensor | None) -> None:
        """Leave the half that ends in `group` with `keep` units. scores: where they are known."""
        block: Any = group.block
        half = group.half
        ((name, output),) = group.chosen().items()
        count = units(block, layout, half)
        if keep == count:
            return
        if scores is None and self.importance != "reconstruction":
            scores = self.importances(group, layout)
        if scores is not None and not self.refit:
            kept = torch.topk(scores, keep).indices.sort().values
            keep_units(block, layout, half, kept)
            return
        weight = named_finite(name, output).double()
        kept, weight = choose(weight, inverse(group.gram, self.damping), count, keep, scores)
        keep_units(block, layout, half, kept)
        if self.refit:
            made = block.get_submodule(name).weight
            made.data = weight.to(made.dtype)


register("prune_structured", PruneStructured())
