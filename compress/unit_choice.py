"""Which inputs of a linear layer can go, unit by unit, and what the others do in their place.

y = W x with H = E[x x^T]. Without the inputs S, the least change of y is had by
W - W_S (H^-1_SS)^-1 H^-1_S, costs tr(W_S (H^-1_SS)^-1 W_S^T), and leaves
H^-1 - H^-1_:S (H^-1_SS)^-1 H^-1_S as the inverse over the rest: eq. 3 and 4 of ZipLM.

Source: E. Kurtic et al., "ZipLM", 2023, https://arxiv.org/abs/2302.04089
"""

import torch
from torch import Tensor

from compress.output_error import inverse_factor

ROUNDS = 32  # in which units go; costs are worked out anew in each


def inverse(gram: Tensor, damping: float) -> Tensor:
    """(H + damping)^-1, (in, in) float64; see inverse_factor."""
    factor = inverse_factor(gram, damping)
    return factor.T @ factor


def choose(
    weight: Tensor, inverse: Tensor, count: int, keep: int, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which `keep` of `count` units stay, (keep,) int64 ascending, and the weight for their inputs.

    weight: (out, in) float64, inputs of a unit side by side. inverse: H^-1, (in, in) float64; both
    are used up. scores: (count,), the least go; None for the cost at each unit's turn.
    """
    alive = torch.arange(count)
    rounds = 1 if scores is not None else min(ROUNDS, count - keep)
    for left in range(rounds, 0, -1):
        gone = -((keep - len(alive)) // left)
        order = unit_costs(weight, inverse, len(alive)) if scores is None else scores
        dropped = torch.zeros(len(alive), dtype=torch.bool)
        dropped[torch.argsort(order.cpu(), stable=True)[:gone]] = True
        columns = dropped.repeat_interleave(weight.shape[1] // len(alive))
        weight, inverse = without(weight, inverse, columns)
        alive = alive[~dropped]
    return alive, weight


def without(weight: Tensor, inverse: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (out, kept) and `inverse` (kept, kept) once the inputs `dropped` have gone.

    dropped: (in,) bool.
    """
    kept = ~dropped
    share = torch.linalg.solve(inverse[dropped][:, dropped], inverse[dropped][:, kept])
    return (
        weight[:, kept] - weight[:, dropped] @ share,
        inverse[kept][:, kept] - inverse[kept][:, dropped] @ share,
    )


def unit_costs(weight: Tensor, inverse: Tensor, count: int) -> Tensor:
    """What each unit's going costs once the others have made up for it: (count,)."""
    size = weight.shape[1] // count
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    costs = []
    for columns in torch.arange(weight.shape[1]).split(size):
        part = weight[:, columns]
        own = torch.linalg.solve(inverse[columns][:, columns], part.T)
        costs.append((part.T * own).sum())
    return torch.stack(costs)


def unit_energies(weight: Tensor, gram: Tensor, count: int) -> Tensor:
    """E|W_S x_S|^2 of each unit S: (count,). weight: (out, in), gram: (in, in)."""
    return torch.stack(
        [
            ((weight[:, columns] @ gram[columns][:, columns]) * weight[:, columns]).sum()
            for columns in torch.arange(weight.shape[1]).split(weight.shape[1] // count)
        ]
    )
