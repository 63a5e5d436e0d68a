"""The kernels written in C: compiled by the machine's own compiler when one is first wanted.

torch's int4 kernel is written for AVX-512 and reads codes in an order of its own; int4_rows.c reads
those of the file, on every processor that the compiler knows. It is one more candidate: where it is
slower, or no compiler is found, torch's kernels do the work.

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

import torch
from torch import Tensor

from compress.kernel_choice import cache_dir, machine

SOURCE = Path(__file__).parent / "int4_rows.c"
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11")
PATIENCE = 120  # seconds for the compiler
COLUMNS, GROUP = 64, 32  # what in_features and groups must be multiples of


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without a compiler that can make them."""
    wanted = os.environ.get("SLIMBENCH_CC") or "cc"
    compiler = None if wanted == "none" else shutil.which(wanted)
    if compiler is None or not SOURCE.is_file():
        return None
    # torch's own OpenMP: another copy would bring a second set of threads. Without it: one thread.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    for libraries in ([openmp] if openmp else []) + [[]]:
        try:
            made = ctypes.CDLL(str(_compiled(compiler, libraries)))
            made.int4_rows.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
            made.int4_rows.argtypes += [ctypes.c_int] * 3
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
        return made
    return None


def _compiled(compiler: str, openmp: list[Path]) -> Path:
    """The library's file, made if it is not in the cache."""
    parts = [SOURCE.read_text(), compiler, *FLAGS, *map(str, openmp), machine()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = cache_dir() / "compiled" / f"{name}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        middle, whole = str(Path(scratch) / "kernels.o"), str(Path(scratch) / "kernels.so")
        flags = [*FLAGS, *(["-fopenmp"] if openmp else [])]
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", middle],
            [compiler, "-shared", middle, *map(str, openmp), "-o", whole],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        os.replace(whole, target)
    return target


def int4(codes: Tensor, pairs: Tensor, x: Tensor, offset: bool) -> Tensor:
    """x (rows, in) times 4-bit codes (out, in / 2) in the file's order: (rows, out) in x's type.

    pairs: (out, groups, 2) of scale and zero or, with `offset`, scale and offset; bfloat16 or
    float32. x: bfloat16 or float32. The groups are equal and their size a multiple of GROUP, in one
    of COLUMNS. Raises MemoryError if there is no room for a copy of x.
    """
    made = library()
    assert made is not None, "no compiled kernels; see fits_compiled"
    x, columns = x.contiguous(), x.shape[1]
    y = x.new_empty(len(x), len(codes))
    size = columns // pairs.shape[1]
    pointers = (each.data_ptr() for each in (codes, pairs, x, y))
    flags = pairs.dtype == torch.float32, offset, x.dtype == torch.bfloat16
    if made.int4_rows(*pointers, len(x), len(codes), columns, size, *flags):
        raise MemoryError("no memory for the inputs of a product")
    return y
