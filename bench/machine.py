"""What a number was measured on: the machine, the libraries, the commit of the code."""

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.job import short_hash
from results.store import slug

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
SOURCES = ("compress", "baselines", "bench", "finetune", "results/store.py")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@cache
def machine() -> dict[str, Any]:
    """CPU, cores that we may use, RAM, the flags that decide speed; `name` fits a folder."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)", info, re.MULTILINE)
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    cpu = model[1].strip() if model else platform.processor() or platform.machine()
    known = [flag for flag in FLAGS if flags and flag in flags[1].split()]
    mark = short_hash([cpu, cores(), known])[:4]
    return {
        "name": f"{slug(cpu).lower()[:40]}-{cores()}c-{mark}",
        "cpu": cpu,
        "cores": cores(),
        "ram_bytes": int(memory[1]) * 1024 if memory else None,
        "flags": known,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Cores that this process may use: fewer than there are under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packages(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions of `names`; what is missing is left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit(root: Path) -> tuple[str | None, bool]:
    """(commit, whether sources differ from it) of the checkout at `root`; (None, False) without."""
    # A copy installed inside another project's checkout must not claim that project's commit.
    if not _git(root, "ls-files", "bench/job.py"):
        return None, False
    head = _git(root, "rev-parse", "HEAD")
    return head or None, bool(_git(root, "status", "--porcelain", "--", *SOURCES))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
