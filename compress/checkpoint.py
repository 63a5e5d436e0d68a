"""Save and load models: safetensors for tensors, JSON for everything else, never pickle.

A folder holds config.json (transformers' own), model.safetensors and compression.json, which
lists the layers that are not plain ones and the sizes of blocks that config.json cannot say. A
folder without compression.json is an ordinary Hugging Face checkpoint, and an uncompressed model is
saved as one: GPT-2's Conv1D weights, which are Linear in memory, are written back transposed, and a
tied head is not written twice.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compress.block_shapes import reshape, unsaid
from compress.dynamic_linear import Float16Linear, Int8DynamicLinear
from compress.layers import model_dtype
from compress.low_rank_linear import LowRankLinear
from compress.model_config import skeleton
from compress.model_files import (
    CONFIG,
    WEIGHTS,
    assign,
    file_bytes,
    our_layers,
    place,
    plain_tensors,
    read_json,
    read_tensors,
    write_whole,
)
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear
from compress.sparse_linear import SparseLinear

VERSION = 1
ABOUT = "compression.json"
FILES = {CONFIG, WEIGHTS, ABOUT}
LAYER_KINDS: dict[str, Any] = {
    layer.kind: layer
    for layer in (
        *(QuantLinear, Int8DynamicLinear, Float16Linear, QuantEmbedding),
        *(SparseLinear, LowRankLinear),
    )
}


def save(model: Any, folder: Path | str, method: Any = None) -> None:
    """Write `model` to `folder`, whole or not at all; an earlier save there is replaced.

    method: the dataclass that made it, noted in compression.json. Raises OSError (a full disk, a
    folder that may not be written), ValueError if `folder` holds files that save did not write.
    """
    write_whole(Path(folder), lambda made: _write(model, made, method), FILES)


def _write(model: Any, folder: Path, method: Any) -> None:
    """The files of a checkpoint, into an empty folder."""
    layers = our_layers(model)
    tensors = plain_tensors(model)
    for name, layer in layers.items():
        tensors |= layer.state_dict(prefix=f"{name}.")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config = copy.deepcopy(model.config)
    config.dtype = model_dtype(model)  # the file's, not the source's
    config.to_json_file(folder / CONFIG)
    blocks = unsaid(model)
    if layers or blocks or method is not None:
        specs = {name: layer.spec() for name, layer in layers.items()}
        about = {"format": "slimbench", "version": VERSION, "layers": specs}
        if blocks:
            about["blocks"] = blocks
        if method is not None:
            about["method"] = type(method).__name__
            about["settings"] = dataclasses.asdict(method)
        text = json.dumps(about, indent=1, sort_keys=True)
        (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def load(folder: Path | str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model in `folder`, ready for inference; GPT-2's Conv1D come back as nn.Linear.

    dtype: converts the floating-point parameters of plain layers; None keeps them as stored.
    Raises ValueError, one line naming the file, for whatever is missing, corrupt or not ours.
    """
    folder = Path(folder)
    about = _about(folder)
    layers, blocks = _specs(about, folder), about.get("blocks")
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already; give the floating-point model")
    model = skeleton(config, folder / CONFIG, file_bytes(folder))
    if blocks is not None:
        try:
            reshape(model, blocks)
        except ValueError as error:
            raise ValueError(f"{folder / ABOUT}: {error}") from None
    for name, spec in layers.items():
        where = f"{folder / ABOUT}: layer {name!r}"
        place(model, name, _from_spec(spec, where), where)
    assign(model, read_tensors(folder, model.base_model_prefix), folder, dtype)
    return model.eval().requires_grad_(False)


def _from_spec(spec: Any, where: str) -> Any:
    """The empty layer that `spec` describes. Raises ValueError if it describes none."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
        raise ValueError(f"{where} is of unknown kind {kind!r}")
    try:
        return LAYER_KINDS[kind].from_spec(spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def layer_specs(folder: Path) -> dict[str, dict[str, Any]]:
    """Dotted name -> spec of each compressed layer in `folder`; empty for a plain checkpoint."""
    return _specs(_about(folder), folder)


def _specs(about: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """See layer_specs. about: what `folder` says in compression.json."""
    layers = about.get("layers")
    if not isinstance(layers, dict):
        raise ValueError(f"{folder / ABOUT}: 'layers' must be a mapping")
    return layers


def _about(folder: Path) -> dict[str, Any]:
    """compression.json, of a plain checkpoint what it would be; ValueError if it is not ours."""
    path = folder / ABOUT
    if not path.exists():
        return {"layers": {}}
    about = read_json(path)
    if about.get("format") != "slimbench" or about.get("version") != VERSION:
        raise ValueError(f"{path} is not of this program's format, version {VERSION}")
    return about
