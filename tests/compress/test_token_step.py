"""token_step: the compiled functions against float64, at the edges of what exponentials can do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comparing import random, relative
from native_calls import add_norm, attend, gate, gelu
from torch import nn
from torch.nn import functional as F

import compress
from compress import checkpoint, compiled, kernel_choice, token_step
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
        assert relative(add_norm(mine, more, norm), exact) < TOLERANCE[dtype]
        assert torch.equal(mine, sum_)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gate_is_silu_times_up(dtype):
    x = random(3, 1, 80, seed=0).mul(4).to(dtype)
    edges = [-1e4, -200.0, -88.5, -20.0, 0.0, 20.0, 200.0, 1e4]
    x[0, 0, :8] = torch.tensor(edges)
    x[1, 0, 3] = torch.nan
    half, up = x.double().chunk(2, -1)
    exact = F.silu(half) * up
    found = gate(x)
    assert found[1, 0].isnan().nonzero().flatten().tolist() == [3]
    found[1, 0, 3] = exact[1, 0, 3] = 0
    assert found.isfinite().all() and relative(found, exact) < TOLERANCE[dtype]
    assert (found[0, 0, :8] - exact[0, 0, :8]).abs().max() <= 0.004 * exact[0, 0, :8].abs().max()


@pytest.mark.parametrize("dtype", TYPES)
def test_gelu_is_the_one_by_tanh(dtype):
    x = random(40, seed=0).mul(4).to(dtype)
    x[:8] = torch.tensor([-1e4, -200.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 1e4])
    x[11] = torch.nan
    exact, found = F.gelu(x.double(), approximate="tanh"), gelu(x)
    assert found.isnan().nonzero().flatten().tolist() == [11]
    found[11] = exact[11] = 0
    assert relative(found[8:], exact[8:]) < TOLERANCE[dtype]
    assert (found[:8] - exact[:8]).abs().max() <= 0.004 * 1e4
    assert found[:3].abs().max() < 1e-6 and found[4] == 0


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
    found = attend(heads, key_heads, scale, qkv, angles, held, before)

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
    held = torch.zeros(2, 1, 1, 8, 16)
    held[0, 0, 0, 1] = 100.0  # scores of 0, 160,000 and 0: the middle value alone counts
    held[1, 0, 0, :3] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    qkv = torch.cat([torch.full((16,), 100.0), torch.zeros(16), torch.full((16,), 3.0)])
    found = attend(1, 1, 1.0, qkv[None, None], None, held, 2)
    assert torch.equal(found, torch.full((1, 1, 16), 2.0))
    held[0, 0, 0, 0, 5] = torch.nan
    assert attend(1, 1, 1.0, qkv[None, None], None, held, 2).isnan().all()


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
        dict(blocks=[replace(decoder.blocks[0], key_heads=3)]),  # of 4 heads
        dict(blocks=[*decoder.blocks, replace(decoder.blocks[0], key_heads=8)]),
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


def stepped(decoder, start=4, batch=2):
    """What a token after `start` others comes to."""
    ids = torch.randint(0, 257, (batch, start + 1), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cache = decoder.cache(batch)
        if start:
            decoder.forward(ids[:, :start], cache)
        return decoder.forward(ids[:, start:], cache)


METHODS = ["cast", "rtn(head_bits=4)", "int8_sym", "dynamic", "rtn(bits=3)", "int8_asym"]


@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_step_is_the_same_function(name, method, request, monkeypatch):
    model = compress.apply(method, request.getfixturevalue(name))
    decoder = TorchRunner(model).decoder
    assert decoder.steps_compiled
    mine = stepped(decoder)
    monkeypatch.setattr(token_step, "takes", lambda decoder: False)
    theirs = stepped(replace(decoder))
    assert relative(mine, theirs) < (1e-6 if method == "none" else 0.05)  # bfloat16


@pytest.mark.parametrize("kernel", ["compiled", "compiled int16", None])
def test_layers_of_all_kernels_are_mixed(llama, kernel, monkeypatch):
    """None: every second layer asks Python."""
    count = iter(range(1000))

    def remembered(layer, dtype, rows, fitting):
        wanted = kernel or ("compiled", "rebuild float32")[next(count) % 2]
        return next((each for each in fitting if each.name == wanted), fitting[-1])

    monkeypatch.setattr(kernel_choice, "_remembered", remembered)
    decoder = TorchRunner(compress.apply("rtn", llama)).decoder
    mine = stepped(decoder)
    names = [each.kernel(1, torch.bfloat16) for each in decoder.linears()[:-1]]
    held = [struct.bits for block in decoder.program.blocks for struct in block.layers]
    assert held == [0 if name == "rebuild float32" else 4 for name in names]  # 0: to be asked for
    assert kernel or {*names} == {"compiled", "rebuild float32"}
    monkeypatch.setattr(token_step, "takes", lambda decoder: False)
    assert relative(mine, stepped(replace(decoder))) < 0.02


def test_what_layers_answer_in_another_type_or_shape_is_not_read_beyond_its_end(llama):
    decoder = TorchRunner(llama).decoder
    blocks, exact = decoder.blocks, stepped(decoder, 0)

    def changed(**layers):
        first = {name: make(getattr(blocks[0], name)) for name, make in layers.items()}
        return replace(decoder, blocks=[replace(blocks[0], **first), *blocks[1:]])

    wide = {name: (lambda f: lambda x: f(x).double()) for name in ("qkv", "out", "up", "down")}
    wide["down"] = wide["out"] = lambda f: lambda x: f(x.float()).double()
    assert relative(stepped(changed(**wide), 0), exact) < 1e-6
    for name in ("qkv", "out", "down"):
        with pytest.raises(RuntimeError, match="shape"):
            stepped(changed(**{name: lambda f: lambda x: f(x)[..., :-16]}), start=0)
    for angle in (torch.ones(1, 1, 8), torch.ones(1, 1, 16).bfloat16()):
        rotary = SimpleNamespace(at=lambda start, stop, angle=angle: (angle, angle))
        with pytest.raises(ValueError, match="rotary angles are not 16 numbers"):
            stepped(replace(decoder, rotary=rotary), start=0)


def test_blocks_of_different_shapes(llama, monkeypatch):
    mlp = llama.model.layers[1].mlp
    for layer, kept in ((mlp.gate_proj, 48), (mlp.up_proj, 48)):
        layer.weight = nn.Parameter(layer.weight[:kept])
        layer.out_features = kept
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :48])
    mlp.down_proj.in_features = 48
    decoder = TorchRunner(llama).decoder
    mine = stepped(decoder)
    assert [up for up, _ in decoder.program.shapes] == [320, 96, 320]
    monkeypatch.setattr(token_step, "takes", lambda decoder: False)
    assert relative(mine, stepped(replace(decoder))) < 1e-6


def test_what_a_layer_raises_comes_through_and_leaves_the_next_token_whole(llama):
    decoder = TorchRunner(llama).decoder
    up, broken = decoder.blocks[1].up, []

    def stops(x):
        if broken and broken.pop():
            raise KeyboardInterrupt
        return up(x)

    blocks = [decoder.blocks[0], replace(decoder.blocks[1], up=stops), *decoder.blocks[2:]]
    other = replace(decoder, blocks=blocks)
    exact = stepped(decoder, 0)
    cache = other.cache(2)
    ids = torch.randint(0, 257, (2, 1), generator=torch.Generator().manual_seed(3))
    other.program  # noqa: B018 - asks for the layer's shape
    broken.append(True)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        other.forward(ids, cache)
    assert relative(stepped(other, 0), exact) < 1e-6


def test_a_cache_that_grows_and_one_of_another_batch(llama):
    decoder = TorchRunner(llama).decoder
    ids = torch.randint(0, 257, (2, 300), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        exact = decoder.forward(ids)
        for batch in (2, 1):
            cache = decoder.cache(batch)
            found = [decoder.forward(ids[:batch, at : at + 1], cache) for at in range(300)]
            assert cache.room >= 300
            assert relative(torch.cat(found, 1), exact[:batch]) < 1e-5
