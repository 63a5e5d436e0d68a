"""Size of the saved artefact: bytes of the folder, bits a weight, and what was left alone.

Everything is read from the files: the headers of the safetensors and compression.json. Bits of
a quantized weight count its codes, scales, zeros and orders; bits over all weights count every
tensor, so that embeddings and norms in floating point are not forgotten. Of a format that is not
ours only the size of its tensors is known, and what they stand for: the parent's weights.
"""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bench.metrics.subject import Progress, Subject
from compress import onnx_graph
from compress.checkpoint import layer_specs
from compress.export import gguf_header
from compress.layers import is_tied
from compress.model_files import IGNORED, TOKENIZER_FILES, read_json, weight_files

FOREIGN = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx_data")  # files of weights
NOT_OF_THE_MODEL = (  # tokenizers, which our artefacts do not hold, and the report of an export
    *TOKENIZER_FILES,
    "export.json",
)
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


def size(subject: Subject, progress: Progress) -> dict[str, Any]:
    """size_bytes: all files but the tokenizer's. tensor_bytes: the tensors alone.

    weights: how many numbers they mean.

    bits_per_weight = 8 * tensor_bytes / weights; bits_per_quantized_weight the same over the
    quantized matrices alone (None if there is none), quantized_weights their number.
    left_alone: role (embedding, norm, bias, head, linear) -> how many weights stayed as floats;
    kept_by_setting: the method's `skip`, the reason where a head or a linear is among them (no
    method touches embeddings, norms and biases). A head that is tied to the embedding means no
    weights of its own, even where a quantized copy of it is stored.
    """
    folder = subject.artefact
    size_bytes = sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and file.name not in NOT_OF_THE_MODEL
    )
    if subject.made_from is not None:
        return foreign(folder, subject.made_from) | {"size_bytes": size_bytes}
    specs = layer_specs(folder)
    about = read_json(folder / "compression.json") if specs else {}
    quantized = {name: spec["in_features"] * spec["out_features"] for name, spec in specs.items()}
    tensors = headers(folder)
    inside = {  # an embedding's codes are those of the table in it
        name
        for name in tensors
        if name.rpartition(".")[0].removesuffix(".table") in quantized
        and not name.endswith(".bias")
    }
    quantized_bytes = sum(tensors[name][1] for name in inside)
    left_alone: dict[str, int] = {}
    for name in tensors.keys() - inside:
        role = role_of(name, tensors[name][0])
        left_alone[role] = left_alone.get(role, 0) + math.prod(tensors[name][0])
    quantized_weights = sum(quantized.values())
    tied = is_tied(read_json(folder / "config.json"))
    twice = sum(count for name, count in quantized.items() if tied and name == "lm_head")
    weights = quantized_weights - twice + sum(left_alone.values())
    tensor_bytes = sum(count for _, count in tensors.values())
    return {
        "size_bytes": size_bytes,
        "tensor_bytes": tensor_bytes,
        "weights": weights,
        "bits_per_weight": 8 * tensor_bytes / weights,
        "quantized_weights": quantized_weights,
        "bits_per_quantized_weight": 8 * quantized_bytes / quantized_weights if quantized else None,
        "left_alone": left_alone,
        "kept_by_setting": about.get("settings", {}).get("skip", []),
    }


def foreign(folder: Path, parent: Path) -> dict[str, Any]:
    """What can be said of an artefact in a format that is not ours; see size.

    tensor_bytes: without headers and the tokenizer that a GGUF file may hold; of ONNX, whole files.
    weights: the parent's; of tensors of the parent's names as many as they are, and of a graph of
    ours what it says itself, since something may have been pruned. Raises ValueError if no file
    holds weights.
    """
    tensor_bytes = sum(payload(file) for kind in FOREIGN for file in folder.rglob(kind))
    if not tensor_bytes:
        raise ValueError(f"{folder} holds no file of weights: none of {', '.join(FOREIGN)}")
    tied = is_tied(read_json(parent / "config.json"))
    before, after = numbers(parent, tied), numbers(folder, tied)
    counted = after if after.keys() == before.keys() else before
    weights = onnx_graph.weights(folder) or sum(counted.values())
    return {
        "tensor_bytes": tensor_bytes,
        "weights": weights,
        "bits_per_weight": 8 * tensor_bytes / weights,
        "quantized_weights": None,
        "bits_per_quantized_weight": None,
        "left_alone": {},
        "kept_by_setting": [],
    }


def numbers(folder: Path, tied: bool) -> dict[str, int]:
    """Tensor name -> its numbers, over all safetensors files; a tied head has none of its own."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if not name.endswith(IGNORED) and not (tied and name == "lm_head.weight"):
                    found[name] = math.prod(file.get_slice(name).get_shape())
    return found


def payload(file: Path) -> int:
    """Bytes of the tensors in a file of weights. Raises ValueError if it is malformed."""
    if file.suffix == ".gguf":
        return sum(place.size for place in gguf_header.parse(file).tensors.values())
    total = file.stat().st_size
    if file.suffix != ".safetensors":
        return total
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header + 8 > total:
        raise ValueError(f"{file} is not a safetensors file, or cut short")
    return total - 8 - header


def headers(folder: Path) -> dict[str, tuple[list[int], int]]:
    """Tensor name -> (shape, bytes) over all safetensors files of `folder`."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                part = file.get_slice(name)
                shape = part.get_shape()
                kind = part.get_dtype()
                if kind not in BYTES:
                    raise ValueError(f"{path}: tensor {name} is of unknown type {kind}")
                found[name] = (shape, math.prod(shape) * BYTES[kind])
    return found


def role_of(name: str, shape: list[int]) -> str:
    """What a tensor left in floating point is, by its name in GPT-2 and Llama checkpoints."""
    if name.endswith(".bias"):
        return "bias"
    if len(shape) == 1:
        return "norm"
    if any(part in name for part in ("embed", "wte", "wpe")):
        return "embedding"
    return "head" if name.startswith("lm_head") else "linear"
