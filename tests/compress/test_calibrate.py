"""calibrate: statistics equal those hooked on the whole model; disk and memory agree."""

import pytest
import torch

from compress import calibrate
from compress.base import TorchRunner
from compress.layers import decoder_blocks
from compress.methods.rtn import Rtn


def quiet(done, total):
    pass


def hooked(model, ids):
    """mean x x^T and mean |x| of every linear layer's input, by hooks on one plain pass."""
    found = {}

    def hook(name):
        def keep(module, args):
            x = args[0].flatten(0, -2).double()
            found[name] = (x.T @ x / len(x), x.abs().mean(0))

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(f"{block_name}.{name}"))
        for block_name, block in decoder_blocks(model)
        for name, layer in block.named_modules()
        if hasattr(layer, "in_features")
    ]
    TorchRunner(model).logits(ids)
    for handle in handles:
        handle.remove()
    return found


def collect(model, ids, solve, mode, **options):
    seen = {}
    names = [name for name, _ in decoder_blocks(model)]

    def keep(groups):
        for group in groups:
            block = names[sum(1 for key in seen if key.endswith(group.names[0]))]
            for name in group.names:
                seen[f"{block}.{name}"] = (group.gram, group.magnitude)
        return solve(groups)

    calibrate.run(model, ids, keep, mode, quiet, **options)
    return seen


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(calibrate, "compute_dtype", lambda: torch.float32)


@pytest.mark.parametrize("mode", ["sequential", "block", "float"])
def test_statistics_are_those_of_a_plain_pass(model, token_ids, mode, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 96)  # 3 samples a chunk, the last has 2
    expected = hooked(model, token_ids)
    seen = collect(model, token_ids, lambda groups: {}, mode)
    assert seen.keys() == expected.keys()
    for name, (gram, magnitude) in seen.items():
        torch.testing.assert_close(gram.double(), expected[name][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(magnitude.double(), expected[name][1], rtol=1e-4, atol=1e-6)


def replace_by_two_bits(groups):
    return {
        name: Rtn(bits=2, group_size=32, dtype="float32").quantize(layer.weight, layer.bias)
        for group in groups
        for name, layer in zip(group.names, group.layers, strict=True)
    }


@pytest.mark.parametrize("mode", ["sequential", "block", "float"])
def test_what_each_mode_lets_a_layer_see(model, token_ids, mode):
    """2-bit layers change what follows so much that each rule shows in the statistics."""
    before = hooked(model, token_ids)
    seen = collect(model, token_ids, replace_by_two_bits, mode)
    after = hooked(model, token_ids)  # every layer replaced

    def close(name, reference):
        gram = reference[name][0]
        return (seen[name][0] - gram).norm() < 1e-3 * gram.norm()

    for name in before:
        first_block = ".0." in name
        reads_block_input = name.endswith(("q_proj", "k_proj", "v_proj", "c_attn"))
        assert close(name, before) == (
            mode == "float"
            or (first_block and reads_block_input)
            or (mode == "block" and first_block)
        ), name
        assert close(name, after) == (
            mode == "sequential"
            or (first_block and reads_block_input)
            or (mode == "block" and reads_block_input)
        ), name


def test_inputs_on_disk_give_the_same_bits(llama, token_ids, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 64)
    held = collect(llama, token_ids, lambda groups: {}, "sequential")
    spilled = collect(llama, token_ids, lambda groups: {}, "sequential", spill_bytes=0)
    assert all(torch.equal(held[name][0], spilled[name][0]) for name in held)


def test_a_store_holds_no_more_than_its_limit(tmp_path):
    store = calibrate.Store(tmp_path, limit=1000)
    for value in range(5):
        store.append(torch.full((10, 10), float(value)))  # 400 bytes each: two fit
    store.put(4, torch.full((10, 10), 9.0))
    assert store.held == 800
    assert [tensor[0, 0].item() for tensor in store] == [0, 1, 2, 3, 9]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, even by a crash


def test_the_gram_product_is_exact_float32():
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ x.double().T
    torch.testing.assert_close(calibrate.matmul_nt(x, x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_model_that_makes_nan_is_refused(llama, token_ids):
    llama.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0: the input of .*NaN"):
        calibrate.run(llama, token_ids, lambda groups: {}, "float", quiet)
