"""The files of a Hugging Face folder, between disk and model: what all our readers share.

config.json makes an empty model (model_config.py), safetensors fill it. `write_whole` makes a
folder whole or not at all. Reading trusts nothing: sizes, types and names are checked before a
tensor is used.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.dtypes import DTYPES
from compress.layers import LinearFromConv1D
from compress.quant_embedding import QuantEmbedding

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers of old checkpoints


def write_whole(folder: Path, write: Callable[[Path], None], replaces: set[str]) -> None:
    """Have `write` fill an empty folder, then put it at `folder`: whole or not at all.

    replaces: names of files that a folder there already may hold. Raises ValueError if it holds
    others, OSError (a full disk, a folder that may not be written).
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - replaces):
        raise ValueError(f"{folder} holds files that are not a saved model's; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made, old = temporary / "made", temporary / "old"
    try:
        made.mkdir()
        write(made)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(made, folder)
        except BaseException:  # Ctrl-C too
            if old.exists():
                os.rename(old, folder)
            raise
    except SafetensorError as error:
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"{path.parent} is not a model folder: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or the shards its index names.

    Raises ValueError if there is none, or the index names a file outside the folder.
    """
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ValueError(f"{folder / INDEX}: 'weight_map' must name files of this folder")
        files = [folder / name for name in sorted(set(names))]
    elif (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    else:
        files = sorted(folder.glob("model-*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        cure = "convert its pickled weights to safetensors first" if pickled else "nothing to load"
        raise ValueError(f"{folder} holds no {WEIGHTS}; {cure}")
    return files


def is_ours(module: nn.Module) -> bool:
    """Whether `module` is a compressed layer of ours, which describes itself by a spec."""
    return hasattr(module, "spec") and hasattr(module, "from_spec")


def our_layers(model: nn.Module) -> dict[str, Any]:
    """Dotted name -> compressed layer, each once; a tied head goes by the embedding's name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_ours(module) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def plain_tensors(model: Any) -> dict[str, Tensor]:
    """What is not in compressed layers, as a Hugging Face file has it: name -> tensor.

    GPT-2's Conv1D weights are (in, out) again and a tied head is left out. Raises ValueError if a
    head that should be tied is not the embedding.
    """
    tied = tied_head(model)
    if tied:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is not embedding.weight and not torch.equal(head.weight, embedding.weight):
            raise ValueError("head and embedding differ; set config.tie_word_embeddings = False")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == tied or _inside(model, name):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, LinearFromConv1D) and name.endswith(".weight")
        tensors[name] = (tensor.detach().T if turned else tensor.detach()).contiguous()
    return tensors


def tied_head(model: Any) -> str | None:
    """Name of the head's weight if it is the embedding's and so must not be stored twice."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return None
    return f"{head_name(model)}.weight"


def head_name(model: Any) -> str:
    """Dotted name of the vocabulary projection."""
    head = model.get_output_embeddings()
    # Where it is tied and quantized, the embedding holds the same module under a longer name.
    return next(name for name, module in model.named_children() if module is head)


def tie(model: Any) -> None:
    """Make the head what config.json says it is: the embedding's matrix, float or codes."""
    embedding = model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    if isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(embedding.table)
    elif isinstance(model.get_output_embeddings(), nn.Linear):
        model.tie_weights()


def file_bytes(folder: Path) -> int:
    """Bytes of the folder's files of weights."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.exists())


def place(model: Any, name: str, layer: Any, where: str) -> None:
    """Put a compressed layer where the plain layer `name` stands.

    where: what errors begin with. Raises ValueError if there is none of its shape.
    """
    try:
        plain = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(layer, QuantEmbedding):
        fits = isinstance(plain, nn.Embedding) and plain is model.get_input_embeddings()
        shape = (layer.table.out_features, layer.table.in_features)
    else:
        fits, shape = isinstance(plain, nn.Linear), (layer.out_features, layer.in_features)
    if not fits or tuple(plain.weight.shape) != shape:
        raise ValueError(f"{where} does not fit the model of config.json")
    model.set_submodule(name, layer)


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors of the checkpoint, memory-mapped, under the names the model uses."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name in tensors:
                        raise ValueError(f"tensor {name} stands in two files")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is corrupt or cut short: {error}") from None
    if not any(name.startswith(f"{prefix}.") for name in tensors):
        # GPT-2's hub files name the body's tensors without "transformer.".
        tensors = {
            name if name.startswith("lm_head") else f"{prefix}.{name}": tensor
            for name, tensor in tensors.items()
        }
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}


def assign(
    model: Any, tensors: dict[str, Tensor], where: Path, dtype: torch.dtype | None = None
) -> None:
    """Give the model its tensors after checking that names, shapes and types are those expected.

    tensors: of plain layers, under the file's names and in the file's layout, and of compressed
    layers that are still empty. dtype: see checkpoint.load. Ties the head.
    """
    tie(model)
    expected = model.state_dict()
    if tied := tied_head(model):
        expected.pop(tied)
        tensors.pop(tied, None)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding) and model.get_output_embeddings() is embedding.table:
        head = f"{head_name(model)}."
        expected = {name: value for name, value in expected.items() if not name.startswith(head)}
    filled = {name for name in expected if not expected[name].is_meta and _inside(model, name)}
    missing = sorted(expected.keys() - tensors.keys() - filled)
    surplus = sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {surplus[0]}"
        raise ValueError(f"{where}: the weights do not fit config.json: the file {what}")
    for name, tensor in tensors.items():
        owner, inside = model.get_submodule(name.rpartition(".")[0]), _inside(model, name)
        wanted = expected[name]
        if isinstance(owner, LinearFromConv1D) and name.endswith(".weight"):
            tensor = tensor.T.contiguous()
        if tensor.shape != wanted.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted.shape)}"
            raise ValueError(f"{where}: tensor {name} has the wrong shape: {shapes}")
        if inside and tensor.dtype != wanted.dtype:
            types = f"{tensor.dtype}, not {wanted.dtype}"
            raise ValueError(f"{where}: tensor {name} has the wrong type: {types}")
        if not inside and tensor.dtype not in DTYPES.values():
            known = ", ".join(DTYPES)
            raise ValueError(f"{where}: tensor {name} holds {tensor.dtype}, none of {known}")
        if inside:
            tensor = tensor.clone()  # off the file's map: kernels need aligned memory
        elif dtype is not None:
            tensor = tensor.to(dtype)
        tensors[name] = tensor
    model.load_state_dict(tensors, strict=False, assign=True)
    tie(model)


def _inside(model: nn.Module, name: str) -> bool:
    """Whether the tensor `name` belongs to a compressed layer of ours."""
    return is_ours(model.get_submodule(name.rpartition(".")[0]))
