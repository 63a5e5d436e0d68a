"""A new GPT-2 or Llama from a few sizes, or from a config.json; own definitions by dotted path."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.errors import UsageError
from compress import checkpoint, model_files
from compress.layers import FAMILIES
from finetune.options import setting


@dataclass(frozen=True)
class Architecture:
    """Sizes of a new model; the vocabulary is the tokenizer's."""

    family: str = setting("gpt2", "gpt2, llama, or a config.json of one of them.")
    layers: int = setting(12, "Decoder blocks.", least=1)
    width: int = setting(768, "Length of the vectors between blocks.", least=1)
    heads: int = setting(12, "Attention heads.", least=1)
    kv_heads: int | None = setting(None, "Key and value heads (llama); default: heads.", least=1)
    inner: int | None = setting(None, "Width inside the MLP; default: 4, or 8/3, times width.")
    context: int = setting(1024, "Longest sequence, and the window trained on.", least=2)
    dropout: float = setting(0.0, "Share of activations dropped in training (gpt2).", least=0)
    definition: str | None = setting(
        None, "Own subclass of a family, package.module:Class; the bench loads it as the family."
    )


def make(sizes: Architecture, vocabulary: int, end_of_text: int | None) -> Any:
    """A model with new random weights (transformers' own initialisation), from torch's seed.

    vocabulary: number of token ids. Raises UsageError for sizes that do not fit together.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = _config(sizes) | {
        "vocab_size": vocabulary,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    try:
        config = AutoConfig.for_model(**values)
        config.use_cache = False
        if sizes.definition:
            model = _definition(sizes.definition)(config)
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, TypeError, AssertionError, ImportError, AttributeError) as error:
        raise UsageError(f"these sizes make no model: {error}") from None
    model.config.use_cache = True
    return model.float()


def continue_from(model: Any, folder: Path) -> list[str]:
    """Copy the weights in `folder` whose names and shapes fit; the names of those left as new."""
    stored = read_plain(folder).state_dict()
    fresh = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored and stored[name].shape == parameter.shape:
                parameter.copy_(stored[name])
            else:
                fresh.append(name)
    if len(fresh) == len(list(model.parameters())):
        raise UsageError(f"no weight in {folder} fits this architecture")
    return fresh


def read_plain(folder: Path) -> Any:
    """The model in `folder` as transformers has it, in float32: what is trained and merged.

    Not compress.load: its Linear layers for GPT-2's Conv1D hold the weights transposed. Raises
    UsageError for a compressed model, in whose place transformers would put random weights.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.layer_specs(folder):
        raise UsageError(f"{folder} is compressed; name the model that it was made from")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )


def _config(sizes: Architecture) -> dict[str, Any]:
    if sizes.width % sizes.heads:
        raise UsageError(f"width {sizes.width} is no multiple of {sizes.heads} heads")
    if sizes.family == "gpt2":
        return {
            "model_type": "gpt2",
            "n_layer": sizes.layers,
            "n_embd": sizes.width,
            "n_head": sizes.heads,
            "n_inner": sizes.inner,
            "n_positions": sizes.context,
            "activation_function": "gelu_pytorch_tanh",  # GPT-2's own formula, in one kernel
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), sizes.dropout),
        }
    if sizes.family == "llama":
        return {
            "model_type": "llama",
            "num_hidden_layers": sizes.layers,
            "hidden_size": sizes.width,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads or sizes.heads,
            # 8/3, rounded up to a multiple of 64: as many weights as GPT-2's MLP of 4.
            "intermediate_size": sizes.inner or -(-sizes.width * 8 // 3 // 64) * 64,
            "max_position_embeddings": sizes.context,
            "tie_word_embeddings": True,
        }
    path = Path(sizes.family)
    if not path.is_file():
        raise UsageError(f"--family {sizes.family!r} is none of {', '.join(FAMILIES)} and no file")
    config = model_files.read_json(path)
    if config.get("model_type") not in FAMILIES:
        raise UsageError(f"{path}: model_type must be one of {', '.join(FAMILIES)}")
    return config


def _definition(path: str) -> Any:
    from transformers import PreTrainedModel

    module, _, name = path.partition(":")
    if not name:
        raise UsageError(f"--definition {path!r} must read package.module:Class")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise UsageError(f"--definition {path}: not a subclass of transformers' PreTrainedModel")
    return found
