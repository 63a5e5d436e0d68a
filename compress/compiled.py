"""The kernels written in C: compiled by the machine's own compiler when one is first wanted.

native/int4_rows.c and int8_rows.c multiply by codes in the order of the file, on every processor
that the compiler knows; torch's int4 kernel is written for AVX-512 and wants an order of its own,
its int8 kernel takes one group a row. They are candidates of kernels.py. native/token.c is for
decoding; see token_step.py. Where no compiler is found, torch does the work.

$SLIMBENCH_CC names the compiler (else `cc`); `none` leaves these kernels out. The library is kept
in the cache, under a hash of all that it was made from.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.kernel_choice import cache_dir, machine

FOLDER = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11")
PATIENCE = 120  # seconds for the compiler
POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
FUNCTIONS = {
    "int4_rows": [POINTER] * 4 + [LONG] * 4 + [INT] * 3,
    "int8_rows": [POINTER] * 4 + [LONG] * 4 + [INT] * 2,
    "add_norm": [POINTER] * 5 + [LONG] * 2 + [FLOAT, INT],
    "gate": [POINTER] * 2 + [LONG] * 2 + [INT],
    "attend": [POINTER] * 5 + [LONG] * 6 + [FLOAT, INT],
}
COLUMNS, GROUP = 64, 32  # what in_features and groups must be multiples of


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without a compiler that can make them."""
    wanted = os.environ.get("SLIMBENCH_CC") or "cc"
    compiler = None if wanted == "none" else shutil.which(wanted)
    sources = sorted(FOLDER.glob("*.c"))
    if compiler is None or not sources:
        return None
    # torch's own OpenMP: another copy would bring a second set of threads. Without it: one thread.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    for libraries in ([openmp] if openmp else []) + [[]]:
        try:
            made = ctypes.CDLL(str(_compiled(compiler, sources, libraries)))
            for name, arguments in FUNCTIONS.items():
                getattr(made, name).argtypes = arguments
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
    """The library's file, made if it is not in the cache."""
    texts = [file.read_text() for file in sorted(FOLDER.glob("*.[ch]"))]
    parts = [*texts, compiler, *FLAGS, *map(str, openmp), machine()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = cache_dir() / "compiled" / f"{name}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
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


def fits(layer: Any, dtype: torch.dtype) -> bool:
    """4 or 8 bits in equal groups, input of bfloat16 or float32, codes in the file's order."""
    return (
        layer.bits in (4, 8)
        and not (layer.bits == 8 and layer.offset is not None)
        and dtype in (torch.bfloat16, torch.float32)
        and layer.codes.device.type == "cpu"
        and layer.order is None
        and layer.int4 is None
        and layer.in_features % COLUMNS == 0
        and layer.in_features % layer.group_size == 0
        and layer.group_size % GROUP == 0
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


def multiply(layer: Any, x: Tensor) -> Tensor:
    """x (rows, in) of bfloat16 or float32 times a prepared layer: (rows, out) in x's type.

    Raises MemoryError if there is no room for a copy of x.
    """
    x, pairs = x.contiguous(), layer.pairs
    rows, columns = x.shape
    y = x.new_empty(rows, layer.out_features)
    pointers = layer.codes.data_ptr(), pairs.data_ptr(), x.data_ptr(), y.data_ptr()
    sizes = rows, layer.out_features, columns, columns // pairs.shape[1]
    wide, narrow = pairs.dtype == torch.float32, x.dtype == torch.bfloat16
    if layer.bits == 4:
        short = loaded().int4_rows(*pointers, *sizes, wide, layer.offset is not None, narrow)
    else:
        short = loaded().int8_rows(*pointers, *sizes, wide, narrow)
    if short:
        raise MemoryError("no memory for the inputs of a product")
    return y
