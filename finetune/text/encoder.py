"""Documents to ids, in workers: the tokenizer, where it comes from and how it is used.

`from_model` takes a model's tokenizer, `trained` makes one from the sources; either way it lies
in a folder of its own at the end, so that what is prepared can be used without the model.

Each process tokenises with one thread, or n workers would start n times as many threads as there
are cores. Special tokens that occur in a text are read as text: data cannot end a document.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.paths import replaced
from finetune.text import byte_bpe
from finetune.text.documents import Raw, cleaned, digest
from finetune.text.token_file import tokenizer_sha256

INDEX = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("characters", "<u8")])
RECIPE = "recipe.json"  # beside a trained tokenizer: what it was trained on


class Encoded(NamedTuple):
    """A batch after its way through a worker."""

    tokens: np.ndarray  # (tokens of all documents,)
    entries: np.ndarray  # (documents,) of INDEX
    dropped: Counter[str]


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of raw documents, each ended by `end`.

    file: tokenizer.json, of which sha256 is the hash. vocabulary: ids are below it. meaning: the
    tokenizer_sha256 of token files.
    """

    file: Path
    sha256: str
    end: int
    vocabulary: int
    meaning: str
    minimum: int

    def __call__(self, batch: list[Raw]) -> Encoded:
        """Runs in a worker."""
        dropped: Counter[str] = Counter()
        clean = [cleaned(raw, self.minimum, dropped) for raw in batch]
        texts = [text for text in clean if text is not None]
        tokenizer = _tokenizer(self.file, self.sha256)
        with _one_thread():
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array([*encoding.ids, self.end], np.uint32) for encoding in encodings]
        found = [(digest(text), len(row), len(text)) for text, row in zip(texts, rows, strict=True)]
        tokens = np.concatenate(rows) if rows else np.empty(0, np.uint32)
        return Encoded(tokens, np.array(found, INDEX), dropped)


@lru_cache(maxsize=1)
def _tokenizer(file: Path, sha256: str) -> Any:
    """Read once a process. sha256: part of the key, for a file that is replaced."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text: data must not be able to end a document
    return tokenizer


@contextmanager
def _one_thread() -> Iterator[None]:
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def from_model(name: str, place: Path, minimum: int) -> Encoder:
    """The tokenizer of the model `name` (alias, hub id, folder), written to the folder `place`.

    A folder with a tokenizer and no model will do. Raises ValueError if it cannot be used.
    """
    from bench import models  # it imports torch, for which the workers have no use

    folder = Path(os.path.expanduser(name))
    alone = folder.is_dir() and not (folder / "config.json").exists()
    tokenizer = models.tokenizer_in(folder if alone else models.resolve(name).folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-text token; choose another one")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{name}: its tokenizer has no tokenizer.json; convert it first")
    replaced(place, lambda half: byte_bpe.save(tokenizer, half))
    return _encoder(place, minimum)


def trained(
    texts: Iterator[str],
    vocabulary: int,
    special_tokens: tuple[str, ...],
    recipe: dict[str, Any],
    place: Path,
    minimum: int,
) -> Encoder:
    """A byte-level BPE learned from `texts`, in the folder `place`.

    recipe: all that decides the texts; if the folder holds a tokenizer of an equal recipe that
    one is taken and `texts` are not read.
    """
    packages = {"tokenizers": version("tokenizers")}
    wanted = recipe | {"vocabulary": vocabulary, "special": list(special_tokens)} | packages

    def write(half: Path) -> None:
        byte_bpe.save(byte_bpe.train(texts, vocabulary, special_tokens), half)
        (half / RECIPE).write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    try:
        known = json.loads((place / RECIPE).read_text())
    except (OSError, ValueError):
        known = None
    if known != wanted:
        replaced(place, write)
    return _encoder(place, minimum)


def read_texts(batch: list[Raw], minimum: int) -> list[str]:
    """The clean documents of a batch, for `trained`; runs in a worker."""
    ignored: Counter[str] = Counter()
    clean = [cleaned(raw, minimum, ignored) for raw in batch]
    return [text for text in clean if text is not None]


def _encoder(place: Path, minimum: int) -> Encoder:
    from bench import models
    from bench.embedded import sha256_of

    tokenizer = models.tokenizer_in(place)
    file = (place / "tokenizer.json").resolve()
    return Encoder(
        file=file,
        sha256=sha256_of(file),
        end=tokenizer.eos_token_id,
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        meaning=tokenizer_sha256(tokenizer),
        minimum=minimum,
    )
