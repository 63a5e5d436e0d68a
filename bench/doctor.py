"""What is installed, what the machine has, what is cached, what a run would need."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

from bench.machine import LIBRARIES, machine, packages
from bench.models import ALIASES
from bench.paths import cache_dir, folder_bytes, free_bytes
from compress import kernel_choice

RUN_NEEDS_BYTES = 2 * 10**9  # default run: download 93 MB, model and parent 540 MB each, artefacts
RUN_NEEDS_RAM_BYTES = 3 * 2**30


def report() -> list[str]:
    """The lines of `python -m bench doctor`."""
    here = machine()
    versions = packages(LIBRARIES)
    missing = [name for name in LIBRARIES if name not in versions]
    ram = here["ram_bytes"]
    lines = [
        f"Python       {here['python']} at {sys.executable}",
        *(f"{name:<12} {found}" for name, found in versions.items()),
        *(f"{name:<12} MISSING: make setup" for name in missing),
        "",
        f"Machine      {here['name']}",
        f"CPU          {here['cpu']}, {here['cores']} cores for us: {_flags(here['flags'])}",
        f"RAM          {f'{ram / 2**30:.1f} GiB' if ram else 'unknown'}",
        f"GPU          {_gpu()}",
        "",
        f"Cache        {cache_dir()} (SLIMBENCH_CACHE); may be deleted, costs only time",
    ]
    for name in ("models", "artefacts", "boxes"):
        lines.append(f"  {name:<10} {folder_bytes(cache_dir() / name) / 1e6:.0f} MB")
    for name in ("SLIMBENCH_MODELS", "SLIMBENCH_DATA"):
        lines.append(f"{name}  {os.environ.get(name) or 'not set'}")
    lines += ["", "Models that need no download:"]
    lines += [f"  {alias}: {place}" for alias in ALIASES if (place := local_place(alias))]
    kernels = kernel_choice.report() or ["  none yet: a model's first run measures them"]
    lines += ["", "Kernels measured here, microseconds for 1 (few) and 128 (many) rows:", *kernels]
    return [*lines, "", *_default_run(ram)]


def local_place(alias: str) -> str | None:
    """Where the weights of `alias` are on this machine; None if they would be fetched."""
    hub_id = ALIASES[alias]
    if hub_id is None:
        return "random, made here"
    if folder := os.environ.get("SLIMBENCH_MODELS"):
        for name in (alias, hub_id.rpartition("/")[2]):
            if (place := Path(os.path.expanduser(folder)) / name).is_dir():
                return str(place)
    if found := sorted(cache_dir().glob(f"models/{alias}*")):
        return str(found[0])
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return str(Path(config).parent) if isinstance(config, str) else None


def _default_run(ram_bytes: int | None) -> list[str]:
    free = free_bytes(cache_dir())
    verdicts = [
        f"disk  {RUN_NEEDS_BYTES / 1e9:.0f} GB in the cache, {free / 1e9:.1f} GB free: "
        + ("ok" if free > RUN_NEEDS_BYTES else "TOO LITTLE: set SLIMBENCH_CACHE to a larger disk")
    ]
    if ram_bytes:
        enough = ram_bytes > RUN_NEEDS_RAM_BYTES
        verdicts.append(
            f"RAM   {RUN_NEEDS_RAM_BYTES / 2**30:.0f} GiB, {ram_bytes / 2**30:.1f} GiB here: "
            + ("ok" if enough else "TOO LITTLE: use --model tiny-llama")
        )
    if local_place("smollm2-135m") is None:
        verdicts.append("model smollm2-135m is not here: 93 MB will be downloaded once")
    needs = "A default run (smollm2-135m, sample, gptq and awq) needs:"
    return [needs, *(f"  {verdict}" for verdict in verdicts)]


def _flags(flags: list[str]) -> str:
    return " ".join(flags) or "no flags that we use"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none that torch {version('torch')} can use"
    return torch.cuda.get_device_name(0)
