"""Both ways of attention give one result, and `auto` takes the faster."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.training.attention import attend
from finetune.training.language_model import LossModel
from finetune.training.parallel import Place

CPU, GPU = (Place(0, 1, torch.device(kind), "none") for kind in ("cpu", "cuda"))


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_loss_and_gradients_agree(fixture, request):
    folder = request.getfixturevalue(fixture)
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for kind in ("fused", "products"):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        attend(model, kind, 40, CPU)
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:]).nll
        loss.backward()
        found.append((loss.detach(), model.get_input_embeddings().weight.grad))
    for fused, products in zip(*found, strict=True):
        torch.testing.assert_close(fused, products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("context", "place", "chosen"),
    [(512, CPU, "eager"), (513, CPU, "sdpa"), (512, GPU, "sdpa")],
)
def test_auto(context, place, chosen, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
    attend(model, "auto", context, place)
    assert model.config._attn_implementation == chosen
