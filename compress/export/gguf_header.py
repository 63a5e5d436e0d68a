"""The header of a GGUF file: parsed without trust, and written.

A file begins with magic, version and counts, then named values of twelve types, then name, shape,
type and place of each tensor; the tensors' bytes follow, aligned. Whatever the header says of
sizes is compared with the file before it is allocated, indexed or read. gguf's own reader trusts
its input, and its writer cannot write an empty list (of a vocabulary without merges).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had shorter counts
WRITTEN_VERSION = 3
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
ALIGNMENTS = tuple(2**power for power in range(3, 17))
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65535, 64, 4  # bytes, bytes, sizes of a tensor
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NUMBERS = {  # type of a value -> code of struct and array
    **{0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B"},
    **{10: "Q", 11: "q", 12: "d"},
}
LEAST_VALUE = 8 + 1 + 4 + 1  # bytes of a key of one letter with a value of one byte
LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # bytes of the entry of a tensor of one dimension


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies. kind: its ggml type. shape: rows first. start, size: bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself; every place in `tensors` is inside `data`, the mapped file.

    metadata: key -> int, float, bool, str, list of str, or array of numbers.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    data: memoryview

    def bytes_of(self, name: str) -> memoryview:
        """The bytes of a tensor, mapped."""
        place = self.tensors[name]
        return self.data[place.start : place.start + place.size]


def parse(path: Path) -> Header:
    """The header of `path`. Raises ValueError, one line naming the file, if anything is wrong."""
    data = _mapped(path)
    if data[:4] != MAGIC:
        raise ValueError(f"{path} is not a GGUF file")
    try:
        return _parse(data)
    except ValueError as error:
        raise ValueError(f"{path} is a corrupt or truncated GGUF file ({error})") from None


def _mapped(path: Path) -> memoryview:
    if not path.is_file():  # a pipe would block
        raise ValueError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # which mmap refuses
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _parse(data: memoryview) -> Header:
    cursor = _Cursor(data)
    cursor.take(len(MAGIC), "the magic number")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, not one of {VERSIONS}")
    tensor_count = cursor.count("the number of tensors", LEAST_TENSOR)
    value_count = cursor.count("the number of values", LEAST_VALUE)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text("a key", LONGEST_KEY)
        if not key or key in metadata:
            raise ValueError(f"the key {key[:80]!r} stands twice" if key else "a key is empty")
        metadata[key] = _value(cursor, f"the value of {key[:80]!r}")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment not in ALIGNMENTS:
        raise ValueError(f"general.alignment is {alignment!r}, no power of two from 8 to 65536")
    entries = [_entry(cursor, index) for index in range(tensor_count)]
    start = cursor.at + -cursor.at % alignment
    return Header(metadata, _places(entries, start, alignment, len(data)), data)


def _value(cursor: "_Cursor", what: str) -> Any:
    kind = cursor.number("I", f"the type of {what}")
    if kind == ARRAY:
        kind = cursor.number("I", f"the type of {what}")
        if kind == STRING:
            count = cursor.count(f"the length of {what}", 8)
            return [cursor.text(what) for _ in range(count)]
        if kind in NUMBERS:  # nested arrays have no use and no reader
            found = array(NUMBERS[kind])
            count = cursor.count(f"the length of {what}", found.itemsize)
            found.frombytes(cursor.take(count * found.itemsize, what))
            return found
    elif kind == STRING:
        return cursor.text(what)
    elif kind in NUMBERS:
        number = cursor.number(NUMBERS[kind], what)
        if kind == BOOL and number > 1:
            raise ValueError(f"{what} is neither true nor false")
        return bool(number) if kind == BOOL else number
    raise ValueError(f"{what} is of unknown type {kind}")


def _entry(cursor: "_Cursor", index: int) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor, as the file says."""
    name = cursor.text(f"the name of tensor {index}", LONGEST_NAME)
    what = f"tensor {name!r}"
    dimensions = cursor.number("I", f"the shape of {what}")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{what} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q", f"the shape of {what}") for _ in range(dimensions))
    kind = cursor.number("I", f"the type of {what}")
    return name, shape[::-1], kind, cursor.number("Q", f"the offset of {what}")


def _places(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, end: int
) -> dict[str, TensorPlace]:
    """The tensors' places, after a check that each lies alone between `start` and `end`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    places: dict[str, TensorPlace] = {}
    for name, shape, kind, offset in entries:
        if not name or name in places:
            raise ValueError(f"tensor {name!r} stands twice" if name else "a tensor has no name")
        if kind not in known:
            raise ValueError(f"tensor {name!r} is of unknown type {kind}")
        label, block, block_bytes = known[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} cannot be {shape} of type {label}")
        size = prod(shape) // block * block_bytes
        if offset % alignment or start + offset + size > end:
            raise ValueError(f"tensor {name!r} at {offset} is not aligned, or outside the file")
        places[name] = TensorPlace(label, shape, start + offset, size)
    last = start
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start < last:
            raise ValueError(f"tensor {name!r} overlaps another")
        last = place.start + place.size
    return places


class _Cursor:
    """Reads a file from its beginning; nothing it returns reaches beyond the end."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"{what} would end after the file")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.number("Q", what)
        if count * least > len(self.data) - self.at:
            raise ValueError(f"{what}, {count}, is more than the file can hold")
        return count

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise ValueError(f"{what} is longer than {longest} bytes")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written, see TensorPlace. make: gives its bytes, uint8, in its turn."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(path: Path, metadata: dict[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a file of version 3, tensor by tensor.

    metadata: key -> bool, int (32 bits, unsigned), float (rounded to 32 bits), str, or list of str,
    of int (32 bits, signed) or of float.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    entries, sizes, offset = [], [], 0
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        entries.append(_text(tensor.name) + shape + struct.pack("<IQ", kind, offset))
        sizes.append(prod(tensor.shape) // block * block_bytes)
        offset += sizes[-1] + -sizes[-1] % ALIGNMENT
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", WRITTEN_VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _packed(value))
        file.writelines(entries)
        for tensor, size in zip(tensors, sizes, strict=True):
            file.write(bytes(-file.tell() % ALIGNMENT))
            content = tensor.make().contiguous().numpy()
            assert content.nbytes == size, f"{tensor.name}: {content.nbytes} bytes, not {size}"
            file.write(content.data)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _packed(value: Any) -> bytes:
    """Type and bytes of a value."""
    if not isinstance(value, list):
        return struct.pack("<I", _kind(value)) + _bare(value, _kind(value))
    kind = _kind(value[0]) if value else STRING
    kind = INT32 if kind == UINT32 else kind
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    return head + b"".join(_bare(item, kind) for item in value)


def _kind(value: Any) -> int:
    return {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}[type(value)]


def _bare(value: Any, kind: int) -> bytes:
    return _text(value) if kind == STRING else struct.pack(f"<{NUMBERS[kind]}", value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
