"""The kernels written in C: compiled by the machine's own compiler when one is first wanted.

native/int4_rows.c multiplies by 4-bit codes in the order of the file, on every processor that the
compiler knows; torch's int4 kernel is written for AVX-512 and wants an order of its own. It is one
more candidate of kernels.py. native/token.c is for decoding; see token_step.py. Where no compiler
is found, torch does the work.

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

FOLDER = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11")
PATIENCE = 120  # seconds for the compiler
POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
FUNCTIONS = {
    "int4_rows": [POINTER] * 4 + [LONG] * 4 + [INT] * 3,
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
