"""What a task is: examples, which part of them is learned, and how answers are judged.

A task is one file in this folder: a subclass of Task and a line `register(...)`. Everything else
(batches, training, scoring, the command line) works from the fields below, so that no other file
is touched when one is added. A task reads data sets; it brings no text of its own.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from bench.errors import UsageError
from compress.registry import did_you_mean

Kind = Literal["language_model", "choice", "generation"]
Metric = Literal["perplexity", "accuracy", "accuracy_f1", "answers", "nlg"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One thing to learn or to answer.

    prompt: context, never learned. target: the right continuation, which is learned; it starts
    with a space where the format needs one. candidates: of a choice, all continuations, the
    target among them. references: of a generation, every right answer. group: what intervals
    resample, such as the id of a question; never text of the data set.
    """

    prompt: str
    target: str
    candidates: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated unless the command line says otherwise.

    no_repeat_ngram: so many tokens in a row never come twice in an answer; 0: no such rule.
    length_penalty: exponent of the length by which a beam's log-probability is divided.
    """

    max_new_tokens: int = 32
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


class Task:
    """Base of all tasks: set the class fields, write `read`.

    special_tokens: added to the tokenizer before training, the padding token included.
    metric: which figures `finetune evaluate` reports. In "accuracy_f1" the first candidate is the
    positive one.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    metric: ClassVar[Metric]
    special_tokens: ClassVar[tuple[str, ...]] = ()
    padding_token: ClassVar[str | None] = None
    decoding: ClassVar[Decoding] = Decoding()

    def examples(self, split: str) -> list[Example]:
        """The examples of "train", "validation" or "test", in a fixed order.

        Raises UsageError for another split, UnknownData (with the cure) if the data is not here,
        ValueError naming the file and row if it is not what it should be.
        """
        if split not in SPLITS:
            raise UsageError(f"task {self.name!r} has no split {split!r}; one of {SPLITS}")
        found = self.read(split)
        if not found:
            raise ValueError(f"task {self.name!r}: split {split!r} is empty; is the data complete?")
        return found

    def read(self, split: str) -> list[Example]:
        """The examples of a split that exists."""
        raise NotImplementedError


TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Make `task` available under its name."""
    if task.name in TASKS:
        raise ValueError(f"task {task.name!r} is registered twice")
    TASKS[task.name] = task


def get(name: str) -> Task:
    """The task `name`. Raises UsageError with the nearest names that exist."""
    if name not in TASKS:
        raise UsageError(f"no task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]


def checksum(examples: Iterable[Example]) -> str:
    """SHA-256 over every field of every example, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
