"""config.json: the empty model that it describes, checked first, and how others read it."""

import copy
from pathlib import Path
from typing import Any

import torch

from compress.block_shapes import head_width, shape_of
from compress.layers import FAMILIES, conv1d_to_linear, decoder_blocks, family, is_tied

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_embd", "n_inner", "n_layer", "n_head"),
)
LABELS = ("num_labels", "id2label", "label2id")  # of classifiers; any number makes as long a list


def skeleton(config: dict[str, Any], where: Path, file_bytes: int) -> Any:
    """The model that `config` describes with its buffers, its parameters on the meta device.

    where: the file that errors name. file_bytes: of the weights, which bound every size in it.
    Raises ValueError for a model type that we do not know, or sizes that the weights cannot have.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: model_type {model_type!r}; supported: {known}")
    _check_sizes(config, where, 8 * file_bytes)
    try:
        said = {key: value for key, value in config.items() if key not in LABELS}
        settings = AutoConfig.for_model(**said)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    except Exception as error:  # transformers raises many types for a config that makes no sense
        first = str(error).partition("\n")[0]
        raise ValueError(f"{where} does not describe a model: {first}") from None
    return conv1d_to_linear(model)


def new_model(like: Any, blocks: int, width: int, channels: int) -> Any:
    """A model with fresh weights, the same each time, of the type and vocabulary of `like`.

    width, channels: of hidden states and MLP; 0 for those of `like`. Heads stay as wide as they
    were, and share keys as they did. Raises ValueError for a width that whole heads do not fill.
    """
    config = copy.deepcopy(like.config)
    block, layout = decoder_blocks(like)[0][1], family(like)
    shape, each = shape_of(block, layout), head_width(block, layout)
    repeat = config.num_attention_heads // getattr(config, "num_key_value_heads", shape.groups)
    width, channels = width or config.hidden_size, channels or shape.channels
    if width % (each * repeat):
        raise ValueError(
            f"width {width} is no multiple of {each * repeat}: {repeat} heads of {each}"
        )
    if config.model_type == "gpt2":
        config.n_head, config.n_inner = width // each, channels
    else:
        config.num_attention_heads, config.intermediate_size = width // each, channels
        config.num_key_value_heads, config.head_dim = width // each // repeat, each
    config.hidden_size, config.num_hidden_layers = width, blocks
    config.dtype = torch.float32
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return conv1d_to_linear(made).eval()


def _check_sizes(config: dict[str, Any], where: Path, bits: int) -> None:
    """Refuse a config whose model the files cannot hold, before anything is built from it."""
    for key in SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= bits):
            raise ValueError(f"{where}: {key} = {value!r} does not fit the weights")
    layers = max(config.get("num_hidden_layers") or 1, config.get("n_layer") or 1)
    if layers > bits // 1000:  # a decoder block has thousands of weights
        raise ValueError(f"{where}: {layers} layers do not fit the weights")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 reads as 5 does; equal models get equal values.

    What is private and the version that wrote it are left out, ties and rope_theta are spelt out.
    """
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    kept.pop("transformers_version", None)
    kept["tie_word_embeddings"] = is_tied(kept)
    if "rope_parameters" in kept:
        kept["rope_theta"] = kept["rope_parameters"]["rope_theta"]
    return kept
