"""Fixtures for all tests: a cache of their own, two random tiny models, the embedded model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks a hub
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
