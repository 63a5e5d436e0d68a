"""cast, and what every method ends with: one type for all parameters, no number lost on the way."""

import pytest
import torch

import compress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_is_rounded_to_the_type(model, dtype):
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    small = compress.apply("cast", model, dtype=dtype)
    after = dict(small.named_parameters())
    assert after.keys() == before.keys() and len(after) > 20
    for name, tensor in after.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, before[name].to(tensor.dtype))


@pytest.mark.parametrize("name", ["cast", "rtn", "int8_sym", "dynamic"])
def test_a_number_too_large_for_the_type_is_refused(llama, name):
    llama.model.norm.weight.data[5] = 1e5  # float16 ends at 65504
    with pytest.raises(ValueError, match=r"^model\.norm\.weight holds .*torch\.float16"):
        compress.apply(name, llama, dtype="float16")


def test_bfloat16_reaches_as_far_as_float32(llama):
    llama.model.norm.weight.data[5] = 1e38
    small = compress.apply("cast", llama)
    assert small.model.norm.weight[5].item() == pytest.approx(1e38, rel=2**-8)


def test_refuses_an_unknown_type():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        compress.get("cast", dtype="int8")
