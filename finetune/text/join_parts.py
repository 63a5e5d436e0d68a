"""Parts joined to one training file and one validation file.

A document that comes more than once, in whatever file, is kept where it comes first. A document
is held out for validation if a hash of its text and the seed falls below the share: which ones
does not depend on their order, on the other documents or on the tokenizer. Where so few documents
are held out that they hold less than half of the share, the end of the longest one is added.

Memory: 24 bytes of index and 42 more for each document (0.5 GB for the seven million articles of
English Wikipedia); tokens are copied in pieces.

Source of the hash: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014,
https://doi.org/10.1145/2660193.2660195 (the finaliser of SplitMix64)
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.text.encoder import INDEX
from finetune.text.token_file import TokenFile, TokenWriter

DROPPED, TRAIN, VALIDATION, CUT = range(4)  # CUT: its end is held out
LEAST_SHARE = 0.5  # of the validation share, below which the longest document is cut


class Joined(NamedTuple):
    """What became of the parts. cut: tokens at the end of the longest document held out."""

    train: TokenFile
    validation: TokenFile | None
    duplicates: int
    cut: int


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(documents,) uint64 digests -> bool; about `share` of them are True."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        mixed = digests + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(share * 2**64))


def join(
    parts: Sequence[Path], out: Path, share: float, seed: int, sources: list[dict[str, str]]
) -> Joined:
    """Write out/train.tokens and, for a share above 0, out/validation.tokens.

    Raises ValueError if there is nothing to write.
    """
    first = TokenFile(parts[0]).header
    about = (first["vocabulary"], first["tokenizer_sha256"], sources)
    indexes = [np.fromfile(part.with_suffix(".index"), INDEX) for part in parts]
    borders = np.cumsum([0] + [len(index) for index in indexes])
    index = np.concatenate(indexes)
    del indexes
    if not len(index):
        raise ValueError("no documents are left; lower --minimum or give more text")
    fates, cut = _fates(index, share, seed)
    paths = [out / "train.tokens"] + [out / "validation.tokens"] * bool(share)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TokenWriter(path, *about, end=first["end"])) for path in paths
        ]
        for part, (start, stop) in zip(parts, pairwise(borders.tolist()), strict=True):
            _copy(TokenFile(part), index["tokens"][start:stop], fates[start:stop], cut, writers)
    if not share:
        (out / "validation.tokens").unlink(missing_ok=True)
    files = [TokenFile(path) for path in paths]
    duplicates = int((fates == DROPPED).sum())
    return Joined(files[0], files[1] if share else None, duplicates, cut)


def _fates(index: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, int]:
    """(documents,) uint8 of the constants above, and how many tokens to cut off."""
    fates = np.full(len(index), DROPPED, np.uint8)
    fates[np.unique(index["digest"], return_index=True)[1]] = TRAIN
    fates[(fates == TRAIN) & held_out(index["digest"], share, seed)] = VALIDATION
    tokens = index["tokens"].astype(np.int64)
    wanted = share * int(tokens[fates != DROPPED].sum())
    missing = wanted - int(tokens[fates == VALIDATION].sum())
    kept = np.flatnonzero(fates == TRAIN)
    if not len(kept):
        raise ValueError("all documents would be held out; choose a smaller --validation")
    if missing <= wanted * LEAST_SHARE:
        return fates, 0
    # The longest; of two as long, the one with the smaller digest, wherever it comes.
    longest = kept[np.lexsort((index["digest"][kept], -tokens[kept]))[0]]
    cut = min(int(missing), int(tokens[longest]) // 2)
    if cut:
        fates[longest] = CUT
    return fates, cut


def _copy(
    part: TokenFile, lengths: np.ndarray, fates: np.ndarray, cut: int, writers: list[TokenWriter]
) -> None:
    """Append the documents of a part to where they belong, run by run."""
    ends = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    if ends[-1] != len(part.tokens):
        raise ValueError(f"{part.path} and its index do not agree; delete both, then run again")
    edges = [*(np.flatnonzero(np.diff(fates)) + 1).tolist(), len(fates)]
    for start, stop in pairwise([0, *edges] if len(fates) else []):
        tokens = part.tokens[ends[start] : ends[stop]]
        if fates[start] == CUT:
            end = np.array([part.header["end"]])
            writers[0].append(np.concatenate([tokens[:-cut], end]))
            writers[1].append(tokens[-cut:])
        elif fates[start] != DROPPED:
            writers[fates[start] - TRAIN].append(tokens, stop - start)
