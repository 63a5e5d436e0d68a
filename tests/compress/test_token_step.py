"""token_step: the compiled functions against float64, at the edges of what exponentials can do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comparing import random, relative
from torch import nn
from torch.nn import functional as F

from compress import checkpoint, compiled, token_step
from compress.base import TorchRunner
from compress.decoder_parts import RmsNorm

TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.004}

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler on this machine")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_their_definition(kind, dtype):
    weight, x, delta = (random(*s, seed=n) for n, s in enumerate([(72,), (3, 1, 72), (3, 1, 72)]))
    weight, x, delta = weight.to(dtype), x.to(dtype), delta.to(dtype)
    if kind == "rms":
        norm = RmsNorm(weight, 1e-5)
    else:
        norm = nn.LayerNorm(72, eps=1e-5).to(dtype).requires_grad_(False)
        norm.weight.copy_(weight)
        norm.bias.copy_(random(72, seed=4))
    for more in (None, delta):
        sum_ = x if more is None else x + more
        wide = sum_.double()
        if kind == "rms":
            exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        else:
            exact = F.layer_norm(wide, (72,), weight.double(), norm.bias.double(), 1e-5)
        mine = x.clone()
        assert relative(token_step.add_norm(mine, more, norm), exact) < TOLERANCE[dtype]
        assert torch.equal(mine, sum_)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gate_is_silu_times_up(dtype):
    x = random(3, 1, 80, seed=0).mul(4).to(dtype)
    edges = [-1e4, -200.0, -88.5, -20.0, 0.0, 20.0, 200.0, 1e4]
    x[0, 0, :8] = torch.tensor(edges)
    x[1, 0, 3] = torch.nan
    gate, up = x.double().chunk(2, -1)
    exact = F.silu(gate) * up
    found = token_step.gate(x)
    assert found[1, 0].isnan().nonzero().flatten().tolist() == [3]
    found[1, 0, 3] = exact[1, 0, 3] = 0
    assert found.isfinite().all() and relative(found, exact) < TOLERANCE[dtype]
    assert (found[0, 0, :8] - exact[0, 0, :8]).abs().max() <= 0.004 * exact[0, 0, :8].abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("heads, key_heads, rotary", [(6, 2, True), (3, 3, False)])
@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_attention_over_the_cache(dtype, width, heads, key_heads, rotary, before):
    batch, room = 2, 48
    qkv = random(batch, 1, (heads + 2 * key_heads) * width, seed=0, dtype=dtype)
    held = random(2, batch, key_heads, room, width, seed=1, dtype=dtype)
    untouched = held.clone()
    angle = random(1, 1, width // 2, seed=2)
    cos, sin = angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)
    angles = (cos.to(dtype), sin.to(dtype)) if rotary else None
    scale = width**-0.5
    decoder = SimpleNamespace(heads=heads, key_heads=key_heads, scale=scale)
    found = token_step.attend(decoder, qkv, angles, held, before)

    parts = qkv.double().view(batch, heads + 2 * key_heads, 1, width)
    query, key, value = parts.split([heads, key_heads, key_heads], 1)
    if rotary:
        wide = [part.double() for part in angles]
        query, key = (
            each * wide[0] + torch.roll(each, width // 2, -1) * wide[1] for each in (query, key)
        )
    for number, each in enumerate((key, value)):
        assert relative(held[number, :, :, before], each[:, :, 0]) < TOLERANCE[dtype]
    rest = [slot for slot in range(room) if slot != before]
    assert torch.equal(held[..., rest, :], untouched[..., rest, :])
    keys, values = held[..., : before + 1, :].double()
    exact = F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
    assert found.shape == (batch, 1, heads * width)
    assert relative(found, exact.flatten(1)[:, None]) < TOLERANCE[dtype]


def test_attention_with_scores_beyond_what_exponentials_hold():
    decoder = SimpleNamespace(heads=1, key_heads=1, scale=1.0)
    held = torch.zeros(2, 1, 1, 8, 16)
    held[0, 0, 0, 1] = 100.0  # scores of 0, 160,000 and 0: the middle value alone counts
    held[1, 0, 0, :3] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    qkv = torch.cat([torch.full((16,), 100.0), torch.zeros(16), torch.full((16,), 3.0)])
    found = token_step.attend(decoder, qkv[None, None], None, held, 2)
    assert torch.equal(found, torch.full((1, 1, 16), 2.0))
    held[0, 0, 0, 0, 5] = torch.nan
    assert token_step.attend(decoder, qkv[None, None], None, held, 2).isnan().all()


def test_what_is_taken(tiny_llama, tiny_gpt2):
    for folder in (tiny_llama, tiny_gpt2):
        for dtype, taken in [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]:
            runner = TorchRunner(checkpoint.load(folder).to(dtype))
            assert token_step.takes(runner.decoder) == taken
            assert (token_step.NAME in runner.kernels(1)) == taken
            assert token_step.NAME not in runner.kernels(2)


def test_what_is_not_taken(tiny_gpt2):
    decoder = TorchRunner(checkpoint.load(tiny_gpt2)).decoder
    assert token_step.takes(decoder)
    for changes in (
        dict(key_heads=3),  # of 4 heads
        dict(key_heads=8),
        dict(width=24),
        dict(width=1024),
        dict(norm=nn.LayerNorm(64, bias=False)),  # C would not subtract the mean
        dict(norm=nn.LayerNorm(64, elementwise_affine=False)),
        dict(norm=type("Own", (nn.LayerNorm,), {})(64)),
        dict(norm=nn.LayerNorm(60)),
    ):
        assert not token_step.takes(replace(decoder, **changes)), changes


def test_a_gate_of_another_type_is_left_to_torch(tiny_llama, monkeypatch):
    runner = TorchRunner(checkpoint.load(tiny_llama))
    half = [replace(b, up=lambda x, up=b.up: up(x).half()) for b in runner.decoder.blocks]
    half = [replace(b, down=lambda x, down=b.down: down(x.float())) for b in half]
    found = []
    for decoder in (runner.decoder, replace(runner.decoder, blocks=half)):
        found.append(decoder.forward(torch.tensor([[7]])))
    assert relative(found[1], found[0]) < 0.01


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_bfloat16_is_no_further_from_the_truth_than_torch(name, request, monkeypatch):
    ids = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))
    exact = TorchRunner(checkpoint.load(request.getfixturevalue(name))).logits(ids)[:, -1]

    def error():
        model = checkpoint.load(request.getfixturevalue(name)).bfloat16()
        runner = TorchRunner(model)
        _, cache = runner.prefill(ids[:, :-1])
        return relative(runner.decode(ids[:, -1:], cache), exact)

    mine = error()
    monkeypatch.setattr(token_step, "takes", lambda decoder: False)
    assert mine < 1.2 * error()


def test_what_layers_answer_in_another_type_or_shape_is_not_read_beyond_its_end():
    x, norm = random(1, 1, 64, seed=0, dtype=torch.bfloat16), RmsNorm(torch.ones(64).bfloat16(), 0)
    delta = random(1, 1, 64, seed=1, dtype=torch.float32)
    mine = x.clone()
    token_step.add_norm(mine, delta, norm)
    assert torch.equal(mine, x + delta.bfloat16())
    decoder = SimpleNamespace(heads=2, key_heads=1, scale=1.0)
    held = random(2, 1, 1, 8, 16, seed=2, dtype=torch.bfloat16)
    qkv = random(1, 1, 64, seed=3, dtype=torch.float32)
    wide, narrow = (
        token_step.attend(decoder, each, None, held.clone(), 3) for each in (qkv, qkv.bfloat16())
    )
    assert wide.dtype == torch.bfloat16 and torch.equal(wide, narrow)
    with pytest.raises(RuntimeError):
        token_step.attend(decoder, qkv[..., :48], None, held, 3)
    for angle in (torch.ones(1, 1, 8).bfloat16(), torch.ones(1, 1, 16)):
        with pytest.raises(ValueError, match="rotary angles are not 16 numbers"):
            token_step.attend(decoder, qkv, (angle, angle), held, 3)
    with pytest.raises(RuntimeError):
        token_step.add_norm(x, delta[..., :32], norm)
