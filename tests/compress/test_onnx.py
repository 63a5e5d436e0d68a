"""onnx: logits of graphs against torch, operators against the layers, files, refusals."""

import json
import sys

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import compress
from bench.metrics.size import size
from bench.metrics.subject import Subject
from compress import checkpoint, onnx_graph, registry
from compress.base import TorchRunner, generate
from compress.dynamic_linear import Int8DynamicLinear
from compress.methods.onnx import Onnx
from compress.methods.rtn import Rtn
from compress.onnx_layers import Codes, Integers, Table
from compress.onnx_runner import OnnxRunner
from compress.onnx_tracing import tracing
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear

RANDOM = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 257, (2, 24), generator=RANDOM)
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def plain(request, tmp_path_factory):
    """(folder of the graph, folder of the model)."""
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("onnx") / "model"
    compress.apply("onnx", checkpoint.load(source)).save(folder)
    return folder, source


def test_logits_are_those_of_torch(plain):
    folder, source = plain
    ours, theirs = OnnxRunner(folder), TorchRunner(checkpoint.load(source))
    wanted = theirs.logits(IDS)
    torch.testing.assert_close(ours.logits(IDS), wanted, **CLOSE)
    for chunk in (1, 7, 100):
        pieces = list(ours.logit_chunks(IDS, chunk))
        assert [index for place, _ in pieces for index in range(place.start, place.stop)] == list(
            range(IDS.numel())
        )
        torch.testing.assert_close(torch.cat([x for _, x in pieces]), wanted.flatten(0, 1), **CLOSE)
    logits, cache = ours.prefill(IDS[:, :5])
    torch.testing.assert_close(logits, wanted[:, 4], **CLOSE)
    for at in range(5, 9):
        step = ours.decode(IDS[:, at : at + 1], cache)
        torch.testing.assert_close(step, wanted[:, at], **CLOSE)
    assert torch.equal(generate(ours, IDS[:, :5], 6), generate(theirs, IDS[:, :5], 6))
    assert ours.kernels(1) == ["onnxruntime MatMul"]


def test_a_shorter_prompt_is_padded_on_the_left(plain):
    folder, source = plain
    ours, theirs = OnnxRunner(folder), TorchRunner(checkpoint.load(source))
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    logits, cache = ours.prefill(IDS[:, :-1], mask[:, :-1])
    step = ours.decode(IDS[:, -1:], cache)
    for row, first in ((0, 0), (1, 7)):
        wanted = theirs.logits(IDS[row : row + 1, first:])[0]
        torch.testing.assert_close(logits[row], wanted[-2], **CLOSE)
        torch.testing.assert_close(step[row], wanted[-1], **CLOSE)


def test_names_as_other_programs_know_them(plain):
    folder, _ = plain
    config = json.loads((folder / "config.json").read_text())
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    shapes = {node.name: node.shape for node in session.get_inputs()}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "seq"]
    assert shapes["attention_mask"] == ["batch", "total"]
    heads = config.get("num_key_value_heads") or config["n_head"]
    assert shapes["past_key_values.1.value"] == ["batch", heads, "past", 16]
    outputs = {node.name: node.shape for node in session.get_outputs()}
    assert list(outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert len(outputs) == 1 + 2 * blocks
    assert outputs["logits"] == ["batch", "kept", 257]
    # Without num_logits_to_keep there are logits for every position.
    empty = torch.zeros(2, heads, 0, 16).numpy()
    fed = {name: empty for name in shapes if name.startswith("past")}
    fed |= {name: torch.ones(2, 3, dtype=torch.int64).numpy() for name in list(shapes)[:3]}
    assert session.run(["logits"], fed)[0].shape == (2, 3, 257)


def test_the_file_says_nothing_of_its_making_and_a_tied_head_is_there_once(plain):
    folder, source = plain
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {entry.key for entry in graph.metadata_props} == {"slimbench.weights"}
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    text = (folder / "model.onnx").read_bytes()
    assert b"/compress/" not in text and b".py" not in text
    assert "slimbench" not in (folder / "config.json").read_text()
    model = checkpoint.load(source)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert onnx_graph.weights(folder) == numbers
    written = (folder / "model.onnx_data").stat().st_size  # but for the smallest tensors
    assert written == pytest.approx(4 * numbers, rel=0.01)
    values = size(Subject(None, folder, None, 1, 1, made_from=source), lambda *_: None)
    assert values["weights"] == numbers and 32 <= values["bits_per_weight"] < 36


@pytest.mark.parametrize(
    "name", ["rtn(bits=3,group_size=16,head_bits=4)", "prune_structured(ratio=0.5)+dynamic"]
)
def test_after_another_method_it_is_what_that_made(name, tiny_gpt2, tmp_path):
    compress.save(compress.apply(name, checkpoint.load(tiny_gpt2), IDS), tmp_path / "torch")
    wanted = TorchRunner(compress.load(tmp_path / "torch").float()).logits(IDS)
    method = Onnx()
    method.save(method.compress(compress.load(tmp_path / "torch")), tmp_path / "onnx")
    runner = method.load(tmp_path / "onnx")
    found = runner.logits(IDS)
    # Inputs that torch rounds up and the graph down are a step of int8 apart.
    bound = 0.05 if "dynamic" in name else 1e-4
    assert float((found - wanted).abs().max()) < bound and wanted.abs().max() > 3
    codes = "MatMulInteger" if "dynamic" in name else "MatMulNBits accuracy_level 1"
    assert f"onnxruntime {codes}" in runner.kernels(1)
    about = size(Subject(runner, tmp_path / "torch", None, 1, 1), lambda *_: None)
    assert onnx_graph.weights(tmp_path / "onnx") == about["weights"]


def ran(module, x):
    """What ONNX Runtime makes of `module`."""
    with tracing(), torch.no_grad():
        made = torch.onnx.export(
            nn.Sequential(module), (x,), dynamo=True, opset_version=23, verbose=False
        )
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 16},
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 4, "group_size": -1},
        {"bits": 8, "group_size": 64, "symmetric": True},
        {"bits": 8, "group_size": -1},
    ],
    ids=str,
)
def test_codes_mean_what_they_mean_in_torch(settings):
    weight = torch.randn(24, 80, generator=RANDOM)  # the last group of 32 and of 64 is a part
    bias = torch.randn(24, generator=RANDOM)
    layer = Rtn(**settings, dtype="float32").quantize(weight, bias)
    x = torch.randn(3, 5, 80, generator=RANDOM)
    wanted = nn.functional.linear(x, layer.weight(), bias)
    torch.testing.assert_close(ran(Codes(layer, 1).eval(), x), wanted, rtol=1e-5, atol=1e-5)
    numbers = torch.tensor([[3, 0], [23, 3]])
    rows = ran(Table(Codes(layer, 1), torch.float32), numbers)
    torch.testing.assert_close(rows, QuantEmbedding(layer)(numbers), rtol=1e-6, atol=1e-6)


def test_columns_in_another_order():
    order = torch.randperm(64, generator=RANDOM)
    codes = torch.randint(0, 16, (24, 64), generator=RANDOM, dtype=torch.uint8)
    scale = torch.rand(24, 2, generator=RANDOM)
    layer = QuantLinear.from_codes(codes, scale, None, None, 4, 32, order, dtype=torch.float32)
    x = torch.randn(3, 64, generator=RANDOM)
    wanted = x[:, order] @ ((codes.float() - 8) * scale.repeat_interleave(32, 1)).T
    torch.testing.assert_close(ran(Codes(layer, 1).eval(), x), wanted, rtol=1e-5, atol=1e-4)


def test_integers_are_those_of_the_layer():
    codes = torch.randint(0, 256, (24, 80), generator=RANDOM, dtype=torch.uint8)
    scale = torch.rand(24, 1, generator=RANDOM)
    layer = Int8DynamicLinear.from_codes(codes, scale, None, None, 8, -1, dtype=torch.float32)
    x = torch.randn(3, 5, 80, generator=RANDOM) + 1
    x[0, 0] = 0
    torch.testing.assert_close(ran(Integers(layer), x), layer(x), rtol=1e-5, atol=1e-4)


def test_refusals(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="float32 or float16, not 'int8'"):
        Onnx(dtype="int8")
    with pytest.raises(ValueError, match="1 or 4, not 2"):
        Onnx(accuracy_level=2)
    made = Rtn(group_size=48).compress(checkpoint.load(tiny_llama))
    with pytest.raises(ValueError, match=r"q_proj: MatMulNBits takes groups of .* not 48"):
        Onnx().compress(made)
    with pytest.raises(ValueError, match="leaves a graph for another runtime: rtn cannot follow"):
        registry.get("onnx+rtn")
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.onnx: .*INVALID_PROTOBUF"):
        OnnxRunner(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'slimbench\[onnx\]'"):
        Onnx().compress(checkpoint.load(tiny_llama))
