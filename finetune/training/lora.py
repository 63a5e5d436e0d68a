"""LoRA through peft: inject, look inside, merge.

Two things that peft leaves to its caller are done here. GPT-2's Conv1D keeps weights as (in, out),
which LoRA must know (`fan_in_fan_out`). And a head that is tied to the embedding is untied before
LoRA may change it, since a merge would otherwise change the embedding as well.

Source: E. J. Hu et al., "LoRA", 2021, https://arxiv.org/abs/2106.09685
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.errors import UsageError

HEAD = "lm_head"


def inject(
    model: Any,
    rank: int,
    alpha: int,
    dropout: float,
    targets: tuple[str, ...],
    new_tokens: list[int],
) -> Any:
    """`model` with LoRA layers: a peft model; only they, and rows of new tokens, are trained.

    targets: last parts of the names of layers (q_proj, c_attn, lm_head ...); empty: every linear
    layer of the decoder blocks. new_tokens: ids whose embeddings are trained as they are.
    Raises UsageError for targets that no layer has.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    body = getattr(model, model.base_model_prefix)
    linears = {n: m for n, m in body.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    kinds = {name.rpartition(".")[2] for name in linears}
    chosen = set(targets) or kinds
    if unknown := chosen - kinds - {HEAD}:
        known = ", ".join(sorted(kinds | {HEAD}))
        raise UsageError(f"no layer is called {min(unknown)!r}; known targets: {known}")
    if HEAD in chosen:
        untie(model)
    is_conv = any(isinstance(module, Conv1D) for module in linears.values())
    embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(chosen),
        fan_in_fan_out=is_conv,
        task_type="CAUSAL_LM",
        trainable_token_indices={embedding.rpartition(".")[2]: new_tokens} if new_tokens else None,
    )
    with _layers_of_both_kinds():
        return get_peft_model(model, config)


def untie(model: Any) -> None:
    """Give the head a weight of its own, equal to the embedding's."""
    if not model.config.tie_word_embeddings:
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def is_adapted(model: Any) -> bool:
    """Whether `model` came from `inject`."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def inner(model: Any) -> Any:
    """The transformers model, with the LoRA layers in it."""
    return model.get_base_model() if is_adapted(model) else model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write peft's own adapter_config.json and adapter_model.safetensors, and the tokenizer."""
    # Not the embeddings: an untied head was equal to them, and is made so again by `read`.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def read(model: Any, folder: Path) -> Any:
    """The peft model of a plain `model` and the adapter in `folder`."""
    from peft import PeftConfig, PeftModel

    if HEAD in (PeftConfig.from_pretrained(str(folder)).target_modules or ()):
        untie(model)
    with _layers_of_both_kinds():
        return PeftModel.from_pretrained(model, str(folder))


@contextmanager
def _layers_of_both_kinds() -> Iterator[None]:
    """GPT-2's head is a Linear among Conv1D: peft corrects its one flag layer by layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


@torch.no_grad()
def merged(model: Any) -> Any:
    """The plain transformers model with the updates folded in."""
    return model.merge_and_unload(safe_merge=True)
