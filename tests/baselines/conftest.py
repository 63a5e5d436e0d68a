"""An environment with a library that is nowhere else: a wheel made here, installed by pip."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_wheel import ABOUT, HOME, wheel

from bench import environments


@pytest.fixture(scope="session")
def peer_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requirements that know `fakepeer`, and a cache that holds its environment, made once."""
    home = tmp_path_factory.mktemp("peers")
    made = wheel(home, "1.0")
    (home / "fakepeer.txt").write_text(f"{ABOUT}--no-index\n{made}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "REQUIREMENTS", home)
        patch.setenv("SLIMBENCH_CACHE", str(home / "cache"))
        environments.setup(environments.get("fakepeer"), lambda line: None)
    return home


@pytest.fixture
def ready(peer_home: Path, monkeypatch: pytest.MonkeyPatch) -> environments.Environment:
    """The environment; no other is known, and the cache holds nothing else."""
    monkeypatch.setattr(environments, "REQUIREMENTS", peer_home)
    monkeypatch.setenv("SLIMBENCH_CACHE", str(peer_home / "cache"))
    return environments.get("fakepeer")


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bench finds the fake adapter; the library itself cannot be imported here."""
    from bench import chosen, run
    from compress import registry

    monkeypatch.syspath_prepend(str(HOME / "adapters"))
    monkeypatch.setattr(run, "METHOD_PACKAGES", ("compress.methods", "fakepeer_adapters"))
    monkeypatch.setattr(chosen, "GROUPS", chosen.GROUPS | {"peers": "fakepeer_adapters"})
    yield
    registry._METHODS.pop("fakepeer:round", None)
    for name in [name for name in sys.modules if name.startswith("fakepeer_adapters")]:
        del sys.modules[name]
