"""Text to measure on and text to calibrate with: a name becomes blocks of token ids.

A name is `sample` (in this package), a known data set (files below $SLIMBENCH_DATA, else the hub)
or the path of a .txt, .jsonl or .jsonl.gz file. It stands for two texts, used as they are, byte
for byte: evaluation and calibration. Where a data set has splits they are test and validation;
a single file is cut into its first 80 % (calibration) and last 20 % (evaluation) of documents,
paragraphs (parted by blank lines) or, where there is only one paragraph, lines. Documents are
joined by a blank line.

WikiText is the raw file in one piece, ` = Title = ` lines and ` \\n` blank lines included. The
GPTQ paper's code joins the hub's rows by two newlines instead: its figures differ a little.

Source: E. Frantar et al., "GPTQ", 2022, https://arxiv.org/abs/2210.17323 (windows, random draw)
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.data_sets import SOURCES, UnknownData, contents
from bench.overlap import shared_passages
from bench.text_files import Text, join, read, split_in_two
from compress.registry import did_you_mean

if TYPE_CHECKING:  # transformers takes seconds to import and only the type is needed
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Blocks:
    """Token ids cut from one text, with what a record must say about them."""

    ids: Tensor  # (count, length) int64
    data: str  # the name asked for
    split: str
    sha256: str  # of the text used
    tokens: int  # in the whole text, before cutting


def names() -> dict[str, str]:
    """Every known data set with one line about it; paths of files are accepted besides."""
    return {name: source.about for name, source in SOURCES.items()}


def texts(name: str) -> tuple[Text, Text]:
    """The evaluation text and the calibration text of `name`.

    Raises UnknownData when there is no such name or file, or the data set is neither local nor
    on the hub; ValueError when a file is there and unusable (names the file and the place).
    """
    if name not in SOURCES:
        return split_in_two(read(_path(name)), name)
    parts = contents(name)
    if len(parts) == 1:
        return split_in_two(parts[0], name)
    evaluation, calibration = map(Text, map(join, parts), SOURCES[name].splits)
    return evaluation, calibration


def check(name: str) -> None:
    """Raise what `texts` raises, before any model is loaded."""
    texts(name)


def fingerprint(name: str) -> str:
    """12 hex digits over both texts of `name`: changes whenever a result could."""
    both = " ".join(text.sha256 for text in texts(name))
    return hashlib.sha256(both.encode()).hexdigest()[:12]


def check_disjoint(evaluation: str, calibration: str) -> None:
    """Raise ValueError if the text of `calibration` shares content with that of `evaluation`.

    Both are data names. Under two different names a local file counts whole, not only its 80 %:
    a copy of the evaluation file, or a file that holds it among others, is always refused.
    Short passages that texts share by chance are tolerated: see `bench.overlap`.
    """
    measured = texts(evaluation)[0].text
    rest, used = texts(calibration)
    other = used.text
    if calibration != evaluation and calibration not in SOURCES:
        other += "\n\n" + rest.text
    shared = shared_passages(measured, other)
    if shared.too_much:
        excerpt = " ".join(shared.longest[:60].split())
        raise ValueError(
            f"calibration data {calibration!r} holds {shared.fraction:.1%} of the evaluation text "
            f"of {evaluation!r} ({excerpt!r}...); name other text with --calibration"
        )


def evaluation_blocks(
    name: str, tokenizer: "PreTrainedTokenizerBase", window: int, limit: int | None = None
) -> Blocks:
    """The whole evaluation text in consecutive windows of `window` tokens, none overlapping.

    Tokenised in one piece, without special tokens; the incomplete last window is dropped.
    limit: only the first `limit` windows. Raises ValueError if there is not one whole window.
    """
    _at_least("window", window, 2)  # the first token of a window is context only
    if limit is not None:
        _at_least("limit", limit, 1)
    text = texts(name)[0]
    ids = _tokenise(text, tokenizer)
    count = len(ids) // window
    if count == 0:
        raise ValueError(
            f"data {name!r} ({text.split}) holds {len(ids)} tokens, less than one window of "
            f"{window}; use a longer text or a smaller window"
        )
    windows = ids[: count * window].view(count, window)[:limit]
    return Blocks(windows.clone(), name, text.split, text.sha256, len(ids))


def calibration_blocks(
    name: str, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int, seed: int
) -> Blocks:
    """`samples` windows of `length` tokens, drawn at random from the calibration text.

    Equal arguments give equal ids. No two windows overlap where the text holds samples * length
    tokens. A shorter text of at least 4 * length tokens gives windows that overlap (their starts
    differ): less information than the same number from a longer text. Raises ValueError below.
    """
    _at_least("samples", samples, 1)
    _at_least("length", length, 1)
    text = texts(name)[1]
    ids = _tokenise(text, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    spare = len(ids) - samples * length
    starts = len(ids) - length + 1
    if spare >= 0:
        offset = int(torch.randint(min(spare, length - 1) + 1, (), generator=generator))
        cells = torch.randperm((len(ids) - offset) // length, generator=generator)
        first = offset + cells[:samples] * length
    elif len(ids) >= 4 * length and starts >= samples:
        first = torch.randperm(starts, generator=generator)[:samples]
    else:
        raise ValueError(
            f"data {name!r} ({text.split}) holds {len(ids)} tokens, too few to draw {samples} "
            f"samples of {length}; use a longer text, fewer samples or shorter ones"
        )
    windows = ids[first[:, None] + torch.arange(length)]  # (samples, length)
    return Blocks(windows, name, text.split, text.sha256, len(ids))


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{what} must be at least {least}, not {value}")


def _tokenise(text: Text, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    # verbose=False: a text longer than the model's context is what we cut, not a mistake.
    encoded = tokenizer(text.text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _path(name: str) -> Path:
    """`name` as a local file of a kind that can be read. Never a URL, folder or device."""
    path = Path(name)
    looks_like_a_path = "/" in name or os.sep in name or name.lower().endswith(SUFFIXES)
    if not looks_like_a_path and not path.is_file():
        raise UnknownData(f"no data and no file {name!r}; {did_you_mean(name, SOURCES)}")
    if not path.exists():
        raise UnknownData(f"data file {name!r} does not exist")
    if not path.is_file() or not name.lower().endswith(SUFFIXES):
        raise ValueError(f"data {name!r} is not a file ending in {', '.join(SUFFIXES)}")
    return path
