"""The parent's perplexity against an independent script: plain transformers, its own loss."""

import math

import pytest
import torch

from bench import data, models
from bench.metrics.perplexity import block_nll
from compress import registry
from compress.checkpoint import load

WINDOWS, LENGTH = 3, 256


def independent(folder, text):
    """Mean token loss as transformers computes it, window by window. Nothing of ours is used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    losses = []
    for start in range(0, WINDOWS * LENGTH, LENGTH):
        window = ids[:, start : start + LENGTH]
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "smollm2"])
def test_the_parent_agrees_with_plain_transformers(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    method = registry.get("none")
    method.save(method.compress(load(folder)), tmp_path / "none")
    tokenizer = models.tokenizer(models.Model(name, folder, ""))
    blocks = data.evaluation_blocks("sample", tokenizer, LENGTH, WINDOWS)
    ours = math.fsum(block_nll(method.load(tmp_path / "none"), blocks.ids))
    theirs = independent(folder, data.texts("sample")[0].text)
    assert ours / (WINDOWS * (LENGTH - 1)) == pytest.approx(theirs, rel=1e-5)
