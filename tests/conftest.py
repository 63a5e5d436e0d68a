"""Fixtures for all tests: caches of their own, two random tiny models, the embedded model."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Read when huggingface_hub is imported: no test asks a hub, or finds what one gave the user.
HUB_HOME = tempfile.mkdtemp(prefix="slimbench-tests-")
atexit.register(shutil.rmtree, HUB_HOME, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HUB_HOME}
# Read when typer and rich are imported: help and errors are the same text everywhere.
os.environ["COLUMNS"] = "200"
if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported: workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
for name in (
    *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),  # either would win over HF_HOME
    *("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"),
):
    os.environ.pop(name, None)
PLACES = ("SLIMBENCH_CACHE", "SLIMBENCH_MODELS", "SLIMBENCH_DATA")
USER_PLACES = {name: os.environ[name] for name in PLACES if name in os.environ}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this session; the user's folders of models and data are out of sight."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PLACES:
            patch.delenv(name, raising=False)
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("SLIMBENCH_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def tiny_llama(own_cache: Path) -> Path:
    """Folder of the random Llama: 3 blocks of width 64, 4 heads on 2, head not tied."""
    from bench import models

    return models.resolve("tiny-llama").folder


@pytest.fixture(scope="session")
def tiny_gpt2(own_cache: Path) -> Path:
    """Folder of the random GPT-2: 2 blocks of width 64, 4 heads, head tied."""
    from bench import models

    return models.resolve("tiny-gpt2").folder


@pytest.fixture(scope="session")
def smollm2(own_cache: Path) -> Path:
    """Folder of smollm2-135m from the user's own cache; fetched once if it is not there."""
    from bench import models

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLIMBENCH_CACHE")
        for name, value in USER_PLACES.items():
            patch.setenv(name, value)
        try:
            return models.resolve("smollm2-135m").folder
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands in for the package `datasets`: `rows` by split, `calls` as they come."""
    from bench import data_sets

    stub = SimpleNamespace(rows={}, calls=[])

    def load_dataset(**arguments):
        stub.calls.append(arguments)
        return iter(stub.rows[arguments["split"]])

    monkeypatch.delenv("SLIMBENCH_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data_sets._hub_rows.cache_clear()
    yield stub
    data_sets._hub_rows.cache_clear()
