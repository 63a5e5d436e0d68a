"""Which kernel a layer uses: measured once for each shape, remembered for this machine.

The choice is for a few rows of input (decoding) and for many (prefill, evaluation). It is kept in
kernels.json in the cache, under the processor, its threads and torch's version, so that a second
run, and every method with the same shapes, computes the same way. Deleting the file costs a second
or two. What the file says is never trusted further than to name one of the kernels that fit.
"""

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compress.kernels import Kernel

NATIVE = Path(__file__).parent / "native"  # see compiled.py
FEW_ROWS = 16  # fewer rows than this count as few
MEASURED_ROWS = {"few": 1, "many": 128}
REPEATS = {"few": 21, "many": 3}
HOPELESS = 3  # times the best so far: not measured any further
CALLED = 20  # microseconds that a layer costs in decoding if Python has to be asked for it
PATIENCE = 5e5  # microseconds spent on one kernel, beyond its first product


def cache_dir() -> Path:
    """$SLIMBENCH_CACHE, or ~/.cache/slimbench; absolute, not necessarily there yet."""
    chosen = os.environ.get("SLIMBENCH_CACHE") or "~/.cache/slimbench"
    # os.path.expanduser leaves an unknown ~name alone where Path.expanduser raises.
    return Path(os.path.expanduser(chosen)).resolve()


def kernel_for(layer: Any, rows: int, dtype: torch.dtype) -> "Kernel":
    """What multiplies so many rows of type `dtype` by `layer`, out of its candidates.

    Kept in `layer.chosen`; measured where it is new.
    """
    if dtype not in layer.chosen:
        layer.chosen[dtype] = choose(layer, dtype, layer.candidates)
    few, many = layer.chosen[dtype]
    return few if rows < FEW_ROWS else many


def choose(
    layer: Any, dtype: torch.dtype, candidates: "Sequence[Kernel]"
) -> "tuple[Kernel, Kernel]":
    """The kernels for few and for many rows of type `dtype`; prepares `layer` for both.

    The one for few rows is chosen first: it may want the codes in an order of its own, and the
    other is measured on what it then finds.
    """
    chosen = []
    for rows in MEASURED_ROWS:
        any_rows = rows == "few" or layer.codes.is_cuda  # there they are as good for many
        fitting = [each for each in candidates if any_rows or not each.few]
        fitting = [each for each in fitting if each.fits(layer, dtype)]
        if len(fitting) > 1:
            fitting = [_remembered(layer, dtype, rows, fitting)]
        fitting[0].prepare(layer)
        chosen.append(fitting[0])
    return chosen[0], chosen[1]


def _remembered(layer: Any, dtype: torch.dtype, rows: str, fitting: "list[Kernel]") -> "Kernel":
    """The best of `fitting`, from the table or measured and entered there."""
    names = [kernel.name for kernel in fitting]
    key = " ".join([rows, str(dtype).removeprefix("torch."), shape_of(layer), *names])
    table = _table(str(cache_dir()))
    known = table.get(key)
    if not isinstance(known, dict) or sorted(known) != sorted(names):
        known = table[key] = measured(layer, dtype, rows, fitting)
        _write(table)
    more = CALLED if rows == "few" else 0
    return min(fitting, key=lambda kernel: known[kernel.name] + more * kernel.called)


def shape_of(layer: Any) -> str:
    """What decides how fast a layer is, as text."""
    grid = "offset" if layer.offset is not None else "symmetric" if layer.zero is None else "zeros"
    held = "int4pack" if layer.int4 is not None else "file"
    return (
        f"{layer.in_features}->{layer.out_features} {layer.kind} {layer.bits} bits "
        f"groups {layer.group_size} {grid} {held}{' order' if layer.order is not None else ''}"
    )


def measured(
    layer: Any, dtype: torch.dtype, rows: str, fitting: "Sequence[Kernel]"
) -> dict[str, float]:
    """Microseconds that each kernel takes for `layer`, by name: the least of a few times.

    What else the machine does can only add to a time. One that cannot win any more is not repeated,
    nor is any beyond PATIENCE: at the shapes of a large model a hopeless kernel takes seconds.
    """
    x = torch.ones(MEASURED_ROWS[rows], layer.in_features, dtype=dtype, device=layer.codes.device)
    found: dict[str, float] = {}
    for kernel in fitting:
        twin = layer.twin() if kernel.few else layer  # preparing changes what a layer holds
        kernel.prepare(twin)
        first = _microseconds(kernel, twin, x)
        samples = [first]
        best = min(found.values(), default=first)
        while sum(samples) < PATIENCE and min(samples) < HOPELESS * best:
            samples.append(_microseconds(kernel, twin, x))
            if len(samples) > REPEATS[rows]:
                break
        found[kernel.name] = round(min(samples), 1)
    return found


def _microseconds(kernel: "Kernel", layer: Any, x: torch.Tensor) -> float:
    """One product's time."""
    start = time.perf_counter()
    kernel.multiply(layer, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def report() -> list[str]:
    """The lines of this machine's table, for people: shape, then kernels, the fastest first."""
    lines = []
    for key, known in sorted(_table(str(cache_dir())).items()):
        ranked = sorted(known.items(), key=lambda pair: pair[1])
        shape = key.removesuffix(" ".join(known)).rstrip()
        lines.append(f"  {shape}: " + ", ".join(f"{name} {us:.0f}" for name, us in ranked))
    return lines


@cache
def machine() -> str:
    """The processor, a hash of what it can do, the instructions that torch uses, its version."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    lines = (line.partition(":") for line in info.partition("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    parts = [found[name] for name in wanted if name in found] or [platform.processor()]
    parts.append(hashlib.sha256(found.get("flags", "").encode()).hexdigest()[:8])
    parts += [torch.backends.cpu.get_cpu_capability(), torch.__version__]
    return " ".join(parts)


@cache
def native_hash() -> str:
    """Of the C sources: a kernel that was changed is measured anew."""
    texts = [file.read_text() for file in sorted(NATIVE.glob("*.[ch]"))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


@cache
def _tables(folder: str) -> dict[str, Any]:
    """Every machine's table in the cache; empty if there is none that can be read."""
    try:
        value = json.loads((Path(folder) / "kernels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _table(folder: str) -> dict[str, dict[str, float]]:
    """This machine's table for the threads in use: key -> kernel -> microseconds."""
    tables = _tables(folder)
    name = f"{machine()}, kernels {native_hash()}, {torch.get_num_threads()} threads"
    if not isinstance(tables.get(name), dict):
        tables[name] = {}
    table: dict[str, dict[str, float]] = tables[name]
    return table


def _write(table: dict[str, dict[str, float]]) -> None:
    """Keep the tables; without a cache that can be written they live as long as the process."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(_tables(str(folder)), file, indent=1, sort_keys=True)
        os.replace(file.name, folder / "kernels.json")
    except OSError:
        pass
