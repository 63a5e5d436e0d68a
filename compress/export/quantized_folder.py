"""Writing a Hugging Face folder of a quantized model: what GPTQ, AWQ and compressed-tensors share.

Such a folder is a plain checkpoint in which some linear layers are stored as several tensors of
codes, scales and zeros, and whose config.json says in `quantization_config` what they mean.
`read_folder` is the way back.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from compress.layers import is_tied, model_dtype, named_linears
from compress.model_config import portable
from compress.model_files import (
    CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
    our_layers,
    plain_tensors,
)
from compress.quant_linear import QuantLinear

SETTINGS = "quantization_config"


def refusal(model: Any, of_layer: Callable[[QuantLinear], str | None]) -> str | None:
    """The first reason why such a folder cannot mean exactly what `model` means, or None.

    of_layer: the format's own reason against a layer, which follows the layer's name.
    """
    layers = our_layers(model)
    if not layers:
        return "it has no quantized layer"
    for name, layer in layers.items():
        if reason := _common_refusal(layer, model_dtype(model)) or of_layer(layer):
            return f"{name} {reason}"
    head = model.get_output_embeddings()
    if is_tied(model.config.to_dict()) and isinstance(head, QuantLinear):
        return "the head has codes of its own, while config.json ties it to the embedding"
    types = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if len(types) > 1:
        return f"it mixes {' and '.join(sorted(types))}; readers of this format load one type"
    return one_grid(layers)


def _common_refusal(layer: Any, dtype: torch.dtype) -> str | None:
    if not isinstance(layer, QuantLinear):
        return f"is a {type(layer).__name__}; this format holds linear layers as integer codes"
    if layer.offset is not None:
        return "has offsets in floating point; this format holds integer zeros"
    if not is_exact(layer.scale, dtype):
        return f"has scales that {dtype}, which the model computes in, cannot hold"
    return None


def one_grid(layers: dict[str, QuantLinear]) -> str | None:
    """The reason why `layers` cannot share one `bits` and one `group_size`, or None."""
    first = next(iter(layers))
    bits, size = layers[first].bits, group_size_of(layers)
    for name, layer in layers.items():
        if layer.bits != bits:
            widths = f"{name} has {layer.bits}-bit codes and {first} {bits}-bit ones"
            return f"{widths}; this format holds one width"
        if layer.group_size != (layer.in_features if size == -1 else min(size, layer.in_features)):
            group = f"{name} has groups of {layer.group_size}, others of {size}"
            return f"{group}; this format holds one size"
    return None


def group_size_of(layers: dict[str, QuantLinear]) -> int:
    """The inputs of a row that share a scale; -1 where every layer has one scale a row."""
    sizes = {x.group_size for x in layers.values() if x.group_size < x.in_features}
    return max(sizes, default=-1)


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every one of `values`."""
    return torch.equal(values.to(dtype).to(values.dtype), values)


def half_scales(layer: QuantLinear) -> Tensor | None:
    """The layer's scales (out, groups) in float16, or None if float16 cannot hold them.

    A group whose codes all equal its zero is 0 under any scale: it gets 1 where its own scale,
    which may be the least number of bfloat16, is too small for float16.
    """
    scale = layer.scale.expand(layer.out_features, -1)
    half = scale.to(torch.float16)
    rounded = half.to(scale.dtype) != scale
    if not rounded.any():
        return half.contiguous()
    idle = _idle_groups(layer)
    return None if (rounded & ~idle).any() else half.masked_fill(rounded & idle, 1)


def _idle_groups(layer: QuantLinear) -> Tensor:
    """(out, groups) bool: the groups whose codes all equal their zero."""
    codes, zero = codes_and_zero(layer)
    differs = codes != zero.repeat_interleave(layer.group_size, 1)[:, : layer.in_features]
    padding = zero.shape[1] * layer.group_size - layer.in_features
    differs = F.pad(differs, (0, padding))
    return ~differs.view(len(codes), -1, layer.group_size).any(-1)


def codes_and_zero(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """Unsigned codes (out, in) and zero (out, groups), uint8, the symmetric zero as a number."""
    codes, zero = layer.codes_and_zero()
    return codes, zero.expand(layer.out_features, -1)


def plain_linears(model: Any) -> list[str]:
    """Dotted names of the linear layers left in floating point, for formats that list them."""
    return [name for name, _ in named_linears(model, skip=())]


def write(
    model: Any,
    folder: Path,
    tokenizer: Path | None,
    layers: dict[str, dict[str, Tensor | None]],
    settings: dict[str, Any],
) -> None:
    """Fill an empty `folder`: weights, config.json and a tokenizer's files.

    layers: dotted name -> the tensors, by their names in this format, that stand for the layer.
    settings: the quantization_config.
    """
    tensors = plain_tensors(model)
    for name, parts in layers.items():
        tensors |= {
            f"{name}.{part}": tensor.contiguous()
            for part, tensor in parts.items()
            if tensor is not None
        }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    write_json(folder / CONFIG, _config(model) | {SETTINGS: settings})
    for source in [tokenizer / name for name in TOKENIZER_FILES] if tokenizer else []:
        if source.is_file() and not source.is_symlink():
            shutil.copyfile(source, folder / source.name)


def _config(model: Any) -> dict[str, Any]:
    """config.json as other runtimes read it, those of transformers 4 as well."""
    config = copy.deepcopy(model.config)
    config.dtype = model_dtype(model)
    values = portable(json.loads(config.to_json_string()))
    return values | {"architectures": [type(model).__name__], "torch_dtype": values["dtype"]}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values`, keys sorted."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
