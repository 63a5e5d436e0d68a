"""Adapters, without their libraries: found, named, in an environment that there is; refusals."""

import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench import environments
from bench.chosen import GROUPS
from bench.run import METHOD_PACKAGES
from compress import registry


def found_by_the_bench():
    """Name -> adapter; forgotten again, or tests of every method would want their libraries."""
    before = set(registry.names())
    registry.discover(*METHOD_PACKAGES)
    added = {name: registry.get(name) for name in set(registry.names()) - before}
    mine = {n: p for n, p in added.items() if type(p).__module__.startswith(GROUPS["peers"])}
    for name in mine:
        del registry._METHODS[name]
    for module in [name for name in sys.modules if name.startswith(f"{GROUPS['peers']}.")]:
        del sys.modules[module]
    return mine


PEERS = found_by_the_bench()


def test_all_are_found():
    assert {name.partition(":")[0] for name in PEERS} == {
        *("auto_gptq", "auto_round", "autoawq", "bitsandbytes", "gptqmodel", "hqq", "llama_cpp"),
        *("llmcompressor", "onnxruntime", "quanto", "torch_dynamic", "torch_pruning", "torchao"),
    }


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_names_its_library_and_its_environment(name):
    peer = PEERS[name]
    library, _, method = name.partition(":")
    assert library == type(peer).__module__.rpartition(".")[2] and method
    assert peer.env in environments.names() and peer.foreign
    wanted = environments.requirements(environments.get(peer.env).file)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in wanted}
    assert peer.libraries and {each.lower() for each in peer.libraries} <= pinned


def test_finding_adapters_imports_no_library():
    code = (
        "import sys; from compress import registry; registry.discover('baselines.adapters'); "
        "print(sorted(n for n in sys.modules if n in {'torchao', 'transformers', 'datasets'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stderr or done.stdout


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("torchao:int8", {"kind": "int3"}),
        ("bitsandbytes:int8", {"kind": "fp4"}),
        ("onnxruntime:fp32", {"kind": "int3"}),
        ("llama_cpp:q8_0", {"kind": "q9_0"}),
        ("llama_cpp:q8_0", {"embeddings": "f8"}),
        ("gptqmodel:gptq", {"algorithm": "rtn"}),
        ("llmcompressor:gptq", {"algorithm": "rtn"}),
        ("llmcompressor:gptq", {"act_order": "maybe"}),
        ("quanto:int8", {"bits": 3}),
        ("torch_pruning:magnitude", {"ratio": 1}),
    ],
)
def test_refusals(name, wrong):
    [(setting, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{setting} must be .* not '?{value}'?"):
        replace(PEERS[name], **wrong)


def test_torch_prunings_recipe_gives_a_smaller_plain_model(tiny_llama, tiny_gpt2, tmp_path):
    peer = replace(PEERS["torch_pruning:magnitude"], ratio=0.5)
    pruned = peer.compress(peer.read(tiny_llama))
    # Half of 64 hidden states and of 160 channels; of heads that share keys none.
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "head_dim": 16}
    assert {name: getattr(pruned.config, name) for name in sizes} == sizes
    blocks = 3 * (2 * 64 * 32 + 2 * 32 * 32 + 3 * 32 * 80 + 2 * 32)
    assert sum(each.numel() for each in pruned.parameters()) == blocks + 2 * 257 * 32 + 32
    ids = torch.arange(20)[None]
    wanted = peer.runner(pruned).logits(ids)
    peer.save(pruned, tmp_path)
    assert torch.equal(peer.load(tmp_path).logits(ids), wanted)
    with pytest.raises(ValueError, match="reads q_proj, k_proj and v_proj"):
        peer.compress(peer.read(tiny_gpt2))


def test_what_a_library_left_out_is_an_error():
    from baselines.peer import refuse_left_out

    class Packed(nn.Module):
        pass

    decoder = nn.Sequential(nn.Linear(4, 4), Packed())
    with pytest.raises(ValueError, match="lib left 1 layers as they were, such as 0"):
        refuse_left_out("lib", SimpleNamespace(base_model=decoder))
    decoder[0] = Packed()
    refuse_left_out("lib", SimpleNamespace(base_model=decoder, lm_head=nn.Linear(4, 4)))


def test_a_file_that_lacks_weights_is_refused(tiny_llama, tmp_path):
    from baselines.peer import read_transformers

    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors, such as model\.layers\.1\.mlp\.up_proj"
    ):
        read_transformers(tmp_path / "model")
    assert read_transformers(tiny_llama).config.model_type == "llama"


def test_an_empty_model_is_filled_whole_or_not_at_all(tmp_path):
    from baselines.peer import fill

    def empty():
        model = nn.ModuleDict({"body": nn.Linear(2, 3), "lm_head": nn.Linear(3, 2, bias=False)})
        model.tie_weights = lambda: None
        return model

    tensors = {"body.weight": torch.ones(3, 2), "body.bias": torch.zeros(3)}
    assert torch.equal(fill(empty(), tensors, tmp_path)["body"].weight, torch.ones(3, 2))
    for wrong in ({"body.weight": tensors["body.weight"]}, tensors | {"more": torch.ones(1)}):
        with pytest.raises(ValueError, match="too many"):
            fill(empty(), wrong, tmp_path)


def test_methods_that_calibrate_say_so_when_there_is_nothing():
    from baselines.peer import samples

    assert samples(torch.tensor([[5, 6]])) == [{"input_ids": [5, 6], "attention_mask": [1, 1]}]
    with pytest.raises(ValueError, match="needs calibration"):
        samples(None)


def test_gpt2s_layers_become_the_type_that_libraries_look_for(tiny_gpt2):
    from transformers import AutoModelForCausalLM

    from baselines.peer import is_plain, plain_linears

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = plain_linears(model)(ids).logits
    assert torch.allclose(before, after, atol=1e-6)
    plain = [layer for layer in model.base_model.modules() if is_plain(layer)]
    assert {type(layer) for layer in plain} == {nn.Linear} and len(plain) == 8


def test_logits_in_chunks_are_the_logits():
    from baselines.peer import WholeLogits

    class Library(WholeLogits):
        def logits(self, ids):
            return ids[..., None] * torch.arange(3.0)

    ids = torch.arange(14).view(2, 7)
    found = torch.full((14, 3), -1.0)
    for piece, logits in Library().logit_chunks(ids, 3):
        assert len(logits) <= 3
        found[piece] = logits
    assert torch.equal(found, Library().logits(ids).flatten(0, 1))


def test_rotary_pairs_lie_side_by_side_in_gguf():
    from baselines.adapters.llama_cpp import interleaved

    # two heads of width 4: channel c turns with c + 2
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
