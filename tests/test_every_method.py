"""What every registered method must keep; new methods are covered without an edit here."""

import json
from dataclasses import asdict

import pytest
import torch

import compress
from compress import checkpoint, registry
from compress.base import TorchRunner, generate


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("name", compress.names())
def test_contract(name, family, request, tmp_path):
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    model = checkpoint.load(request.getfixturevalue(family))
    original = TorchRunner(model).logits(ids)
    method = compress.get(name)
    steps = []

    compressed = method.compress(
        model,
        ids if method.needs_calibration else None,
        progress=lambda done, total: steps.append((done, total)),
    )
    in_memory = TorchRunner(compressed).logits(ids)
    method.save(compressed, tmp_path / "saved")
    runner = method.load(tmp_path / "saved")

    logits = runner.logits(ids)
    assert logits.shape == original.shape and logits.dtype == torch.float32
    assert torch.equal(logits, in_memory), "what is saved is not what was compressed"
    assert (logits - original).norm() < 0.5 * original.norm()
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
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    method = compress.get(name, dtype="float32")
    runner = TorchRunner(method.compress(checkpoint.load(request.getfixturevalue(family))))
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, runner.logits(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(runner, ids, 6), expected)
