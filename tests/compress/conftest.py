"""Fixtures for the methods: fresh tiny models and token ids for them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compress import checkpoint


@pytest.fixture
def llama(tiny_llama: Path) -> nn.Module:
    """A Llama of 3 blocks, width 64, 4 query heads on 2 key-value heads; its own to modify."""
    return _own(tiny_llama)


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> nn.Module:
    """A GPT-2 of 2 blocks, width 64, head tied, Conv1D already Linear; its own to modify."""
    return _own(tiny_gpt2)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the two families in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def token_ids() -> torch.Tensor:
    """(8, 32) token ids that both tiny models know."""
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def random_rows():
    """Makes (32, 64) weights of very different sizes: rows signed, all > 0, all < 0, all zero."""

    def make(seed: int) -> torch.Tensor:
        rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        rows *= 10.0 ** torch.arange(-4, 4).repeat(4)[:, None]
        rows[8:16] = rows[8:16].abs()
        rows[16:24] = -rows[16:24].abs()
        rows[0] = 0
        return rows

    return make


def _own(folder: Path) -> nn.Module:
    loaded = checkpoint.load(folder)
    for parameter in loaded.parameters():  # as loaded they are a read-only map of the file
        parameter.data = parameter.data.clone()
    return loaded
