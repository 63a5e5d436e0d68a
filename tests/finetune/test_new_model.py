"""New models: their sizes by hand, and weights taken over from another."""

import json

import pytest
import torch
from transformers import GPT2LMHeadModel

import compress
from bench.errors import UsageError
from finetune.training.language_model import LossModel
from finetune.training.new_model import Architecture, continue_from, make, read_plain

SMALL = {"layers": 2, "width": 32, "heads": 4, "context": 64}


class Widened(GPT2LMHeadModel):
    """An own definition: GPT-2 whose logits are doubled."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_gpt2_by_hand():
    model = make(Architecture(**SMALL), vocabulary=100, end_of_text=0)
    block = 12 * 32 * 32 + 13 * 32  # four matrices with their biases, two norms
    assert count(model) == 100 * 32 + 64 * 32 + 2 * block + 2 * 32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.eos_token_id == 0 and model.config.n_positions == 64


def test_the_published_size_of_gpt2():
    with torch.device("meta"):
        model = make(Architecture(), vocabulary=50257, end_of_text=50256)
    assert count(model) == 124_439_808


def test_parameters_of_llama_by_hand():
    sizes = Architecture(family="llama", kv_heads=2, inner=80, **SMALL)
    model = make(sizes, vocabulary=100, end_of_text=0)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 80 + 2 * 32  # q and o, k and v, MLP, norms
    assert count(model) == 100 * 32 + 2 * block + 32


def test_a_config_file_and_an_own_definition(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}))
    sizes = Architecture(family=str(path), definition=f"{__name__}:Widened")
    model = make(sizes, vocabulary=50, end_of_text=None)
    model.eval()  # transformers starts with dropout
    assert model.config.n_embd == 16 and model.config.vocab_size == 50
    ids = torch.arange(8)[None]
    logits = model(ids[:, :-1]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    torch.testing.assert_close(LossModel(model)(ids[:, :-1], ids[:, 1:]).nll, wanted)


def test_one_seed_one_model():
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(make(Architecture(**SMALL), 50, None).transformer.wte.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_weights_that_fit_are_taken_over(tmp_path):
    old = make(Architecture(**SMALL), 50, None)
    old.save_pretrained(tmp_path)
    deeper = make(Architecture(**(SMALL | {"layers": 3})), 50, None)
    fresh = continue_from(deeper, tmp_path)
    assert fresh and all(name.startswith("transformer.h.2.") for name in fresh)
    # A square matrix would go unnoticed the wrong way round.
    mine, theirs = deeper.transformer.h[1].attn.c_proj, old.transformer.h[1].attn.c_proj
    assert torch.equal(mine.weight, theirs.weight)
    with pytest.raises(UsageError, match="no weight in"):
        continue_from(make(Architecture(family="llama", **SMALL), 60, None), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 5}, "no multiple of 5 heads"),
        ({"family": "mamba"}, "none of llama, gpt2 and no file"),
        ({"definition": "nothing"}, "must read package.module:Class"),
        ({"definition": "json:dumps"}, "not a subclass of transformers' PreTrainedModel"),
        ({"definition": "no.such.module:Class"}, "these sizes make no model"),
    ],
)
def test_what_makes_no_model_is_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        make(Architecture(**(SMALL | changed)), 50, None)


def test_a_compressed_model_is_no_place_to_start_from(tiny_llama, tmp_path):
    """transformers would put random weights where the codes are."""
    compress.save(compress.apply("rtn", compress.load(tiny_llama)), tmp_path)
    with pytest.raises(UsageError, match="is compressed; name the model that it was made from"):
        read_plain(tmp_path)
