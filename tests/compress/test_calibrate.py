"""calibrate: statistics equal those hooked on the whole model; disk and memory agree; refusals."""

import copy

import pytest
import torch

from compress import calibrate
from compress.base import silent
from compress.calibrate import compute_dtype
from compress.kernels import matmul_nt
from compress.layers import decoder_blocks, family
from compress.methods.rtn import Rtn
from compress.spill import Store

MODES = ["sequential", "block", "drift"]


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
    with torch.no_grad():
        model(ids)  # transformers' own pass: hooks are called
    for handle in handles:
        handle.remove()
    return found


def leave(groups):
    return {}


def collect(model, ids, solve, mode, **options):
    seen = {}
    names = [name for name, _ in decoder_blocks(model)]

    def keep(groups):
        for group in groups:
            block = names[sum(1 for key in seen if key.endswith(group.names[0]))]
            for name in group.names:
                parts = (group.gram, group.magnitude, group.ahead)
                seen[f"{block}.{name}"] = tuple(part for part in parts if part is not None)
        return solve(groups)

    calibrate.run(model, ids, keep, mode, silent, **options)
    return seen


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_a_plain_pass(model, token_ids, mode, attention, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 96)  # 3 samples a chunk, the last has 2
    model.set_attn_implementation(attention)  # eager attention is given a mask for each chunk
    assert model.config._attn_implementation == attention
    expected = hooked(model, token_ids)
    seen = collect(model, token_ids, leave, mode)
    assert seen.keys() == expected.keys()
    for name, (gram, magnitude, *_) in seen.items():
        torch.testing.assert_close(gram.double(), expected[name][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(magnitude.double(), expected[name][1], rtol=1e-4, atol=1e-6)


def test_passes_in_bfloat16_keep_float32_statistics(model, token_ids, monkeypatch):
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: torch.bfloat16)
    expected = hooked(model, token_ids)
    for name, (gram, magnitude) in collect(model, token_ids, leave, "sequential").items():
        assert gram.dtype == magnitude.dtype == torch.float32
        assert (gram.double() - expected[name][0]).norm() < 0.05 * expected[name][0].norm()


def test_bfloat16_only_where_the_device_multiplies_it(monkeypatch):
    cpu, probes = torch.device("cpu"), ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for probe in probes:
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert compute_dtype(cpu) == torch.float32
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    for probe in probes:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, probe, lambda: True)
            assert compute_dtype(cpu) == torch.bfloat16


def replace_by_two_bits(groups):
    return {
        name: Rtn(bits=2, group_size=32, dtype="float32").quantize(layer.weight, layer.bias)
        for group in groups
        for name, layer in group.chosen().items()
    }


@pytest.mark.parametrize("mode", MODES)
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
        assert close(name, before) == (first_block and (mode == "block" or reads_block_input)), name
        assert close(name, after) == (mode != "block" or reads_block_input), name


@pytest.mark.parametrize("mode", MODES)
def test_the_outputs_of_the_last_block_are_not_computed(model, token_ids, mode, monkeypatch):
    puts, put = [], Store.put

    def counted(self, index, tensor):
        puts.append(index)
        put(self, index, tensor)

    monkeypatch.setattr(Store, "put", counted)
    collect(model, token_ids, leave, mode)
    # One chunk: each block once after its attention, all but the last once at the end; the float
    # model's always, since the last layer is told how far it is from them.
    floats = 2 * len(decoder_blocks(model)) if mode == "drift" else 0
    assert len(puts) == 2 * len(decoder_blocks(model)) - 1 + floats


@pytest.mark.parametrize("spill_bytes", [0, 100_000])  # all of it; some: a chunk is 16,384 bytes
@pytest.mark.parametrize("mode", MODES)
def test_inputs_on_disk_give_the_same_bits(model, token_ids, mode, spill_bytes, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 64)
    twin = copy.deepcopy(model)
    held = collect(model, token_ids, replace_by_two_bits, mode)
    spilled = collect(twin, token_ids, replace_by_two_bits, mode, spill_bytes=spill_bytes)
    assert held.keys() == spilled.keys()
    for name in held:
        for mine, theirs in zip(spilled[name], held[name], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drift_is_how_far_outputs_fall_behind_the_float_model(model, token_ids, dtype, monkeypatch):
    """With 2-bit layers up to the last MLP, whose drift is what hooks on both models see."""
    monkeypatch.setattr(calibrate, "compute_dtype", lambda device: dtype)
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 96)  # three chunks
    before, last, half = copy.deepcopy(model), decoder_blocks(model)[-1][1], family(model).mlp
    found = []

    def solve(groups):
        if groups[0].block is last and groups[0].half is half:
            found.extend(groups)
            return {}
        return replace_by_two_bits(groups)

    calibrate.run(model, token_ids, solve, "drift", silent)
    seen = []
    for each in (before, model):
        block, inputs = decoder_blocks(each)[-1][1], {}
        for name in (half.inputs[0], half.output):
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, inputs=inputs: inputs.update({name: args[0]})
            )
        block.register_forward_hook(lambda _, args, out, inputs=inputs: inputs.update(block=out))
        with torch.no_grad():
            each(token_ids)
        seen.append(inputs)

    def mean_product(name, x):
        ahead = (seen[0][name] - seen[1][name]).flatten(0, -2).double()
        return ahead.T @ seen[1][x].flatten(0, -2).double() / len(ahead)

    def check(drift, expected):
        if dtype == torch.float32:
            torch.testing.assert_close(drift.double(), expected, rtol=1e-3, atol=1e-5)
        assert (drift.double() - expected).norm() < 0.05 * expected.norm()

    inputs = mean_product(half.inputs[0], half.inputs[0])
    for name in half.inputs:
        weight = last.get_submodule(name).weight
        check(found[0].drift(weight), weight.double() @ inputs)
    expected = mean_product("block", half.output)
    check(found[1].drift(last.get_submodule(half.output).weight), expected)
    assert expected.norm() > 0.01 and inputs.norm() > 0.01 and len(found) == 2


@pytest.mark.parametrize("mode", MODES)
def test_nothing_drifts_where_nothing_changes_and_only_one_mode_asks(model, token_ids, mode):
    groups = []
    calibrate.run(model, token_ids, lambda found: groups.extend(found) or {}, mode, silent)
    for group in groups:
        assert (group.ahead is not None) == (mode == "drift")
        assert group.ahead is None or group.ahead.abs().max() < 1e-6


def test_chosen_layers_are_those_whose_names_are_not_skipped(llama, token_ids):
    groups = []
    calibrate.run(llama, token_ids, lambda found: groups.extend(found) or {}, "block", silent)
    q, k, v = (f"self_attn.{name}_proj" for name in "qkv")
    assert list(groups[0].chosen()) == [q, k, v]
    assert list(groups[0].chosen(("lm_head", "k_proj"))) == [q, v]
    assert groups[0].chosen(("proj",)) == {}
    down = groups[3].chosen(("up_proj",))
    assert list(down) == ["mlp.down_proj"]
    assert down["mlp.down_proj"] is llama.model.layers[0].mlp.down_proj


def test_the_gram_product_is_exact_float32():
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ x.double().T
    torch.testing.assert_close(matmul_nt(x, x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_makes_nan_is_refused(llama, token_ids, mode):
    llama.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.0: the input of .*q_proj holds NaN"):
        calibrate.run(llama, token_ids, leave, mode, silent)


def test_samples_longer_than_the_context_are_refused(model):
    most = {"llama": 2048, "gpt2": 1024}[model.config.model_type]
    ids = torch.zeros(1, most + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"of {most + 1} tokens; the model reads {most}"):
        calibrate.run(model, ids, leave, "block", silent)
