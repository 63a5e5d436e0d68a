"""How many units each block keeps so that a share of the blocks' weights goes: whole numbers only.

A block of g groups of heads and c channels holds g * weights[0] + c * weights[1] numbers (see
block_shapes.unit_weights). At least the share `ratio` of them goes.
"""

import math

import torch
from torch import Tensor

from compress.block_shapes import Shape

SPREAD = ("uniform", "global")


def check_budget(ratio: float, spread: str) -> None:
    """Raises ValueError unless `ratio` is a share that can go, and `spread` says from where."""
    if not 0.01 <= ratio <= 0.99:
        raise ValueError(f"ratio must be from 0.01 to 0.99, not {ratio}")
    if spread not in SPREAD:
        raise ValueError(f"spread must be one of {SPREAD}, not {spread!r}")


def uniform(was: Shape, weights: list[int], ratio: float, heads: bool, round_to: int) -> Shape:
    """What one block keeps. heads, round_to: see prune_structured.

    Groups lose the share `ratio`, rounded down; more where the channels alone cannot make up the
    rest. Raises ValueError if even one group and one channel are too much.
    """
    budget = (1 - ratio) * (was.groups * weights[0] + was.channels * weights[1])
    groups = was.groups - math.floor(ratio * was.groups + 1e-9) if heads else was.groups
    while (channels := math.floor((budget - groups * weights[0]) / weights[1] + 1e-9)) < 1:
        groups -= 1
        if groups < 1 or not heads:
            most = 1 - ((1 if heads else was.groups) * weights[0] + weights[1]) / (
                was.groups * weights[0] + was.channels * weights[1]
            )
            raise ValueError(
                f"ratio {ratio:g} leaves a block nothing: {was.groups} groups of heads and "
                f"{was.channels} channels can lose {most:.3f} of their weights at most"
            )
    channels = min(channels, was.channels)
    if channels >= round_to:
        channels -= channels % round_to
    return Shape(groups, channels)


def ranked(
    was: list[Shape],
    scores: list[list[Tensor]],
    weights: list[int],
    ratio: float,
    heads: bool,
    round_to: int,
) -> list[Shape]:
    """What the blocks keep if the units with the least scores over their half's mean go first.

    was: the blocks before anything went, whose weights `ratio` is a share of. scores: of the units
    that are left by now, of each block's halves. Channels go in steps of `round_to`, the last
    ones of a block one by one. Raises ValueError if one group and one channel a block are too much.
    """
    steps = []  # (score, block, which half, units)
    for number, halves in enumerate(scores):
        for which, score in enumerate(halves):
            if which == 0 and not heads:
                continue
            ordered = (score / score.mean().clamp_min(1e-30)).sort().values
            size = round_to if which == 1 and len(ordered) > round_to else 1
            first = len(ordered) % size or size  # the odd ones first: what is left is a multiple
            rest = (len(ordered) - first) // size
            sizes = [first] + [size] * (rest - 1) + [1] * (size if rest else 0)
            for part in ordered.split(sizes)[:-1]:
                steps.append((float(part.mean()), number, which, len(part)))
    kept = torch.tensor([[len(score) for score in halves] for halves in scores])
    cost = torch.tensor(weights)
    total = sum(each.groups * weights[0] + each.channels * weights[1] for each in was)
    for _, number, which, size in sorted(steps):
        if int((kept * cost).sum()) <= (1 - ratio) * total:
            break
        kept[number, which] -= size
    if int((kept * cost).sum()) > (1 - ratio) * total:
        raise ValueError(f"ratio {ratio:g} leaves a block nothing; take less, or round_to=1")
    return [Shape(*sizes) for sizes in kept.tolist()]
