"""Methods one after the other, as one method: `prune_structured(ratio=0.2)+recover+gptq(bits=4)`.

Each stage is given what the one before has made. What a method can be given, and what it leaves, it
says itself (base.py); an order in which they do not fit is refused with the reason.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from compress.base import Compressor, Progress, Runner, part_of, silent

JOIN = "+"
LEFT = {  # what a stage leaves: as a reason why nothing else can follow
    "codes": "leaves packed codes, which nothing rounds, prunes or trains again",
    "sparse": "leaves matrices of chosen zeros, which what follows would fill",
    "factors": "leaves each matrix as a product of two",
    "graph": "leaves a graph for another runtime",
}


@dataclass(frozen=True)
class Pipeline(Compressor):
    """name: those of the stages, joined by +. stages: the methods, two or more."""

    name: str
    stages: tuple[Compressor, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for an order that makes no sense, with the reason."""
        if reason := misfit(self.name, self.stages):
            raise ValueError(reason)
        last = self.stages[-1]
        about = {name: getattr(last, name) for name in ("env", "timed", "foreign", "leaves")}
        about |= {
            "needs_calibration": any(stage.needs_calibration for stage in self.stages),
            "libraries": tuple(dict.fromkeys(sum((each.libraries for each in self.stages), ()))),
        }
        for name, value in about.items():  # what other methods say as a class
            object.__setattr__(self, name, value)

    def in_stages(self) -> tuple[Compressor, ...]:
        """See Compressor."""
        return self.stages

    def pinned(self) -> Self:
        """See Compressor."""
        return replace(self, stages=tuple(stage.pinned() for stage in self.stages))

    def read(self, folder: Path) -> Any:
        """See Compressor."""
        return self.stages[0].read(folder)

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """All stages in memory; each that calibrates or trains reads all of `calibration`."""
        needed = any("parent" in stage.extras for stage in self.stages)
        parent = copy.deepcopy(model) if needed else None
        for number, stage in enumerate(self.stages):
            extras = {"parent": lambda: parent} if "parent" in stage.extras else {}
            model = stage.compress(model, calibration, self.part(number, progress), **extras)
        return model

    def part(self, number: int, progress: Progress) -> Progress:
        """The progress of a stage as a part of the whole, in thousandths of a stage."""
        part = part_of(progress, number, len(self.stages))
        return lambda done, total: part(1000 * done // max(total, 1), 1000)

    def save(self, compressed: Any, folder: Path) -> None:
        """As the last stage does."""
        self.stages[-1].save(compressed, folder)

    def load(self, folder: Path) -> Runner:
        """As the last stage does."""
        return self.stages[-1].load(folder)

    def prefixes(self) -> Iterator[tuple[str, Compressor]]:
        """(name, method) of what each stage but the last has made, first to last."""
        names = self.name.split(JOIN)
        yield names[0], self.stages[0]
        for count in range(2, len(names)):
            yield JOIN.join(names[:count]), Pipeline(JOIN.join(names[:count]), self.stages[:count])

    def orders(self) -> tuple[list["Pipeline"], list[str]]:
        """The stages in every order that fits, this one first; and why others do not."""
        names = self.name.split(JOIN)
        fit, reasons = [], []
        for order in permutations(range(len(names))):
            name = JOIN.join(names[index] for index in order)
            stages = tuple(self.stages[index] for index in order)
            if reason := misfit(name, stages):
                reasons.append(f"{name}: {reason}")
            else:
                fit.append(Pipeline(name, stages))
        return list(dict.fromkeys(fit)), list(dict.fromkeys(reasons))


def misfit(joined: str, stages: tuple[Compressor, ...]) -> str | None:
    """Why stages of the names `joined` by + cannot follow each other; None if they can."""
    names = joined.split(JOIN)
    left, by = stages[0].leaves or "floats", names[0]
    for name, stage in zip(names[1:], stages[1:], strict=True):
        if left not in stage.takes:
            if reason := LEFT.get(left):
                return f"{by} {reason}: {name} cannot follow it"
            return f"{name} reads a file of its own: nothing can come before it"
        if stage.leaves:
            left, by = stage.leaves, name
    return None
