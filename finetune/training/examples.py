"""Examples as token ids, and batches of them: what a fine-tuning step reads.

An example becomes prompt, target, end-of-text. Only what follows the prompt is learned. The texts
are tokenised together and parted where the prompt's tokens end, so that training, scoring and
generation see the same tokens. Where an example is too long the prompt loses its beginning: the
end of a prompt holds the question.

Each epoch goes through the examples in a new random order. Pools of some batches are sorted by
length and cut into batches of like lengths, which saves most of the padding; the batches of a
pool come in random order.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from finetune.generate import padding_id
from finetune.tasks import Example
from finetune.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 32  # batches that are sorted together
MULTIPLE = 8  # of the tokens in a row: what matrix units like


class Encoded(NamedTuple):
    """One row before padding. targets: the next token at each position, or IGNORED.

    cut: whether something of the example was left out for want of room.
    """

    ids: list[int]
    targets: list[int]
    cut: bool = False


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, target: str
) -> tuple[list[int], list[int]]:
    """The ids of prompt and target as they stand in one text.

    The prompt has what the tokenizer puts before a text. An empty one becomes the token that
    texts begin with, or the one that they end with, so that the target's first token follows
    something.
    """
    first = tokenizer.bos_token_id
    opening = [padding_id(tokenizer) if first is None else first]
    before = tokenizer(prompt, verbose=False)["input_ids"]
    whole = tokenizer(prompt + target, verbose=False)["input_ids"]
    if whole[: len(before)] == before:
        return before or opening, whole[len(before) :]
    # The target's beginning melts into the prompt's last token: they are parted by force.
    return before, tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]


def keep_end(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], room: int) -> list[int]:
    """The last `room` ids (at least 1) of a prompt; a beginning-of-text token is kept as well."""
    if len(prompt) <= room:
        return prompt
    if room > 1 and prompt[0] == tokenizer.bos_token_id:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def encode(example: Example, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Encoded:
    """The row of `example`, of at most max_tokens: target and end-of-text are learned.

    A target that is too long even without its prompt loses its end. Raises ValueError if the
    tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token to end an answer with; set one")
    prompt, target = token_ids(tokenizer, example.prompt, example.target)
    learned = [*target, end]
    # The row's last token is only a target, so one more than max_tokens fits.
    kept = keep_end(tokenizer, prompt, max(1, max_tokens + 1 - len(learned)))
    fitting = learned[: max_tokens + 1 - len(kept)]
    ids = [*kept, *fitting]
    targets = [IGNORED] * (len(kept) - 1) + fitting
    return Encoded(ids[:-1], targets, len(ids) < len(prompt) + len(learned))


class ExampleBatches:
    """Batches of examples; see finetune.training.batches.Batches for the contract.

    max_tokens: of a row, at most the model's context. batch: rows of a step over all processes;
    micro_batch: the most in one forward pass. Rows that do not fill a step at the end of an epoch
    are left out of it: other ones in each epoch. cut: how many examples did not fit whole.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int,
        batch: int,
        micro_batch: int,
        seed: int,
    ):
        if len(examples) < batch:
            raise ValueError(f"{len(examples)} examples do not fill a batch of {batch}; lower it")
        self.encoded = [encode(example, tokenizer, max_tokens) for example in examples]
        self.cut = sum(row.cut for row in self.encoded)
        self.padding, self.max_tokens = padding_id(tokenizer), max_tokens
        self.batch, self.micro_batch, self.seed = batch, micro_batch, seed
        self.steps_per_epoch = len(examples) // batch
        self._epoch: tuple[int, list[list[int]]] | None = None

    def micro_batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """The rows of process `rank` in step `step`: together, all ranks have those of one process.

        Every rank gets equally many micro-batches, as collective operations need. Raises
        ValueError if the batch cannot be dealt out evenly.
        """
        if self.batch % world:
            raise ValueError(f"a batch of {self.batch} cannot be shared by {world} processes")
        rows = [self.encoded[index] for index in self.rows(step)[rank::world]]
        parts = (rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch))
        return [padded(part, self.padding, self.max_tokens) for part in parts]

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of a step, the shortest first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][place]

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.encoded), generator=generator).tolist()
        steps: list[list[int]] = []
        used, pool_rows = self.steps_per_epoch * self.batch, POOL * self.batch
        for start in range(0, used, pool_rows):
            pool = order[start : min(start + pool_rows, used)]
            pool.sort(key=lambda index: len(self.encoded[index].ids))
            batches = [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            steps += [batches[index] for index in shuffled]
        return steps

    def fingerprint(self) -> str:
        """See Batches."""
        content = json.dumps([[row.ids, row.targets] for row in self.encoded])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return f"{digest}-{self.batch}-{self.seed}-{POOL}"


def padded(rows: Sequence[Encoded], padding: int, most: int) -> Batch:
    """Rows of equal length: the next multiple of 8, but never more than `most`."""
    longest = max(len(row.ids) for row in rows)
    width = min(-(-longest // MULTIPLE) * MULTIPLE, most)
    ids = torch.full((len(rows), width), padding)
    targets = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        targets[index, : len(row.targets)] = torch.tensor(row.targets)
    return Batch(ids, targets)
