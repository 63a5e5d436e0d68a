"""GGUF, the files of llama.cpp: `gguf`.

Linear layers and the vocabulary matrix as codes in blocks of 32 (Q8_0, Q4_0, Q4_1; see
gguf_blocks), other matrices in their own type, vectors in float32, the sizes and the tokenizer.
Reading keeps codes as they stand in the file, with float16 scales; the vocabulary matrix and layers
with a bias get float32 ones, since rows and bias have the type of the scales. Other types of block
(Q4_K, Q6_K, ...) become plain float32 weights. The model that is read computes in float32.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.dynamic_linear import Float16Linear
from compress.export import gguf_header, gguf_tokenizer
from compress.export.gguf_blocks import BLOCK_BYTES, from_blocks, kind_of, to_blocks
from compress.export.gguf_header import Header, NewTensor
from compress.export.gguf_model import (
    config_of,
    halved,
    interleaved,
    metadata_of,
    tensor_names,
    turning_heads,
)
from compress.layers import LinearFromConv1D, decoder_blocks
from compress.model_config import skeleton
from compress.model_files import (
    CONFIG,
    assign,
    our_layers,
    place,
    plain_tensors,
    tied_head,
)
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear

NAME = "gguf"
HOLDS = "Llama and GPT-2; 8-bit symmetric codes, 4-bit and fewer in groups of 32 or more; float"
MODEL = "model.gguf"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2  # of the blocks, since May 2023


def refusal(model: Any) -> str | None:
    """Why GGUF cannot hold `model` exactly, naming the layer; None if it can."""
    try:
        metadata_of(model.config.to_dict())
        _plan(model)
    except ValueError as error:
        return str(error)
    return None


def write(model: Any, folder: Path, tokenizer: Path | None = None) -> None:
    """Write `model` as model.gguf.

    tokenizer: a folder; None writes a file that takes token ids only. Raises ValueError for a model
    that does not fit (see refusal), or a tokenizer that llama.cpp has no equal of.
    """
    config = model.config.to_dict()
    tensors = _plan(model)
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            weights[tensor.kind] += tensor.shape[0] * tensor.shape[1]
    values = metadata_of(config)
    values["general.file_type"] = FILE_TYPES[weights.most_common(1)[0][0]]
    if weights.keys() & BLOCK_BYTES.keys():
        values["general.quantization_version"] = QUANTIZATION_VERSION
    values |= gguf_tokenizer.metadata_of(tokenizer, config)
    gguf_header.write(folder / MODEL, values, tensors)


def _plan(model: Any) -> list[NewTensor]:
    """What the file will hold, made when it is written. Raises ValueError for what does not fit."""
    config = model.config.to_dict()
    layers: dict[str, QuantLinear] = {}
    plain: dict[str, Tensor] = {}
    for name, layer in our_layers(model).items():
        matrix = layer.table if isinstance(layer, QuantEmbedding) else layer
        if type(matrix) is QuantLinear:
            layers[f"{name}.weight"] = matrix
        elif isinstance(matrix, Float16Linear):
            plain[f"{name}.weight"] = matrix.weight
        else:
            raise ValueError(f"{name}: GGUF has no layer that computes as {layer.kind!r} does")
        if matrix.bias is not None:
            plain[f"{name}.bias"] = matrix.bias
    for name, tensor in plain_tensors(model).items():
        turned = isinstance(model.get_submodule(name.rpartition(".")[0]), LinearFromConv1D)
        plain[name] = tensor.T if turned and tensor.dim() == 2 else tensor
    names = tensor_names(config["model_type"], len(decoder_blocks(model)), [*layers, *plain])
    planned = [_plan_layer(name, names[name], layer, config) for name, layer in layers.items()]
    planned += [_plan_plain(name, names[name], tensor, config) for name, tensor in plain.items()]
    return planned


def _plan_layer(name: str, new: str, layer: QuantLinear, config: dict[str, Any]) -> NewTensor:
    try:
        kind = kind_of(layer)
    except ValueError as error:
        raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None
    heads = turning_heads(config, name)

    def make() -> Tensor:
        return interleaved(to_blocks(layer), heads) if heads else to_blocks(layer)

    return NewTensor(new, kind, (layer.out_features, layer.in_features), make)


def _plan_plain(name: str, new: str, tensor: Tensor, config: dict[str, Any]) -> NewTensor:
    kinds = [kind for kind, dtype in PLAIN.items() if dtype == tensor.dtype]
    if not kinds:
        raise ValueError(f"{name} holds {tensor.dtype}, none of {', '.join(PLAIN)}")
    kind = kinds[0] if tensor.dim() > 1 else "F32"  # llama.cpp computes with float32 vectors
    heads = turning_heads(config, name)

    def make() -> Tensor:
        rows = interleaved(tensor, heads) if heads else tensor.contiguous()
        return rows.to(PLAIN[kind]).view(torch.uint8)

    return NewTensor(new, kind, tuple(tensor.shape), make)


def recognises(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder with one and no config.json."""
    if path.is_dir():
        return not (path / CONFIG).exists() and len(list(path.glob("*.gguf"))) == 1
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(gguf_header.MAGIC)) == gguf_header.MAGIC


def read(path: Path) -> Any:
    """The model in a file, or in the only GGUF file of a folder, ready for inference.

    Raises ValueError, one line naming the file, for whatever is missing, malformed or unknown.
    """
    file = _only_file(path) if path.is_dir() else path
    header = gguf_header.parse(file)
    try:
        config = config_of(header)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
    model = skeleton(config, file, len(header.data))
    names = _stored_names(model, header, file)
    tensors: dict[str, Tensor] = {}
    biases_first = sorted(names, key=lambda name: name.endswith(".weight"))
    for name in biases_first:  # which layers of codes take with them
        theirs, layer_name = names[name], name.rpartition(".")[0]
        kind, where = header.tensors[theirs].kind, f"{file}: tensor {theirs}"
        owner = model.get_submodule(layer_name)
        embeds = owner is model.get_input_embeddings()
        rows = _rows(header, theirs, turning_heads(config, name))
        if kind in BLOCK_BYTES and (embeds or isinstance(owner, nn.Linear)):
            bias = tensors.pop(f"{layer_name}.bias", None)
            place(model, layer_name, _coded(kind, rows, bias, embeds, where), where)
        else:
            tensor = _plain(kind, rows, where).view(header.tensors[theirs].shape)
            turned = isinstance(owner, LinearFromConv1D) and tensor.dim() == 2
            tensors[name] = tensor.T if turned else tensor
    assign(model, tensors, file)
    return model.eval().requires_grad_(False)


def _only_file(folder: Path) -> Path:
    files = list(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} GGUF files, not one")
    if not files[0].resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{files[0]} leads out of its folder")
    return files[0]


def _stored_names(model: Any, header: Header, file: Path) -> dict[str, str]:
    """The model's names -> the file's, all there and of the right shape, or ValueError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied := tied_head(model):
        del shapes[tied]
    names = tensor_names(model.config.model_type, len(decoder_blocks(model)), list(shapes))
    surplus = header.tensors.keys() - set(names.values()) - {"output.weight" if tied else ""}
    if surplus:
        raise ValueError(f"{file} has an unknown tensor {min(surplus)!r}")
    for name, theirs in names.items():
        if theirs not in header.tensors:
            raise ValueError(f"{file} lacks the tensor {theirs}")
        found = header.tensors[theirs]
        if found.shape != shapes[name]:
            raise ValueError(f"{file}: tensor {theirs} has shape {found.shape}, not {shapes[name]}")
        if len(found.shape) == 1 and found.kind not in PLAIN:
            raise ValueError(f"{file}: tensor {theirs} is a vector of type {found.kind}, not float")
    return names


def _coded(
    kind: str, rows: Tensor, bias: Tensor | None, embeds: bool, where: str
) -> QuantLinear | QuantEmbedding:
    dtype = torch.float16 if bias is None and not embeds else torch.float32  # see the module
    try:
        layer = from_blocks(kind, rows, bias, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return QuantEmbedding(layer) if embeds else layer


def _plain(kind: str, rows: Tensor, where: str) -> Tensor:
    """Rows of bytes as float32."""
    return rows.view(PLAIN[kind]).float() if kind in PLAIN else _dequantized(kind, rows, where)


def _dequantized(kind: str, rows: Tensor, where: str) -> Tensor:
    """Blocks of a type that is kept nowhere here, as float32 weights."""
    from gguf import GGMLQuantizationType, dequantize

    try:
        with np.errstate(all="ignore"):  # files may hold anything; what comes out is checked
            weights = dequantize(rows.numpy(), GGMLQuantizationType[kind])
    except NotImplementedError:
        raise ValueError(f"{where} is of type {kind}, which cannot be read here") from None
    tensor = torch.from_numpy(np.ascontiguousarray(weights))
    if not tensor.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinity")
    return tensor


def _rows(header: Header, name: str, heads: int) -> Tensor:
    """A tensor as (rows, bytes of a row) uint8, rows in transformers' order; a copy."""
    content = np.frombuffer(header.bytes_of(name), dtype=np.uint8).copy()
    rows = torch.from_numpy(content).view(header.tensors[name].shape[0], -1)
    return halved(rows, heads) if heads else rows
