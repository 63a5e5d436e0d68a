"""A peer library's own Python environment: where it is, whether it is whole, how it is made.

Peers pin libraries that exclude each other, so each has a venv in the cache, shared by all
checkouts: cache/envs/<name>, made from baselines/envs/<name>.txt, a requirements file of pip whose
first comments are read here as well:

    # about: one line for people
    # import: module that must import at the end
    # disk: 2.4 GB

A venv counts as ready when `ready.json` holds the checksum of that file; it is written last, so an
interrupted setup goes on where pip left off, and a changed file makes the environment outdated.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.paths import cache_dir, folder_bytes, free_bytes, locked
from bench.source_hash import ROOT
from compress.registry import did_you_mean

REQUIREMENTS = ROOT / "baselines" / "envs"
VERSION = "import platform; print(platform.python_version())"
INSTALL = ["install", "--progress-bar", "off"]
GB = 10**9
CUDA_BYTES = 5 * GB  # what a build of torch for CUDA brings with it
Say = Callable[[str], None]


class SetupFailed(Exception):
    """An environment could not be made; the message says at which step and why, in one line."""


@dataclass(frozen=True)
class Environment:
    """The environment `name`, there or not."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        return cache_dir() / "envs" / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def file(self) -> Path:
        """Its requirements."""
        return REQUIREMENTS / f"{self.name}.txt"

    @cached_property
    def about(self) -> dict[str, str]:
        """The comments at the top of the requirements: about, import, disk."""
        lines = re.findall(r"^# (about|import|disk): (.+)$", self.file.read_text(), re.MULTILINE)
        return dict(lines)

    @property
    def needs_bytes(self) -> int:
        """Disk space that it takes, as its file says."""
        return int(float(self.about["disk"].removesuffix(" GB")) * GB)

    def checksum(self) -> str:
        """Of the requirements without comments: what is installed follows from nothing else."""
        wanted = "\n".join(requirements(self.file))
        return hashlib.sha256(wanted.encode()).hexdigest()[:12]

    def identity(self) -> str:
        """What runs there: every package with its version once it is made, else what is wanted."""
        if self.state() != "ready":
            return f"wanted-{self.checksum()}"
        return hashlib.sha256(json.dumps(self.made(), sort_keys=True).encode()).hexdigest()[:12]

    def made(self) -> dict[str, Any]:
        """ready.json: the requirements' checksum, Python, packages. Raises OSError, ValueError."""
        return json.loads((self.folder / "ready.json").read_text(encoding="utf-8"))

    def state(self) -> str:
        """ready, missing, incomplete, outdated, or broken."""
        if not self.folder.is_dir():
            return "missing"
        try:
            made = self.made()
        except (OSError, ValueError):
            return "incomplete"
        if made["requirements"] != self.checksum():
            return "outdated"
        return "ready" if os.access(self.python, os.X_OK) else "broken"


def names() -> list[str]:
    """The environments that there is a file for."""
    return sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


def get(name: str) -> Environment:
    """The environment `name`. Raises UsageError with the nearest names that exist."""
    if name not in names():
        raise UsageError(f"no environment {name!r}; {did_you_mean(name, names())}")
    return Environment(name)


def python_of(name: str) -> Path:
    """The interpreter of a ready environment. FileNotFoundError says how to make or mend it."""
    environment = Environment(name)
    state = environment.state() if environment.file.is_file() else "missing"
    if state != "ready":
        raise FileNotFoundError(
            f"the environment of {name} is {state}; run: python -m baselines setup {name}"
        )
    return environment.python


def requirements(file: Path) -> list[str]:
    """The lines of a requirements file that ask for something."""
    lines = (line.partition(" #")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def setup(environment: Environment, say: Say, cuda: bool | None = None) -> None:
    """Make `environment`, or what is missing of it; does nothing if it is ready.

    cuda: whether a build of torch for CUDA may come; None: if this machine has an NVIDIA GPU.
    Raises SetupFailed; what was installed stays, and the next call goes on from there.
    """
    if environment.state() == "ready":
        say(f"{environment.name}: ready")
        return
    environment.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(environment.folder.with_name(f".{environment.name}.lock")):
        state = environment.state()
        if state == "ready":  # another process made it while this one waited
            return
        if state in ("outdated", "broken"):
            shutil.rmtree(environment.folder)
        cuda = has_gpu() if cuda is None else cuda
        _check_disk(environment, CUDA_BYTES if cuda else 0)
        say(f"{environment.name}: needs about {environment.about['disk']} of disk")
        pip, checksum = _venv(environment), environment.checksum()
        wanted = requirements(environment.file)
        torch = [line for line in wanted if re.match(r"torch(?![\w.-])", line)]
        options = [word for line in wanted if line.startswith("-") for word in line.split()]
        if torch:
            say(f"{environment.name}: {torch[0]}")
            _check_build(pip, [*options, *torch], cuda)
            _run("installing torch", [*pip, *INSTALL, *options, *torch], say=say)
        say(f"{environment.name}: {len(wanted)} requirements")
        _run("installing", [*pip, *INSTALL, "--requirement", str(environment.file)], say=say)
        smoke(environment)
        made = {
            "requirements": checksum,
            "python": _run("asking", [str(environment.python), "-c", VERSION]).strip(),
            "packages": installed(environment),
        }
        (environment.folder / "ready.json").write_text(json.dumps(made, indent=1) + "\n")
        say(f"{environment.name}: ready, {folder_bytes(environment.folder) / GB:.2f} GB")


def remove(environment: Environment) -> int:
    """Delete `environment`; the bytes that it took."""
    if not environment.folder.is_dir():
        return 0
    with locked(environment.folder.with_name(f".{environment.name}.lock")):
        size = folder_bytes(environment.folder)
        (environment.folder / "ready.json").unlink(missing_ok=True)
        shutil.rmtree(environment.folder)
    return size


def installed(environment: Environment) -> dict[str, str]:
    """Package names and versions in the environment."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    return json.loads(_run("listing packages", [str(environment.python), "-c", code]))


def packages_of(name: str, wanted: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `wanted` that a ready environment has; nothing for another one."""
    environment = Environment(name)
    if not environment.file.is_file() or environment.state() != "ready":
        return {}
    found = environment.made()["packages"]
    return {package: found[package] for package in wanted if package in found}


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU with its driver."""
    return Path("/proc/driver/nvidia/version").exists()


def _check_disk(environment: Environment, more: int) -> None:
    free = free_bytes(environment.folder)
    if free < environment.needs_bytes + more - folder_bytes(environment.folder):
        raise SetupFailed(
            f"{environment.name} needs about {environment.about['disk']} and "
            f"{environment.folder.parent} has {free / GB:.1f} GB; remove an environment "
            "(python -m baselines list), or set SLIMBENCH_CACHE to a larger disk"
        )


def _venv(environment: Environment) -> list[str]:
    """Make the venv unless it is there; the command of its pip."""
    # pip comes last: where it is missing, making the venv was interrupted.
    if not all(os.access(environment.python.with_name(n), os.X_OK) for n in ("python", "pip")):
        _run("making the venv", [sys.executable, "-m", "venv", "--clear", str(environment.folder)])
    return [str(environment.python), "-m", "pip", "--no-input", "--disable-pip-version-check"]


def _check_build(pip: list[str], torch: list[str], cuda: bool) -> None:
    """Raise SetupFailed if the index gives a build of torch for CUDA and none is wanted."""
    if cuda:
        return
    dry_run = ["install", "--dry-run", "--quiet", "--report", "-"]
    report = _run("asking for torch", [*pip, *dry_run, *torch])
    found = [item["metadata"]["name"] for item in json.loads(report)["install"]]
    if any(name.startswith(("nvidia-", "nvidia_")) for name in found):
        raise SetupFailed(
            f"the package index gives a build of {torch[-1]} for CUDA ({CUDA_BYTES / GB:.0f} GB), "
            "and this machine has no NVIDIA GPU; point pip to a CPU build with PIP_INDEX_URL or "
            "PIP_FIND_LINKS, or allow it with --cuda"
        )


def smoke(environment: Environment) -> None:
    """Import the library, and our worker beside it. Raises SetupFailed."""
    modules = [*environment.about.get("import", "").split(), "bench.worker"]
    code = "; ".join(f"import {module}" for module in modules)
    command = [str(environment.python), "-c", code]
    _run(f"importing {', '.join(modules)}", command, path=str(ROOT))


def _run(what: str, command: list[str], say: Say | None = None, path: str = "") -> str:
    """The output of a command. say: told of each download while it runs. path: PYTHONPATH."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHONPATH": path} if path else {}
    lines = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if say and line.lstrip().startswith(("Downloading", "Using cached", "Building")):
                say(f"  {line.strip()}")
        if process.wait():
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()] or ["no reason given"]
            raise SetupFailed(f"{what}: {([x for x in said if 'rror' in x] or said)[-1]}")
    return "".join(lines)
