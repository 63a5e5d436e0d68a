"""The kernels written in C: compiled by the machine's own compiler when one is first wanted.

native/int4_rows.c and int8_rows.c multiply by codes in the order of the file, on every processor
that the compiler knows; torch's int4 kernel is written for AVX-512 and wants an order of its own,
its int8 kernel takes one group a row. native/rounded_rows.c does the same with inputs rounded to 15
bits, and rounded_many.c for many rows of input; native/dense_rows.c multiplies by plain weights.
They are candidates of kernels.py.
native/token.c and decode.c are for decoding; see token_step.py. Where no compiler is found, torch
does the work.

$SLIMBENCH_CC names the compiler (else `cc`); `none` leaves these kernels out. The library is kept
in the cache, under a hash of all that it was made from.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.kernel_choice import NATIVE, cache_dir, machine

FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11")
PATIENCE = 120  # seconds for the compiler
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
FUNCTIONS = {
    "has_rounded_rows": [],
    "product": [POINTER] * 3 + [LONG, INT],
    "decode": [POINTER] * 3 + [LONG] * 2,
}
COLUMNS, GROUP = 64, 32  # what in_features and groups must be multiples of
LONGEST = 2**16  # inputs of a layer: some of what C keeps for them is on the stack
BLOCK = 128  # inputs that are rounded by one step, at most
TYPES = {torch.bfloat16: 16, torch.float32: 32}


class Matrix(ctypes.Structure):
    """`matrix` of native/decode.c: a layer. All zeros: one that is not computed there."""

    _fields_ = (
        *((name, POINTER) for name in ("codes", "pairs", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "size", "block")),
        *((name, ctypes.c_int32) for name in ("bits", "wide", "offset", "integers")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without a compiler that can make them."""
    wanted = os.environ.get("SLIMBENCH_CC") or "cc"
    compiler = None if wanted == "none" else shutil.which(wanted)
    sources = sorted(NATIVE.glob("*.c"))
    if compiler is None or not sources or sys.byteorder != "little":
        return None
    # torch's own OpenMP: another copy would bring a second set of threads. Without it: one thread.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    for libraries in ([openmp] if openmp else []) + [[]]:
        try:
            made = ctypes.CDLL(str(_compiled(compiler, sources, libraries)))
            for name, arguments in FUNCTIONS.items():
                getattr(made, name).argtypes = arguments
        except PermissionError:
            return None
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
        return made
    return None


def loaded() -> ctypes.CDLL:
    """The compiled kernels, where `library` has said that there are any."""
    made = library()
    assert made is not None, "no compiled kernels; ask `library` first"
    return made


def _compiled(compiler: str, sources: list[Path], openmp: list[Path]) -> Path:
    """The library's file, made if it is not in the cache.

    Raises PermissionError if somebody else could have put it there.
    """
    texts = [file.read_text() for file in sorted(NATIVE.glob("*.[ch]"))]
    parts = [*texts, compiler, *FLAGS, *map(str, openmp), machine()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = cache_dir() / "compiled" / f"{name}.so"
    if target.exists():
        _refuse_foreign(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_foreign(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        whole = str(Path(scratch) / "kernels.so")
        flags = [*FLAGS, *(["-fopenmp"] if openmp else [])]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", file]
            for source, file in zip(sources, objects, strict=True)
        ]
        commands.append([compiler, "-shared", *objects, *map(str, openmp), "-lm", "-o", whole])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        os.replace(whole, target)
    return target


def _refuse_foreign(path: Path) -> None:
    """Raises PermissionError unless `path` and its folder are the user's alone to write."""
    if not hasattr(os, "getuid"):
        return
    for each in (path, path.parent):
        status = each.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"others can write {each}: it is not loaded")


def fits(layer: Any, dtype: torch.dtype) -> bool:
    """4 or 8 bits in equal groups, input of bfloat16 or float32, codes in the file's order."""
    return (
        layer.bits in (4, 8)
        and not (layer.bits == 8 and layer.offset is not None)
        and dtype in TYPES
        and layer.codes.device.type == "cpu"
        and layer.order is None
        and layer.int4 is None
        and layer.in_features % COLUMNS == 0
        and layer.in_features <= LONGEST
        and layer.in_features % layer.group_size == 0
        and layer.group_size % GROUP == 0
        and library() is not None
    )


def fits_int16(layer: Any, dtype: torch.dtype) -> bool:
    """The same, on a processor that has the instructions; float32 would lose by the rounding."""
    return dtype == torch.bfloat16 and fits(layer, dtype) and bool(loaded().has_rounded_rows())


def fits_dense(layer: Any, dtype: torch.dtype) -> bool:
    """Plain weights of the input's type."""
    return (
        dtype in TYPES
        and layer.codes.dtype == dtype
        and layer.codes.device.type == "cpu"
        and layer.codes.is_contiguous()
        and layer.in_features % GROUP == 0
        and library() is not None
    )


def prepare(layer: Any) -> None:
    """Scale and zero, or scale and offset, beside each other: `pairs`, (out, groups, 2).

    Zeros are whole numbers below 256, exact in every type; scales stay in theirs, or go to float32.
    """
    if layer.pairs is None:
        other = layer.offset
        if other is None:
            other = layer.zeros().int() - (128 if layer.bits == 8 else 0)
        both = torch.stack([layer.scale, other.to(layer.scale.dtype)], dim=-1)
        both = both if both.dtype == torch.bfloat16 else both.float()
        layer.pairs = both.expand(layer.out_features, -1, -1).contiguous()


def matrix(layer: Any, int16: bool = False) -> Matrix:
    """A prepared or plain layer as C has it, without its bias; valid while its tensors live."""
    rows, columns = layer.out_features, layer.in_features
    if not layer.bits:
        bits = TYPES[layer.codes.dtype]
        return Matrix(layer.codes.data_ptr(), None, None, rows, columns, bits=bits)
    size = columns // layer.pairs.shape[1]
    block = 0 if not int16 else size if size <= BLOCK else gcd(size, BLOCK)
    wide, offset = layer.pairs.dtype == torch.float32, layer.offset is not None
    pointers = layer.codes.data_ptr(), layer.pairs.data_ptr(), None
    return Matrix(*pointers, rows, columns, size, block, layer.bits, wide, offset)


def multiply(layer: Any, x: Tensor, int16: bool = False) -> Tensor:
    """x (rows, in) of bfloat16 or float32 times a prepared layer: (rows, out) in x's type.

    int16: inputs rounded to whole numbers first; see native/rounded.h. Raises MemoryError if
    there is no room for a copy of x.
    """
    x = x.contiguous()
    y = x.new_empty(len(x), layer.out_features)
    struct = layer.structs.get(int16)
    if struct is None or struct.codes != layer.codes.data_ptr():
        struct = layer.structs[int16] = matrix(layer, int16)
    if loaded().product(
        ctypes.byref(struct), x.data_ptr(), y.data_ptr(), len(x), x.dtype == torch.bfloat16
    ):
        raise MemoryError("no memory for the inputs of a product")
    return y
