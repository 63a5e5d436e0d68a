"""LossModel against transformers' own loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.training.batches import IGNORED
from finetune.training.language_model import LossModel


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_equals_the_loss_of_transformers(fixture, request):
    folder = request.getfixturevalue(fixture)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = IGNORED  # a prompt
    labels[2, 15:] = IGNORED  # padding
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    sums = LossModel(model)(ids, targets)
    count = int((targets != IGNORED).sum())
    assert int(sums.scored) == count == 3 * 14 - 5
    expected = model(ids, labels=labels).loss
    torch.testing.assert_close(sums.nll / count, expected, rtol=1e-5, atol=1e-5)


def test_what_comes_after_does_not_change_what_came_before(tiny_llama):
    """Padding on the right needs no mask: attention only looks back."""
    model = LossModel(AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True))
    ids = torch.arange(1, 11)[None]
    targets = torch.arange(2, 12)[None]
    longer = torch.cat([ids, torch.full((1, 6), 9)], 1)
    ignored = torch.cat([targets, torch.full((1, 6), IGNORED)], 1)
    a, b = model(ids, targets).nll, model(longer, ignored).nll
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
