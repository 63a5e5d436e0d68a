"""Attention by products: the fused kernel's values and gradients, and where it is used."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.training import attention as products
from finetune.training.language_model import LossModel


def rows(heads: int, groups: int, tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).float() for s in shapes]


@pytest.fixture
def calls(monkeypatch):
    """Grows with each softmax that is written out."""
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: (seen.append(1), softmax(*a, **k))[1])
    return seen


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_values_are_those_of_the_definition(heads, groups):
    query, key, value = rows(heads, groups, 7)
    found, _ = products.attention(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    for row in range(2):
        for head in range(heads):
            group = head // (heads // groups)
            for place in range(7):
                scores = 0.3 * key[row, group, : place + 1] @ query[row, head, place]
                wanted = torch.softmax(scores, 0) @ value[row, group, : place + 1]
                torch.testing.assert_close(found[row, place, head], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_loss_and_gradients_agree_with_the_fused_kernel(fixture, request, calls):
    folder = request.getfixturevalue(fixture)
    ids = torch.randint(257, (2, 41), generator=torch.Generator().manual_seed(0))
    found = []
    for written_out in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        if written_out:
            products.train_with_products(model)
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:]).nll
        loss.backward()
        assert bool(calls) == written_out
        found.append((loss.detach(), model.get_input_embeddings().weight.grad))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_long_rows_masks_and_inference_take_the_fused_kernel(monkeypatch, calls):
    query, key, value = rows(4, 4, 16)
    module = torch.nn.Identity()
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    products.attention(module, query, key, value, mask)
    with torch.no_grad():
        products.attention(module, query, key, value, None)
    monkeypatch.setattr(products, "MOST_SCORES", 2 * 4 * 16 * 16 - 1)
    products.attention(module, query, key, value, None)
    assert not calls
    monkeypatch.setattr(products, "MOST_SCORES", 2 * 4 * 16 * 16)
    products.attention(module, query, key, value, None)
    assert calls == [1]


def test_bfloat16_gradients_are_as_near_to_float32_as_the_fused_kernels(tiny_llama):
    ids = torch.randint(257, (4, 65), generator=torch.Generator().manual_seed(0))

    def gradient(written_out, dtype):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
        if written_out:
            products.train_with_products(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            LossModel(model)(ids[:, :-1], ids[:, 1:]).nll.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradient(False, torch.float32)
    errors = [
        float((gradient(written_out, torch.bfloat16) - exact).norm() / exact.norm())
        for written_out in (False, True)
    ]
    assert errors[1] < 0.05 and errors[1] < 1.2 * errors[0], errors


def test_dropout_drops_and_keeps_the_mean():
    query, key, value = rows(2, 2, 12)
    module = torch.nn.Identity().train()
    torch.manual_seed(0)
    plain, _ = products.attention(module, query, key, value, None)
    drawn = torch.stack(
        [products.attention(module, query, key, value, None, dropout=0.5)[0] for _ in range(2000)]
    )
    assert not torch.equal(drawn[0], plain)
    assert float((drawn.mean(0) - plain).abs().max()) < 0.15
    module.eval()
    torch.testing.assert_close(
        products.attention(module, query, key, value, None, dropout=0.5)[0], plain
    )
