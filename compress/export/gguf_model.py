"""What GGUF calls the sizes and tensors of Llama and GPT-2, both directions.

transformers' settings <-> values under `llama.` and `gpt2.`; transformers' tensors <-> `blk.0.`...
llama.cpp's rotary pairs stand side by side where transformers' stand half a head apart, so the rows
of Llama's query and key projections change places. What one side can say and the other cannot is
refused: a GGUF file cannot say `hidden_act`, and a rope scaling that is not read is not skipped.
"""

import math
import struct
from typing import Any

from torch import Tensor

from compress.export.gguf_header import Header

SIZES = {  # transformers' name -> GGUF's, after the architecture
    "llama": {
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    },
    "gpt2": {
        "n_layer": "block_count",
        "n_positions": "context_length",
        "n_embd": "embedding_length",
        "n_inner": "feed_forward_length",
        "n_head": "attention.head_count",
    },
}
EPSILON = {
    "llama": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    "gpt2": ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
}
PRESUMED: dict[
    str, dict[str, tuple[Any, ...]]
] = {  # by GGUF, which has no key for them; gelu_pytorch_tanh is another name of gelu_new
    "llama": {"hidden_act": ("silu",)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
}
HEAD_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
HARMLESS = {  # values that say what is so anyway, under `llama.`
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.finetuned": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
IDS = ("bos", "eos", "unknown", "padding")
LEAST_TENSORS = 9  # of a block


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in a config.json as GGUF's values. Raises ValueError for what GGUF cannot say."""
    kind = config.get("model_type")
    if kind not in SIZES:
        raise ValueError(f"no GGUF of {kind!r} here")
    for key, wanted in PRESUMED[kind].items():
        if config.get(key, wanted[0]) not in wanted:
            raise ValueError(f"{key} is {config[key]!r}; GGUF presumes {wanted[0]!r}")
    sizes = {key: config.get(key) for key in (*SIZES[kind], "vocab_size")}
    if kind == "gpt2":
        sizes["n_inner"] = sizes["n_inner"] or 4 * (sizes["n_embd"] or 0)
    else:
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    if lacking := [key for key, size in sizes.items() if type(size) is not int or size < 1]:
        raise ValueError(f"{lacking[0]} is {sizes[lacking[0]]!r}, not a size")
    names = SIZES[kind] | {"vocab_size": "vocab_size"}
    values: dict[str, Any] = {"general.architecture": kind}
    values |= {f"{kind}.{names[key]}": size for key, size in sizes.items()}
    ours, theirs = EPSILON[kind]
    if type(config.get(ours)) is not float:
        raise ValueError(f"{ours} is {config.get(ours)!r}, not a number")
    values[f"{kind}.{theirs}"] = config[ours]
    return values | (_rotary(config) if kind == "llama" else {})


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rotary.get("rope_type", rotary.get("type", "default"))
    if rope != "default":
        raise ValueError(f"no conversion of rope_type {rope!r} to GGUF here")
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("no conversion of a partial_rotary_factor to GGUF here")
    theta = float(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if struct.unpack("<f", struct.pack("<f", theta))[0] != theta:
        raise ValueError(f"rope_theta {theta} is not exact in GGUF's 32 bits")
    return {f"llama.{key}": width for key in HEAD_WIDTHS} | {"llama.rope.freq_base": theta}


def config_of(header: Header) -> dict[str, Any]:
    """The config.json of the model in a file. Raises ValueError for what it cannot say.

    Sizes are compared with the file's tensors: what is built from them is no larger than these.
    """
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in SIZES:
        raise ValueError(f"holds a {str(kind)[:40]!r} model; give a llama or gpt2 one")
    if header.metadata.get("split.count", 1) != 1:
        raise ValueError("is one part of several; join them first, with llama-gguf-split --merge")
    values = {
        key.removeprefix(f"{kind}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{kind}.")
    }
    config: dict[str, Any] = {"model_type": kind}
    if kind == "llama":
        shared = "attention.head_count_kv"
        values.setdefault(shared, values.get("attention.head_count"))
    for ours, theirs in SIZES[kind].items():
        config[ours] = _size(theirs, values.pop(theirs, None))
    ours, theirs = EPSILON[kind]
    config[ours] = _positive(theirs, values.pop(theirs, None))
    config["vocab_size"] = _rows(header, "token_embd.weight")
    if (said := values.pop("vocab_size", config["vocab_size"])) != config["vocab_size"]:
        raise ValueError(f"vocab_size {_short(said)} is not that of token_embd.weight")
    config |= _llama(values, header, config) if kind == "llama" else _gpt2(header, config)
    for key, value in values.items():
        if value not in HARMLESS.get(key, ()):
            raise ValueError(f"{kind}.{_short(key)} is {_short(value)}, which is not known here")
    blocks = config[next(iter(SIZES[kind]))]
    if blocks * LEAST_TENSORS > len(header.tensors):
        raise ValueError(f"has too few tensors for {blocks} blocks")
    return config | _ids(header, config["vocab_size"]) | {"tie_word_embeddings": is_tied(header)}


def _llama(values: dict[str, Any], header: Header, config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    widths = {_size(key, values.pop(key)) for key in HEAD_WIDTHS if key in values}
    width = widths.pop() if widths else config["hidden_size"] // heads
    if widths or width % 2 or width * heads != _rows(header, "blk.0.attn_q.weight"):
        raise ValueError(f"{', '.join(HEAD_WIDTHS)}: not all are the even width of a head")
    if heads % config["num_key_value_heads"]:
        raise ValueError("attention.head_count is no multiple of attention.head_count_kv")
    theta = _positive("rope.freq_base", values.pop("rope.freq_base", 10000.0))
    return {
        "head_dim": width,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def _gpt2(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    if config["n_positions"] != _rows(header, "position_embd.weight"):
        raise ValueError("context_length is not that of position_embd.weight")
    return {"n_inner": None} if config["n_inner"] == 4 * config["n_embd"] else {}


def is_tied(header: Header) -> bool:
    """Whether the head is the embedding; files of GPT-2 hold the matrix twice."""
    names = ("output.weight", "token_embd.weight")
    if names[0] not in header.tensors:
        return True
    head, embedding = (header.tensors[name] for name in names)
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    return same and header.bytes_of(names[0]) == header.bytes_of(names[1])


def _ids(header: Header, vocab_size: int) -> dict[str, int]:
    found = {}
    for name in IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = header.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise ValueError(f"{key} is {_short(value)}, no token of {vocab_size}")
        if value is not None and name in ("bos", "eos", "padding"):
            found[f"{name.replace('padding', 'pad')}_token_id"] = value
    return found


def _rows(header: Header, name: str) -> int:
    place = header.tensors.get(name)
    if place is None:
        raise ValueError(f"lacks the tensor {name}")
    return place.shape[0]


def _size(key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} must be a positive whole number, not {_short(value)}")
    return value


def _positive(key: str, value: Any) -> float:
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} must be a positive number, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    """What the file says, fit for one line."""
    return repr(value if isinstance(value, int | float) else str(value)[:40])


def tensor_names(kind: str, blocks: int, names: list[str]) -> dict[str, str]:
    """transformers' name -> GGUF's. Raises ValueError for a tensor that GGUF has no place for."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map({"llama": MODEL_ARCH.LLAMA, "gpt2": MODEL_ARCH.GPT2}[kind], blocks)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if lost := [name for name, new in found.items() if new is None]:
        raise ValueError(f"no place in GGUF for {lost[0]}")
    return {name: new for name, new in found.items() if new is not None}


def turning_heads(config: dict[str, Any], name: str) -> int:
    """How many heads the rows of transformers' tensor `name` turn in, by rotary pairs; 0: none."""
    if config["model_type"] == "llama" and ".q_proj." in name:
        return config["num_attention_heads"]
    if config["model_type"] == "llama" and ".k_proj." in name:
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """A query or key projection in llama.cpp's order of rows: rotary pairs side by side.

    rows: (heads * width, ...), in transformers' order, where channel c turns with c + width / 2.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()
