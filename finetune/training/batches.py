"""What a training step reads: batches as a pure function of the step number.

No iterator and so no state: a resumed run asks for step 501 and gets what an uninterrupted one
would have got, and every process of a distributed run works out its own rows by itself.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from finetune.text.token_file import TokenFile

IGNORED = -100  # a target that is neither learned nor scored


class Batch(NamedTuple):
    """Rows of tokens. Padding is on the right, so causal attention needs no mask.

    ids: (rows, tokens) int64. targets: (rows, tokens) int64, at each position the token that
    follows, or IGNORED.
    """

    ids: Tensor
    targets: Tensor


class Batches(Protocol):
    """Where training and validation data come from."""

    steps_per_epoch: int

    def micro_batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """What process `rank` of `world` works through in step `step` (from 0)."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever any batch could."""
        ...


class Windows:
    """Windows of consecutive tokens that do not overlap, in a new random order every epoch.

    Each epoch also moves the borders of the windows by a random offset, so that no token is
    always the first of its window. batch: windows of a step over all processes; micro_batch: the
    most that one forward pass takes.
    """

    def __init__(self, file: TokenFile, context: int, batch: int, micro_batch: int, seed: int):
        self.file, self.context, self.batch = file, context, batch
        self.micro_batch, self.seed = micro_batch, seed
        # One token more than the context, for the last target; one context less, for the offset.
        self.count = (len(file.tokens) - context - 1) // context
        if self.count < 1:
            raise ValueError(
                f"{file.path} holds {len(file.tokens)} tokens, too few for windows of {context}; "
                "prepare more text or choose a smaller context"
            )
        self.steps_per_epoch = max(1, self.count // batch)
        self._epoch: tuple[int, int, Tensor] | None = None  # (epoch, offset, order)

    def micro_batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """See Batches. Rows are dealt out in turn: rank, rank + world, ..."""
        rows = [self.row(step * self.batch + row) for row in range(rank, self.batch, world)]
        windows = torch.stack(rows) if rows else torch.zeros(0, self.context + 1).long()
        return [Batch(part[:, :-1], part[:, 1:]) for part in windows.split(self.micro_batch)]

    def row(self, index: int) -> Tensor:
        """The window (context + 1,) that is the `index`-th of the whole run."""
        epoch, place = divmod(index, self.count)
        offset, order = self._order(epoch)
        return self.file.window(offset + int(order[place]) * self.context, self.context + 1)

    def _order(self, epoch: int) -> tuple[int, Tensor]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(self.context, (), generator=generator))
            self._epoch = epoch, offset, torch.randperm(self.count, generator=generator)
        return self._epoch[1:]

    def fingerprint(self) -> str:
        """See Batches."""
        return f"{self.file.sha256()[:16]}-{self.context}x{self.batch}-{self.seed}"


def evaluation_windows(file: TokenFile, context: int, most: int, rows: int) -> list[Batch]:
    """The first `most` windows of `file`, in order, `rows` at a time; always the same ones."""
    count = min(most, (len(file.tokens) - 1) // context)
    if count < 1:
        raise ValueError(f"{file.path} holds less than one window of {context} tokens")
    windows = torch.stack([file.window(i * context, context + 1) for i in range(count)])
    return [Batch(part[:, :-1], part[:, 1:]) for part in windows.split(rows)]
