"""vocabulary: embedding and head as codes, once where they are tied."""

import pytest
import torch
from safetensors import safe_open

import compress
from compress import checkpoint
from compress.base import TorchRunner
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear

METHODS = ["rtn", "int8_sym", "dynamic", "gptq", "awq", "smoothquant", "qep"]
IDS = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family, tied", [("tiny_llama", False), ("tiny_gpt2", True)])
@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_and_head_are_stored_as_codes(family, tied, bits, request, tmp_path):
    source = request.getfixturevalue(family)
    small = compress.apply("rtn", checkpoint.load(source), head_bits=bits)
    embedding, head = small.get_input_embeddings(), small.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
    assert (head is embedding.table) == tied
    assert (head.bits, head.group_size) == (bits, 64) and (head.zero is None) == (bits == 8)
    checkpoint.save(small, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if "codes" in name}  # noqa: SIM118
    assert any(name.startswith("lm_head.") for name in names) != tied
    again = checkpoint.load(tmp_path / "small")
    assert (again.get_output_embeddings() is again.get_input_embeddings().table) == tied
    assert torch.equal(TorchRunner(again).logits(IDS), TorchRunner(small).logits(IDS))


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_method_has_it(name, tiny_llama):
    calibration = IDS if compress.get(name).needs_calibration else None
    small = compress.apply(name, checkpoint.load(tiny_llama), calibration, head_bits=8)
    plain = compress.apply(name, checkpoint.load(tiny_llama), calibration)
    assert isinstance(small.get_input_embeddings(), QuantEmbedding)
    assert isinstance(plain.get_input_embeddings(), torch.nn.Embedding)
    a, b = TorchRunner(small).logits(IDS), TorchRunner(plain).logits(IDS)
    assert 0 < (a - b).norm() < 0.06 * b.norm()  # 8 bits: little beside bfloat16's own noise


def test_rows_are_looked_up_and_never_rebuilt_as_a_whole(tiny_gpt2, monkeypatch):
    model = checkpoint.load(tiny_gpt2)
    weight = model.get_input_embeddings().weight.clone()
    small = compress.apply("rtn", model, head_bits=8, dtype="float32")
    embedding = small.get_input_embeddings()
    rebuilt = embedding.weight
    steps = weight.abs().amax(1, keepdim=True) * 2 / 255
    assert ((rebuilt - weight).abs() <= steps / 2 * 1.01).all()
    picked = embedding(torch.tensor([[5, 256], [0, 5]]))
    assert torch.equal(picked, rebuilt[torch.tensor([[5, 256], [0, 5]])])


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="head_bits must be none or one of"):
        compress.get("gptq", head_bits=bits)


def test_refuses_a_head_that_the_method_has_quantized_already(tiny_llama):
    with pytest.raises(ValueError, match="the head is quantized already"):
        compress.apply("rtn(skip=[])", checkpoint.load(tiny_llama), head_bits=8)
