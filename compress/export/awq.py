"""AWQ checkpoints in AutoAWQ's GEMM layout: what vLLM, SGLang, transformers and gptqmodel run.

A layer y = x W^T with W = scale * (code - zero) is stored as qweight (in, out / 8) int32, eight
4-bit codes of neighbouring outputs in a word; qzeros (groups, out / 8) int32 in the same way;
scales (groups, out) float16; bias. In a word, from its low bits up, outputs stand in the order
0, 2, 4, 6, 1, 3, 5, 7. There is no order of inputs: a group is neighbours. Symmetric codes have a
stored zero of 8, since readers take `zero_point: false` in different ways.

Source: https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and
awq/utils/packing_utils.py
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.export import quantized_folder, read_folder
from compress.export.quantized_folder import codes_and_zero, half_scales
from compress.export.read_folder import Parts
from compress.export.word_packing import from_words, to_words
from compress.model_files import our_layers
from compress.quant_linear import QuantLinear
from compress.quant_math import pack

NAME = "awq"
HOLDS = "4-bit codes in groups with float16 scales"
BITS = 4
PER_WORD = 8
INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]  # which output of a run of 8 has bits 4 i and up of a word


def refusal(model: Any) -> str | None:
    """See compress.export."""
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        return "the head is quantized; readers of this format expect it in floating point"
    return quantized_folder.refusal(model, _refusal_of_layer)


def _refusal_of_layer(layer: QuantLinear) -> str | None:
    if type(layer) is not QuantLinear:
        return f"is a {type(layer).__name__}; this format leaves inputs in floating point"
    if layer.bits != BITS:
        return f"has {layer.bits}-bit codes; this format holds {BITS}"
    if layer.order is not None:
        return "has groups in act-order; groups of this format are neighbours"
    if layer.in_features % layer.group_size:
        return f"has {layer.in_features} inputs, no multiple of its group of {layer.group_size}"
    if layer.out_features % PER_WORD:
        return f"has {layer.out_features} outputs; this format packs runs of {PER_WORD}"
    if half_scales(layer) is None:
        return "has scales that float16, this format's type, cannot hold"
    return None


def write(model: Any, folder: Path, tokenizer: Path | None) -> None:
    """Fill an empty `folder`; see compress.export."""
    layers = our_layers(model)
    settings = {
        "quant_method": NAME,
        "version": "gemm",
        "bits": BITS,
        "group_size": quantized_folder.group_size_of(layers),
        "zero_point": True,
        "modules_to_not_convert": quantized_folder.plain_linears(model),
    }
    tensors = {name: _tensors(layer) for name, layer in layers.items()}
    quantized_folder.write(model, folder, tokenizer, tensors, settings)


def _tensors(layer: QuantLinear) -> dict[str, Tensor | None]:
    codes, zero = codes_and_zero(layer)
    half = half_scales(layer)
    assert half is not None  # else refused
    return {
        "qweight": interleaved_words(codes.T),
        "qzeros": interleaved_words(zero.T),
        "scales": half.T,
        "bias": layer.bias,
    }


def interleaved_words(codes: Tensor) -> Tensor:
    """(rows, columns) uint8 -> (rows, columns / 8) int32 in the order of INTERLEAVED."""
    return to_words(codes.reshape(-1, PER_WORD)[:, INTERLEAVED].reshape(codes.shape), BITS)


def from_interleaved(words: Tensor, columns: int) -> Tensor:
    """The inverse of `interleaved_words`."""
    back = torch.argsort(torch.tensor(INTERLEAVED))
    codes = from_words(words, BITS, columns)
    return codes.reshape(-1, PER_WORD)[:, back].reshape(codes.shape)


def recognises(path: Path) -> bool:
    """See compress.export."""
    return read_folder.quantization_method(path) == NAME


def read(path: Path) -> Any:
    """See compress.export."""
    config, settings = read_folder.open_folder(path)
    settings.choice("quant_method", (NAME,))
    settings.choice("version", ("gemm", "GEMM"), settings.values.get("format") or "gemm")
    settings.choice("bits", (BITS,), settings.values.get("w_bit"))
    settings.choice("zero_point", (True,), True)
    size = settings.group_size(settings.values.get("q_group_size"))
    settings.refuse("adapter", "rotation", "dynamic")
    return read_folder.read(path, config, "qweight", lambda parts: _layer(parts, size))


def _layer(parts: Parts, size: int) -> QuantLinear:
    rows, columns = parts.rows, parts.columns
    size, groups = parts.groups(size)
    if columns % size or rows % PER_WORD:
        raise ValueError(f"{parts.where} has {columns} inputs and {rows} outputs, which do not fit")
    words = parts.take("qweight", (columns, rows // PER_WORD), torch.int32)
    packed_zero = parts.take("qzeros", (groups, rows // PER_WORD), torch.int32)
    scale = parts.take_scale("scales", (groups, rows)).T.contiguous()
    zero = from_interleaved(packed_zero, rows).T
    return QuantLinear(
        pack(from_interleaved(words, rows).T, BITS),
        scale,
        None if parts.middle(zero, BITS) else pack(zero, BITS),
        parts.take_bias(),
        BITS,
        size,
        columns,
    )
