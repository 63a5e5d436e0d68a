"""Does one text hold passages of another? Keeps calibration data out of what is measured.

Both texts are reduced to their letters and digits in lower case, so that line breaks, spaces,
punctuation and markup do not hide a copy. Every run of RUN letters gets a 64-bit hash; runs that
stand in both texts are joined to passages. About 0.3 s for two texts of 1.3 MB; 24 bytes a
letter. Headings and phrases shorter than RUN never count; a text shorter than RUN shares nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUN = 64  # letters, a dozen words; a power of two
PASSAGE = 512  # letters, a paragraph of about a hundred words
FRACTION = 0.02  # what unrelated pages of one corpus share (notices, quotations) stays below 1 %


@dataclass(frozen=True)
class Shared:
    """What a text has in common with another.

    fraction: of its letters, those in shared passages. longest: the longest one, as written.
    """

    fraction: float
    longest: str
    longest_letters: int

    @property
    def too_much(self) -> bool:
        """More than texts share by chance: a whole paragraph, or many pieces."""
        return self.longest_letters >= PASSAGE or self.fraction > FRACTION


def shared_passages(text: str, other: str) -> Shared:
    """What part of `text` also stands in `other`."""
    letters, places = _letters(text)
    found = _contains(_run_hashes(_letters(other)[0]), _run_hashes(letters))
    edges = np.flatnonzero(np.diff(found, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2] + RUN - 1  # in letters, ends excluded
    if len(starts) == 0:
        return Shared(0.0, "", 0)
    covered = np.zeros(len(letters) + 1, np.int64)
    np.add.at(covered, starts, 1)
    np.add.at(covered, ends, -1)
    fraction = float((covered.cumsum()[:-1] > 0).mean())
    at = int((ends - starts).argmax())
    longest = text[places[starts[at]] : places[ends[at] - 1] + 1]
    return Shared(fraction, longest, int(ends[at] - starts[at]))


def _letters(text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The letters and digits of `text` as lower-case code points, and where each stands."""
    lower = np.zeros(0x110000, np.uint32)  # code point -> its lower case; 0: not a letter
    for char in set(text):
        if char.isalnum():
            lower[ord(char)] = ord(char.lower()[0])
    codes = lower[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    places = np.flatnonzero(codes)
    return codes[places], places


def _run_hashes(letters: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A polynomial hash, modulo 2**64, of the RUN letters from each place on."""
    hashes = letters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    width, factor = 1, 0xD1342543DE82EF95
    while width < RUN:  # two runs of `width` make one twice as long
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        width, factor = 2 * width, factor * factor % 2**64
    return hashes


def _contains(known: NDArray[np.uint64], asked: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if len(known) == 0:
        return np.zeros(len(asked), np.bool_)
    known = np.sort(known)
    nearest = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return known[nearest] == asked
