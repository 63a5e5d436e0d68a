"""decoder: the function is transformers', whatever the batch, the chunks and the layers."""

import pytest
import torch
from comparing import relative
from transformers import AutoConfig, AutoModelForCausalLM

import compress
from compress import checkpoint, token_step
from compress.base import TorchRunner
from compress.decoder import decoder_for
from compress.decoder_parts import RmsNorm
from compress.layers import conv1d_to_linear


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return checkpoint.load(request.getfixturevalue(request.param))


def ids_of(batch, tokens, seed=0):
    return torch.randint(0, 257, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, ids):
    """Logits as transformers computes them."""
    return model(ids).logits


def test_whole_passes_are_those_of_transformers(model):
    ids = ids_of(3, 50)
    expected = whole(model, ids)
    runner = TorchRunner(model)
    assert runner.decoder is not None
    assert relative(runner.logits(ids), expected) < 3e-6
    pieces = [piece for _, piece in runner.logit_chunks(ids, 40)]
    assert [len(piece) for piece in pieces] == [40, 40, 40, 30]
    assert relative(torch.cat(pieces), expected.flatten(0, 1)) < 3e-6


@pytest.mark.parametrize("compiled", [True, False])  # where there is a compiler
@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_tokens_and_chunks_through_the_cache_are_one_whole_pass(
    model, batch, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(token_step, "takes", lambda decoder: False)
    ids = ids_of(batch, 40)
    expected = whole(model, ids)
    runner = TorchRunner(model)
    logits, cache = runner.prefill(ids[:, :20])
    assert relative(logits, expected[:, 19]) < 3e-6
    for step in range(20, 25):
        logits = runner.decode(ids[:, step : step + 1], cache)
        assert relative(logits, expected[:, step]) < 3e-6
    chunk = runner.decode(ids[:, 25:40], cache)  # several at once see each other, and all before
    assert relative(chunk, expected[:, 39]) < 3e-6
    assert cache.length == 40


def test_a_cache_grows_beyond_its_room_and_forgets_nothing(model, monkeypatch):
    monkeypatch.setattr("compress.decoder.ROOM", 2)
    ids = ids_of(1, 30)
    expected = whole(model, ids)
    runner = TorchRunner(model)
    _, cache = runner.prefill(ids[:, :4])
    rooms = {cache.room}
    for step in range(4, 30):
        logits = runner.decode(ids[:, step : step + 1], cache)
        assert relative(logits, expected[:, step]) < 3e-6
        rooms.add(cache.room)
    assert rooms == {6, 12, 24, 48}


@pytest.mark.parametrize(
    "name", ["rtn", "rtn(bits=3)", "int8_sym", "int8_asym", "rtn(head_bits=4)", "none"]
)
def test_joined_layers_stay_in_the_model_as_views(model, name):
    compressed = compress.apply(name, model, **({} if name == "none" else {"dtype": "float32"}))
    ids = ids_of(2, 33)
    expected = whole(compressed, ids)
    before = {key: value.clone() for key, value in compressed.state_dict().items()}
    assert relative(TorchRunner(compressed).logits(ids), expected) < 3e-6
    assert relative(whole(compressed, ids), expected) < 3e-6
    after = compressed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_second_runner_in_another_type_joins_anew(model):
    compressed = compress.apply("rtn(group_size=32)", model)  # bfloat16: int4 codes laid out anew
    ids = ids_of(1, 20)
    TorchRunner(compressed).logits(ids)
    wide = compressed.float()
    expected = whole(wide, ids)
    assert relative(TorchRunner(wide).logits(ids), expected) < 3e-6
    assert relative(whole(wide, ids), expected) < 3e-6


def test_no_code_is_held_twice(tiny_llama):
    compressed = compress.apply("rtn(group_size=32)", checkpoint.load(tiny_llama))
    TorchRunner(compressed)
    attention = compressed.model.layers[0].self_attn
    places = {
        name: attention.get_submodule(name).codes.untyped_storage().data_ptr()
        for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(set(places.values())) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ],
)
def test_what_configs_vary_is_followed(changes):
    sizes = dict(vocab_size=257, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    config = sizes | dict(num_attention_heads=4, num_key_value_heads=2) | changes
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    for parameter in made.parameters():  # biases too: zeros would hide mistakes
        parameter.data.normal_(0, 0.15)
    ids = ids_of(2, 100)
    expected = whole(made, ids)
    runner = TorchRunner(made)
    assert runner.decoder is not None
    assert relative(runner.logits(ids), expected) < 1e-5


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {"hidden_act": "gelu"}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        ),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_what_is_not_done_here_runs_in_transformers(kind, changes):
    sizes = {
        "llama": dict(
            hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
        ),
        "gpt2": dict(n_embd=64, n_layer=2, n_head=4),
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=257, **sizes, **changes)
    torch.manual_seed(0)
    made = conv1d_to_linear(AutoModelForCausalLM.from_config(config).eval())
    assert decoder_for(made) is None
    ids = ids_of(1, 12)
    runner = TorchRunner(made)
    assert torch.equal(runner.logits(ids), whole(made, ids))
    _, cache = runner.prefill(ids[:, :11])
    assert relative(runner.decode(ids[:, 11:], cache), whole(made, ids)[:, 11]) < 1e-4


def test_rms_norm_is_its_definition():
    x, weight = torch.randn(5, 24, dtype=torch.float64), torch.rand(24, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RmsNorm(weight, 1e-5)(x), expected, rtol=1e-12, atol=1e-12)


def test_layers_of_other_libraries_get_contiguous_inputs(model):
    seen = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    runner = TorchRunner(model, own=False)
    runner.logits(ids_of(1, 5))
    _, cache = runner.prefill(ids_of(1, 5))
    runner.decode(ids_of(1, 1), cache)
    assert seen and all(x.is_contiguous() for x in seen)
