"""Fixtures for tests that run jobs: a method that misbehaves when it is told to."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class Planted:
    """The method `planted` as a test sees it. home: the folder to import it from."""

    folder: Path
    home: Path = Path(__file__).parent

    def __call__(self, **settings: str) -> str:
        """How the command line names it."""
        inside = (f"{name}={value}" for name, value in (settings | {"folder": self.folder}).items())
        return f"planted({','.join(inside)})"

    def calls(self) -> list[str]:
        """The steps that it was called for, in order."""
        return [line.split()[0] for line in self._lines()]

    def pids(self) -> list[int]:
        """The processes that it ran in or started."""
        return [int(word) for line in self._lines() for word in line.split()[1:]]

    def ended(self, within_s: float = 10.0) -> bool:
        """Whether all of those are gone; one that was killed takes a moment to go."""
        end = time.monotonic() + within_s
        while any(map(_lives, self.pids())):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def heal(self) -> None:
        """From now on it behaves."""
        (self.folder / "go").touch()

    def _lines(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    """Makes `planted` a method of the bench, with an empty cache."""
    from bench import run
    from compress import registry

    method = Planted(tmp_path / "planted")
    method.folder.mkdir()
    monkeypatch.syspath_prepend(str(method.home))
    monkeypatch.setattr(run, "METHOD_PACKAGES", ("compress.methods", "planted_methods"))
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    yield method
    registry._METHODS.pop("planted", None)
    for name in [name for name in sys.modules if name.startswith("planted_methods")]:
        del sys.modules[name]
