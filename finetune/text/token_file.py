"""Token files: ids on disk, memory-mapped, so that a text of any size costs no memory to train on.

A file is 8 bytes of magic, the length of the header as a little-endian uint64, a JSON header
padded with spaces so that what follows starts at a multiple of 4096 bytes, then the ids as
little-endian uint16 (vocabularies up to 65536) or uint32. The ids of each document end with the
tokenizer's end-of-text id. Files are written beside their place and renamed when they are whole
and on disk; equal input gives equal bytes, so a file holds no date.

Not a general array format: one row of ids, append only, and nothing in it can run code.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"SLIMTOKS"
FORMAT, VERSION = "slimbench tokens", 1
PREFIX = struct.Struct("<8sQ")
PAGE = 4096
MAX_HEADER = 64 << 20  # a header with the names of half a million sources
SLACK = 1024  # room in the header for what is known at the end only
CHUNK = 1 << 20  # ids checked, hashed and written at once
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def tokenizer_sha256(tokenizer: Any) -> str:
    """What ids mean: sha256 over the (token, id) pairs of a transformers tokenizer.

    Equal for all ways of loading and saving the same vocabulary.
    """
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


class TokenFile:
    """A finished token file, read-only and memory-mapped; opening it reads the header alone.

    tokens: (count,) uint16 or uint32. header: see `TokenWriter`. Raises ValueError naming the file
    for anything but a whole file of this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX.size)
            if prefix[:8] != MAGIC:
                raise ValueError(f"{path} is not a token file; make one with `prepare`")
            if len(prefix) < PREFIX.size:
                raise ValueError(f"{path} is cut short; run `prepare` again")
            length = PREFIX.unpack(prefix)[1]
            if length > MAX_HEADER or (start := PREFIX.size + length) % PAGE or start > size:
                raise ValueError(
                    f"{path}: a header of {length} bytes; damaged, run `prepare` again"
                )
            self.header = _header(file.read(length), self.path)
        dtype, count = DTYPES[self.header["dtype"]], self.header["tokens"]
        if size != start + count * dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes where {count} tokens of {dtype.itemsize} bytes need "
                f"{start + count * dtype.itemsize}; cut short or damaged, run `prepare` again"
            )
        self.tokens: np.ndarray = np.empty(0, dtype)  # nothing cannot be mapped
        if count:
            self.tokens = np.memmap(self.path, dtype, "r", offset=start, shape=(count,))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself; it is not sent the tokens."""
        return TokenFile, (self.path,)

    def window(self, start: int, length: int) -> "Tensor":
        """(length,) int64: a copy of the tokens from `start` on. Raises ValueError outside."""
        import torch

        if not 0 <= start <= start + length <= len(self.tokens):
            raise ValueError(
                f"{self.path} has {len(self.tokens)} tokens: none from {start} to {start + length}"
            )
        return torch.from_numpy(self.tokens[start : start + length].astype(np.int64))

    def sha256(self) -> str:
        """Identity of header and content; cheap, because the header holds the content's sha256."""
        return hashlib.sha256(_dump(self.header)).hexdigest()

    def verify(self) -> None:
        """Read all tokens. Raises ValueError if they are not those that were written."""
        digest = hashlib.sha256()
        for at in range(0, len(self.tokens), CHUNK):
            digest.update(self.tokens[at : at + CHUNK].tobytes())
        if digest.hexdigest() != self.header["content_sha256"]:
            raise ValueError(f"{self.path}: its tokens have changed; run `prepare` again")


class TokenWriter:
    """Appends ids to a file that appears at `path`, whole, when the writer is finished.

    Used as a context manager: leaving it finishes the file, leaving it by an exception leaves
    nothing behind. vocabulary: ids are below it. tokenizer_sha256: of the function above.
    sources: [{name, sha256}]. about: further JSON values for the header; format, version, dtype,
    tokens, documents, vocabulary and content_sha256 are filled in here.
    """

    def __init__(
        self,
        path: Path,
        vocabulary: int,
        tokenizer_sha256: str = "",
        sources: Sequence[dict[str, str]] = (),
        **about: Any,
    ) -> None:
        self.path = path
        self.tokens = self.documents = 0
        self._vocabulary = vocabulary
        self._about = about | {"tokenizer_sha256": tokenizer_sha256, "sources": list(sources)}
        self._kind = "uint16" if vocabulary <= 1 << 16 else "uint32"
        self._digest = hashlib.sha256()
        need = PREFIX.size + len(_dump(self._header())) + SLACK
        self._start = -(-need // PAGE) * PAGE
        # One fixed name: what a killed writer left is overwritten by the next one.
        self._temporary = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        self._file.seek(self._start)

    def append(self, tokens: np.ndarray | Sequence[int], documents: int = 1) -> None:
        """Add the ids of some documents. Raises ValueError for one outside the vocabulary."""
        for at in range(0, len(tokens), CHUNK):
            chunk = np.asarray(tokens[at : at + CHUNK])
            if int(chunk.max()) >= self._vocabulary or int(chunk.min()) < 0:
                worst = int(chunk.max()) if int(chunk.min()) >= 0 else int(chunk.min())
                raise ValueError(f"{self.path}: id {worst} with {self._vocabulary} tokens in all")
            data = chunk.astype(DTYPES[self._kind]).tobytes()
            self._digest.update(data)
            self._file.write(data)
        self.tokens += len(tokens)
        self.documents += documents

    def finish(self, **about: Any) -> TokenFile:
        """Write the header, put the file in its place and open it. about: as in the class."""
        self._about |= about
        length = self._start - PREFIX.size
        text = _dump(self._header())
        if len(text) > length:
            raise ValueError(f"{self.path}: the header outgrew its {length} bytes")
        self._file.seek(0)
        self._file.write(PREFIX.pack(MAGIC, length) + text.ljust(length))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        return TokenFile(self.path)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._file.closed:
                self.finish()
        finally:
            if not self._file.closed:
                self._file.close()
                with contextlib.suppress(FileNotFoundError):
                    self._temporary.unlink()

    def _header(self) -> dict[str, Any]:
        return self._about | {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._kind,
            "tokens": self.tokens,
            "documents": self.documents,
            "vocabulary": self._vocabulary,
            "content_sha256": self._digest.hexdigest(),
        }


def _dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, allow_nan=False).encode()


def _header(raw: bytes, path: Path) -> dict[str, Any]:
    """The header, checked as far as it can be without the tokens."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header; run `prepare` again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}: its header is not a token file's; run `prepare` again")
    if header.get("version") != VERSION:
        found = header.get("version")
        raise ValueError(f"{path}: version {found!r}, not {VERSION}; run `prepare` again")
    dtype = header.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: dtype {dtype!r}; one of {', '.join(DTYPES)}")
    for name in ("tokens", "documents", "vocabulary"):
        value = header.get(name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{path}: {name} is {value!r}, not a count; run `prepare` again")
    for name in ("tokenizer_sha256", "content_sha256"):
        if not isinstance(header.get(name), str):
            raise ValueError(f"{path}: no {name} in the header; run `prepare` again")
    if not isinstance(header.get("sources"), list):
        raise ValueError(f"{path}: no sources in the header; run `prepare` again")
    return header


def sync_folder(folder: Path) -> None:
    """Make a renaming in `folder` last: without this a power cut may undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
