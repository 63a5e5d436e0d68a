"""LoRA: what is trained, and merging bit for bit as peft merges."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from bench import models
from bench.errors import UsageError
from finetune import merge
from finetune.training import lora


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def adapted(folder, targets=(), new_tokens=(), rank=4):
    torch.manual_seed(0)
    model = lora.inject(plain(folder), rank, 8, 0.0, targets, list(new_tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, so that nothing changes
                parameter.normal_(std=0.1)
    return model


def test_the_number_of_trained_parameters_by_hand(tiny_gpt2, tiny_llama):
    """rank * (in + out) of each layer; tiny GPT-2: width 64, tiny Llama: MLP 160, 2 kv heads."""
    trained = [
        sum(p.numel() for p in adapted(folder).parameters() if p.requires_grad)
        for folder in (tiny_gpt2, tiny_llama)
    ]
    gpt2 = 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    llama = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    assert trained == [gpt2, llama]


def test_an_update_by_hand_on_conv1d(tiny_gpt2):
    """W + alpha / rank * (B A), transposed since Conv1D keeps (in, out)."""
    model = adapted(tiny_gpt2, ("c_fc",))
    layer = lora.inner(model).transformer.h[0].mlp.c_fc
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    before = layer.base_layer.weight.detach().clone()
    expected = before + (8 / 4) * (b @ a).T
    after = lora.merged(model).transformer.h[0].mlp.c_fc.weight
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("targets", [(), ("lm_head",)])
def test_a_folder_merged_by_us_is_peft_s_own_merge(fixture, targets, tmp_path, request):
    folder = request.getfixturevalue(fixture)
    kinds = ("q_proj", "v_proj") if fixture == "tiny_llama" else ("c_attn",)
    model = adapted(folder, kinds + targets)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    lora.save(model, models.tokenizer(models.resolve(str(folder))), tmp_path / "adapter")
    merge.fold(tmp_path / "adapter", str(folder), tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    base = plain(folder)
    if targets:
        lora.untie(base)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        if name in ours:
            assert torch.equal(tensor, ours[name]), name
    assert len(ours) >= len(theirs.state_dict()) - 1  # a tied head is not written
    logits = compress.load(tmp_path / "model")(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_lora_on_a_tied_head_leaves_the_embedding_alone(tiny_gpt2):
    before = plain(tiny_gpt2).get_input_embeddings().weight
    network = lora.merged(adapted(tiny_gpt2, ("lm_head",)))
    assert torch.equal(network.get_input_embeddings().weight, before)
    assert not torch.equal(network.get_output_embeddings().weight, before)
    assert network.config.tie_word_embeddings is False


def test_unknown_targets_and_missing_bases_are_refused(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="no layer is called 'c_attn'; known targets: down_proj"):
        adapted(tiny_llama, ("c_attn",))
    with pytest.raises(UsageError, match="neither a run's folder nor"):
        merge.fold(tmp_path, "x", None)
