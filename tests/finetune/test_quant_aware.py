"""Quantization-aware fine-tuning: what training saw is what the compression method then stores."""

import pytest
import torch
from torch import nn

import compress
from finetune.low_precision import fake_quantize_linears, remove
from finetune.low_precision.method_weights import MethodQuantizer


def plain_model(folder):
    """The tiny model as transformers gives it: Conv1D in GPT-2."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def trained(folder, weights):
    """A few steps, then (the rounding model in evaluation, ids, its logits)."""
    torch.manual_seed(3)
    model = plain_model(folder)
    fake_quantize_linears(model, weights=weights)
    ids = torch.randint(0, 256, (4, 24))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model, ids, model.eval()(ids).logits


EXACT = (
    ("rtn", "bits=4,dtype=float32"),
    ("rtn", "bits=3,group_size=24,symmetric=true,dtype=float32"),
    ("rtn_clip", "bits=4,group_size=16,dtype=float32"),
    ("int8_sym", "granularity=group,group_size=32,dtype=float32"),
    ("int8_asym", "granularity=group,group_size=32,dtype=float32"),
)


@pytest.mark.parametrize("method, settings", EXACT)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packing_a_trained_model_loses_nothing(request, tmp_path, family, method, settings):
    model, ids, logits = trained(
        request.getfixturevalue(f"tiny_{family}"), f"method:{method}({settings})"
    )
    remove(model)
    small = compress.apply(f"{method}({settings})", model)
    compress.save(small, tmp_path / "small")
    loaded = compress.load(tmp_path / "small")
    with torch.no_grad():
        # The weights are equal, see below; layers of codes add up in another order.
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn(bits=4)", "int8_sym", "int8_sym(dtype=float32)"])
def test_rebuilt_weights_are_those_of_training(tiny_llama, tmp_path, method):
    model, ids, logits = trained(tiny_llama, f"method:{method}")
    quantizer = MethodQuantizer.parse(f"method:{method}")
    weights = {
        name: quantizer(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    remove(model)
    compress.save(compress.apply(method, model), tmp_path / "small")
    loaded = compress.load(tmp_path / "small")
    assert len(weights) == 21
    for name, weight in weights.items():
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight(torch.float32), weight)
        assert torch.equal(
            layer.weight(), weight.to(layer.scale.dtype)
        )  # what autocast makes of it
    error = (loaded(ids).logits - logits).abs().max() / logits.abs().max()
    assert error < (2**-18 if "float32" in method else 2**-4)


def test_methods_are_kept_from_the_compiler():
    # It keeps in float32 the scales that the method rounds to bfloat16: other weights than stored.
    assert MethodQuantizer.parse("method:int8_sym").rebuild._torchdynamo_disable


def test_a_methods_grid_is_not_for_lora():
    from bench.errors import UsageError
    from finetune.train import Settings

    with pytest.raises(UsageError, match="use --method full"):
        Settings(method="lora", fake_weights="method:rtn(bits=4)")
    Settings(method="lora", fake_weights="int8_sym")
