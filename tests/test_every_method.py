"""What every registered method must keep; new methods are covered without an edit here."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import checkpoint, registry
from compress.base import TorchRunner, generate
from compress.layers import named_linears

# These remove or train: on random weights that is another model, and not all layers need change.
# What they do to a model that has learned something is in test_quality.py.
ANOTHER_MODEL = (
    *("prune_structured", "prune_depth", "prune_sparse", "low_rank"),
    *("recover", "distill"),
)


SHORTER = {"recover": {"steps": 20}, "distill": {"steps": 20}}  # of what the default is


def token_ids(seed, samples=4, tokens=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (samples, tokens), generator=generator)


def differ(a, b):
    return b is None or a.dtype != b.dtype or not torch.equal(a, b)


def stored_otherwise(names, parent, saved):
    """Those linear layers of `names` that `saved` stores as another kind, type or numbers."""
    before, after = (load_file(folder / "model.safetensors") for folder in (parent, saved))
    kinds = checkpoint.layer_specs(saved)
    return {
        name
        for name in names
        if name in kinds or differ(before[f"{name}.weight"], after.get(f"{name}.weight"))
    }


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("name", compress.names())
def test_contract(name, family, request, tmp_path):
    ids = token_ids(seed=1)
    source = request.getfixturevalue(family)
    model = checkpoint.load(source)
    original = TorchRunner(model).logits(ids)
    linears = {layer for layer, _ in named_linears(model)}
    method = compress.get(name, **SHORTER.get(name, {}))
    steps = []

    compressed = method.compress(
        model,
        ids if method.needs_calibration else None,
        progress=lambda done, total: steps.append((done, total)),
    )
    in_memory = TorchRunner(compressed).logits(ids)
    method.save(compressed, tmp_path / "saved")
    changed = stored_otherwise(linears, source, tmp_path / "saved")
    assert len(linears) in (8, 21)
    if name in ANOTHER_MODEL:
        assert changed and changed <= linears
    else:
        assert changed == (set() if name == "none" else linears)
    runner = method.load(tmp_path / "saved")

    logits = runner.logits(ids)
    assert logits.shape == original.shape and logits.dtype == torch.float32
    assert torch.equal(logits, in_memory), "what is saved is not what was compressed"
    assert logits.isfinite().all()
    assert name in ANOTHER_MODEL or (logits - original).norm() < 0.5 * original.norm()
    pieces = [piece for _, piece in runner.logit_chunks(ids, 50)]
    assert max(map(len, pieces)) <= 50
    torch.testing.assert_close(
        torch.cat(pieces).float(), logits.flatten(0, 1), rtol=0.02, atol=0.05
    )
    assert generate(runner, ids, 3).shape == (4, 35)
    assert steps == sorted(steps) and (not steps or steps[-1][0] == steps[-1][1])
    assert runner.kernels(1) and runner.kernels(512)
    assert registry.get(name, **json.loads(json.dumps(asdict(method)))) == method


@pytest.mark.parametrize("name", ["none", "rtn", "dynamic"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_greedy_decoding_through_the_cache_equals_full_passes(name, family, request, tmp_path):
    ids = token_ids(seed=2, samples=2, tokens=20)
    method = compress.get(name, dtype="float32")
    runner = TorchRunner(method.compress(checkpoint.load(request.getfixturevalue(family))))
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, runner.logits(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(runner, ids, 6), expected)


@pytest.mark.parametrize("name", compress.names())
def test_a_parameter_that_is_not_finite_is_named(name, tiny_llama):
    model = checkpoint.load(tiny_llama)
    embeddings = model.model.embed_tokens.weight
    embeddings.data = embeddings.data.clone()  # as loaded it is a read-only map of the file
    embeddings.data[256, 0] = float("nan")  # of a token that is not in the calibration
    ids = token_ids(seed=4) if compress.get(name).needs_calibration else None
    with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight holds NaN"):
        compress.apply(name, model, ids, **SHORTER.get(name, {}))


@pytest.fixture
def one_thread():
    """Sums are then taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_compressed_again_gives_the_same_bytes(name, family, request, tmp_path, one_thread):
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        model = checkpoint.load(request.getfixturevalue(family))
        compress.save(compress.apply(name, model, token_ids(seed=3)), folder)
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert files[0] == files[1]


FRESH = """
import hashlib, sys, torch, compress
torch.set_num_threads(1)
ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(3))
logits = compress.TorchRunner(compress.load(sys.argv[1])).logits(ids)
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_fresh_process_gives_the_same_bits(name, tiny_llama, tmp_path, one_thread):
    ids = token_ids(seed=3)
    model = compress.apply(name, checkpoint.load(tiny_llama), ids)
    compress.save(model, tmp_path / name)
    here = hashlib.sha256(TorchRunner(model).logits(ids).numpy().tobytes()).hexdigest()
    command = [sys.executable, "-c", FRESH, str(tmp_path / name)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert there.strip() == here
