"""compressed-tensors: the format of llm-compressor, run by vLLM and rebuilt by transformers.

`pack-quantized` is for weights alone. W = scale * (code - zero) is stored as weight_packed
(out, in * bits / 32) int32, codes packed along the inputs; weight_scale (out, groups) in the
model's type; weight_zero_point (out * bits / 32, groups) int32, packed along the outputs, where
codes are asymmetric; weight_shape (2,) int64. `int-quantized` is for int8 weights times int8
inputs: weight (out, in) int8, minus its symmetric zero, and weight_scale (out, 1). Inputs are
quantized as they come, a scale and a zero a token, as our Int8DynamicLinear does.

Not held: act-order, since the library took weight_g_idx out in 2026; GPT-2, whose layers are
Conv1D where this format is read, and its readers quantize Linear layers only.

Source: https://github.com/vllm-project/compressed-tensors, version 0.19,
compressors/pack_quantized and compressors/naive_quantized
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.dynamic_linear import Int8DynamicLinear
from compress.export import quantized_folder, read_folder
from compress.export.quantized_folder import codes_and_zero
from compress.export.read_folder import Parts, Settings
from compress.export.word_packing import from_words, to_words, word_count
from compress.model_files import our_layers
from compress.quant_linear import QuantLinear
from compress.quant_math import pack

NAME = "compressed-tensors"
HOLDS = "4 and 8-bit codes in groups or rows, and int8 weights times int8 inputs"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
BITS = (4, 8)
INPUTS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}


def refusal(model: Any) -> str | None:
    """See compress.export."""
    if model.config.model_type == "gpt2":
        return "GPT-2's layers are Conv1D in other runtimes, which quantize Linear layers only"
    if len({type(layer) for layer in our_layers(model).values()}) > 1:
        return "it has layers with int8 inputs and layers without; this format holds one kind"
    return quantized_folder.refusal(model, _refusal_of_layer)


def _refusal_of_layer(layer: QuantLinear) -> str | None:
    if layer.bits not in BITS:
        return f"has {layer.bits}-bit codes; this format holds 4 and 8"
    if layer.order is not None:
        return "has groups in act-order; groups of this format are neighbours"
    if layer.in_features % layer.group_size:
        return f"has {layer.in_features} inputs, no multiple of its group of {layer.group_size}"
    return None


def write(model: Any, folder: Path, tokenizer: Path | None) -> None:
    """Fill an empty `folder`; see compress.export."""
    layers = our_layers(model)
    first = next(iter(layers.values()))
    dynamic = isinstance(first, Int8DynamicLinear)
    size = quantized_folder.group_size_of(layers)
    symmetric = all(layer.zero is None for layer in layers.values())
    weights = {"num_bits": first.bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    inputs = INPUTS if dynamic else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    settings = {
        "quant_method": NAME,
        "format": INTEGERS if dynamic else PACKED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": quantized_folder.plain_linears(model),
    }
    make = _integers if dynamic else _packed
    tensors = {name: make(layer, symmetric) for name, layer in layers.items()}
    quantized_folder.write(model, folder, tokenizer, tensors, settings)


def _packed(layer: QuantLinear, symmetric: bool) -> dict[str, Tensor | None]:
    codes, zero = codes_and_zero(layer)
    return {
        "weight_packed": to_words(codes, layer.bits),
        "weight_scale": layer.scale.expand(layer.out_features, -1),
        "weight_zero_point": None if symmetric else to_words(zero.T, layer.bits).T,
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
        "bias": layer.bias,
    }


def _integers(layer: QuantLinear, symmetric: bool) -> dict[str, Tensor | None]:
    scale = layer.scale.expand(layer.out_features, -1)
    return {"weight": layer.codes, "weight_scale": scale, "bias": layer.bias}


def recognises(path: Path) -> bool:
    """See compress.export."""
    return read_folder.quantization_method(path) == NAME


def read(path: Path) -> Any:
    """See compress.export."""
    config, settings = read_folder.open_folder(path)
    settings.choice("quant_method", (NAME,))
    settings.choice("quantization_status", ("compressed",), "compressed")
    settings.refuse("sparsity_config", "transform_config", "kv_cache_scheme")
    groups = settings.object("config_groups")
    if len(groups.values) != 1:
        raise ValueError(f"{groups.where}: {len(groups.values)} groups; one is supported")
    group = groups.object(next(iter(groups.values)))
    group.refuse("output_activations")
    stored = settings.choice("format", (PACKED, INTEGERS))
    group.choice("format", (stored,), stored)
    weights = group.object("weights")
    weights.choice("type", ("int",), "int")
    weights.choice("dynamic", (False,), False)
    weights.choice("actorder", ("static", "weight", False), False)
    if stored == INTEGERS:
        _check_inputs(group.object("input_activations"))
        weights.choice("num_bits", (8,), 8)
        weights.choice("symmetric", (True,), True)
        weights.choice("strategy", ("channel",))
        return read_folder.read(path, config, "weight_scale", _integer_layer)
    group.refuse("input_activations")
    bits, size = weights.choice("num_bits", BITS), _group_size(weights)
    symmetric = weights.choice("symmetric", (True, False), True)
    return read_folder.read(
        path, config, "weight_scale", lambda parts: _packed_layer(parts, bits, size, symmetric)
    )


def _check_inputs(inputs: Settings) -> None:
    """Refuse all but what Int8DynamicLinear does with its input."""
    for key, value in INPUTS.items():
        inputs.choice(key, (value,))
    inputs.refuse("group_size", "block_structure")


def _group_size(weights: Settings) -> int:
    if weights.choice("strategy", ("channel", "group")) == "channel":
        return -1
    return weights.group_size()


def _packed_layer(parts: Parts, bits: int, size: int, symmetric: bool) -> QuantLinear:
    rows, columns = parts.rows, parts.columns
    size, groups = parts.groups(size)
    if columns % size:
        raise ValueError(f"{parts.where}: {columns} inputs are no multiple of groups of {size}")
    words = parts.take("weight_packed", (rows, word_count(columns, bits)), torch.int32)
    shape = parts.take("weight_shape", (2,), torch.int64, torch.int32).tolist()
    if shape != [rows, columns]:
        raise ValueError(f"{parts.where}.weight_shape is {shape}, not {[rows, columns]}")
    scale = parts.take_scale("weight_scale", (rows, groups))
    packed_zero = None
    if not symmetric:
        packed = (word_count(rows, bits), groups)
        zero_words = parts.take("weight_zero_point", packed, torch.int32)
        zero = from_words(zero_words.T, bits, rows).T
        packed_zero = None if parts.middle(zero, bits) else pack(zero, bits)
    codes = pack(from_words(words, bits, columns), bits)
    return QuantLinear(codes, scale, packed_zero, parts.take_bias(), bits, size, columns)


def _integer_layer(parts: Parts) -> QuantLinear:
    rows, columns = parts.rows, parts.columns
    weight = parts.take("weight", (rows, columns), torch.int8)
    scale = parts.take_scale("weight_scale", (rows, 1))
    return Int8DynamicLinear(weight, scale, None, parts.take_bias(), 8, columns, columns)
