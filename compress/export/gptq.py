"""GPTQ checkpoints in AutoGPTQ's layout: what vLLM, SGLang, ExLlama and gptqmodel run.

A layer y = x W^T with W = scale * (code - zero) is stored as qweight (in / 32 * bits, out) int32,
codes packed along the inputs; qzeros (groups, out / 32 * bits) int32, packed along the outputs;
scales (groups, out) float16; g_idx (in,) int32, the group of each input; bias. GPT-2's Conv1D
layers are stored in the same layout. In act-order (desc_act) neighbours of a group are not
neighbours in the matrix: inputs stay in their own order and g_idx says whose they are.

Version 1, `checkpoint_format` gptq, stores zero - 1. That has no room for a zero of 0: what is
stored wraps to all ones, which readers take for 2^bits, for 0, or let carry into the next zero;
gptqmodel refuses asymmetric codes in it altogether. So symmetric models are written as version 1,
which every reader knows, and asymmetric ones as gptq_v2, which stores zeros as they are.

Source: https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py and
https://github.com/ModelCloud/GPTQModel (gptq_v2)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.export import quantized_folder, read_folder
from compress.export.quantized_folder import codes_and_zero, half_scales
from compress.export.read_folder import Parts
from compress.export.word_packing import from_words, to_words, word_count
from compress.model_files import our_layers
from compress.quant_linear import QuantLinear
from compress.quant_math import BITS, pack

NAME = "gptq"
HOLDS = "2, 3, 4 and 8-bit codes in groups, act-order too, with float16 scales"
V1, V2 = "gptq", "gptq_v2"
SETTINGS_FILE = "quantize_config.json"  # the same once more, for AutoGPTQ
RUN = 32  # both sides of a layer are multiples of it


def refusal(model: Any) -> str | None:
    """See compress.export."""
    return quantized_folder.refusal(model, _refusal_of_layer)


def _refusal_of_layer(layer: QuantLinear) -> str | None:
    if type(layer) is not QuantLinear:
        return f"is a {type(layer).__name__}; this format leaves inputs in floating point"
    for side, size in (("inputs", layer.in_features), ("outputs", layer.out_features)):
        if size % RUN:
            return f"has {size} {side}; this format packs runs of {RUN}"
    if half_scales(layer) is None:
        return "has scales that float16, this format's type, cannot hold"
    return None


def write(model: Any, folder: Path, tokenizer: Path | None) -> None:
    """Fill an empty `folder`; see compress.export."""
    layers = our_layers(model)
    symmetric = all(layer.zero is None for layer in layers.values())
    tensors = {name: _tensors(layer, symmetric) for name, layer in layers.items()}
    plain = quantized_folder.plain_linears(model)
    settings: dict[str, Any] = {
        "quant_method": NAME,
        "checkpoint_format": V1 if symmetric else V2,
        "bits": next(iter(layers.values())).bits,
        "group_size": quantized_folder.group_size_of(layers),
        "sym": symmetric,
        "desc_act": any(layer.order is not None for layer in layers.values()),
        "lm_head": "lm_head" in layers,
        "pack_dtype": "int32",
    }
    if left := [name for name in plain if name != "lm_head"]:
        # gptqmodel's and vLLM's way to say that a layer of a block is not quantized.
        settings["dynamic"] = {f"-:^{name.replace('.', '[.]')}$": {} for name in left}
    quantized_folder.write(model, folder, tokenizer, tensors, settings)
    quantized_folder.write_json(folder / SETTINGS_FILE, settings)


def _tensors(layer: QuantLinear, minus_one: bool) -> dict[str, Tensor | None]:
    codes, zero = codes_and_zero(layer)
    group = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
    if layer.order is not None:
        back = torch.argsort(layer.order)
        codes, group = codes[:, back], group[back]
    return {
        "qweight": to_words(codes, layer.bits).T,
        "qzeros": to_words(zero.T - int(minus_one), layer.bits),
        "scales": _half(layer).T,
        "g_idx": group,
        "bias": layer.bias,
    }


def _half(layer: QuantLinear) -> Tensor:
    half = half_scales(layer)
    assert half is not None  # else refused
    return half


def recognises(path: Path) -> bool:
    """See compress.export."""
    return read_folder.quantization_method(path) == NAME


def read(path: Path) -> Any:
    """See compress.export."""
    config, settings = read_folder.open_folder(path)
    settings.choice("quant_method", (NAME,))
    version = settings.choice("checkpoint_format", (V1, V2), settings.values.get("format") or V1)
    bits, size = settings.choice("bits", BITS), settings.group_size()
    settings.choice("desc_act", (True, False), False)
    symmetric = settings.choice("sym", (True, False), True)
    settings.choice("pack_dtype", ("int32",), "int32")
    settings.refuse("is_marlin_format", "adapter", "rotation")
    if any(not rule.startswith("-:") for rule in settings.object("dynamic").values):
        raise ValueError(f"{settings.where}: dynamic: grids of single layers are not supported")

    def layer(parts: Parts) -> QuantLinear:
        made = _layer(parts, bits, size, version == V1)
        # Files of version 2 that say 1 are about; their zeros are off by one.
        if symmetric and made.zero is not None:
            raise ValueError(f"{parts.where}.qzeros are not {2 ** (bits - 1)}, which sym means")
        return made

    return read_folder.read(path, config, "qweight", layer)


def _layer(parts: Parts, bits: int, size: int, minus_one: bool) -> QuantLinear:
    rows, columns = parts.rows, parts.columns
    size, groups = parts.groups(size)
    words = parts.take("qweight", (word_count(columns, bits), rows), torch.int32)
    packed_zero = parts.take("qzeros", (groups, word_count(rows, bits)), torch.int32)
    scale = parts.take_scale("scales", (groups, rows)).T.contiguous()
    order = _order(parts, size, groups) if "g_idx" in parts else None
    zero = from_words(packed_zero, bits, rows).T
    if minus_one:
        if (zero == 2**bits - 1).any():
            raise ValueError(f"{parts.where}.qzeros: version 1 has no meaning for {2**bits - 1}")
        zero = zero + 1
    codes = from_words(words.T, bits, columns)
    codes = codes if order is None else codes[:, order]
    stored_zero = None if parts.middle(zero, bits) else pack(zero, bits)
    bias = parts.take_bias()
    return QuantLinear(pack(codes, bits), scale, stored_zero, bias, bits, size, columns, order)


def _order(parts: Parts, size: int, groups: int) -> Tensor | None:
    """The inputs sorted by their group, (in,) int32; None where they are sorted already."""
    group = parts.take("g_idx", (parts.columns,), torch.int32)
    expected = torch.arange(parts.columns, dtype=torch.int32) // size
    if not torch.equal(group.sort().values, expected):
        raise ValueError(f"{parts.where}.g_idx must give each of {groups} groups {size} inputs")
    order = torch.argsort(group, stable=True).to(torch.int32)
    return None if torch.equal(group, expected) else order
