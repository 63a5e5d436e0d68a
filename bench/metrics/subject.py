"""What a metric may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.data import Blocks
from compress.base import Runner

Progress = Callable[[int, int], None]  # (done, in all)
Metric = Callable[["Subject", Progress], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One saved artefact, loaded, and how to measure it.

    artefact: the folder as the method saved it. blocks: evaluation tokens. prompt_tokens,
    new_tokens: lengths for latency. made_from: the model's folder, where the artefact's format is
    not ours.
    """

    runner: Runner
    artefact: Path
    blocks: Blocks
    prompt_tokens: int
    new_tokens: int
    made_from: Path | None = None
