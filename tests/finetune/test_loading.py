"""loading: plain folders, compressed artefacts with and without a tokenizer, refusals."""

import json
import shutil

import pytest
import torch

import compress
from bench import models
from bench.errors import UsageError
from finetune.decoding.loading import DTYPE_NAMES, dtype_named, find, load_for_inference

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def artefact(tiny_llama, tmp_path):
    folder = tmp_path / "artefact"
    compress.save(compress.apply("int8_sym", compress.load(tiny_llama)), folder)
    return folder


def test_an_alias_and_its_folder_are_the_same_model(tiny_llama):
    model, tokenizer = load_for_inference("tiny-llama")
    same, _ = load_for_inference(str(tiny_llama))
    assert torch.equal(model(IDS).logits, same(IDS).logits)
    assert tokenizer.decode(tokenizer("a mouse")["input_ids"]) == "a mouse"
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_dtype_converts_and_stored_does_not(tiny_llama):
    assert DTYPE_NAMES[0] == "stored" and dtype_named("stored") is None
    as_stored, _ = load_for_inference(str(tiny_llama), dtype_named("stored"))
    half, _ = load_for_inference(str(tiny_llama), dtype_named("bfloat16"))
    assert as_stored.dtype == torch.float32 and half.dtype == torch.bfloat16


def test_artefact_runs_as_it_was_saved_with_its_parents_tokenizer(artefact, tiny_llama):
    model, tokenizer = load_for_inference(str(artefact), tokenizer="tiny-llama")
    assert model.model.layers[0].mlp.up_proj.kind == "quant"
    assert torch.equal(model(IDS).logits, compress.load(artefact)(IDS).logits)
    assert len(tokenizer) == 257
    shutil.copy(tiny_llama / "tokenizer.json", artefact)  # now it has one of its own
    shutil.copy(tiny_llama / "tokenizer_config.json", artefact)
    assert load_for_inference(str(artefact))[1].get_vocab() == tokenizer.get_vocab()


def test_artefact_without_a_tokenizer_is_refused_with_the_cure(artefact):
    with pytest.raises(UsageError, match=r"holds no tokenizer; .* with --tokenizer$"):
        load_for_inference(str(artefact))


@pytest.mark.parametrize("inner", ["adapter", "."])
def test_adapter_is_refused_with_the_cure(tmp_path, inner):
    run = tmp_path / "run"
    (run / inner).mkdir(parents=True)
    (run / inner / "adapter_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(UsageError, match=r"holds a LoRA adapter.*finetune merge"):
        load_for_inference(str(run))


def test_folder_of_a_run_stands_for_its_model(tiny_llama, tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a LoRA adapter"):
        load_for_inference(str(run))
    (run / "adapter").rmdir()
    with pytest.raises(UsageError, match=r"has not finished; run .*finetune merge"):
        load_for_inference(str(run))
    (run / "adapter").mkdir()
    shutil.copytree(tiny_llama, run / "model")
    assert find(str(run)) == models.resolve(str(run / "model"))
    assert load_for_inference(str(run))[0].config.vocab_size == 257
