"""Save and load models: safetensors for tensors, JSON for everything else, never pickle.

A folder holds config.json (transformers' own), model.safetensors and compression.json, which
lists the layers that are not plain ones. A folder without compression.json is an ordinary
Hugging Face checkpoint, and an uncompressed model is saved as one: GPT-2's Conv1D weights,
which are Linear in memory, are written back transposed, and a tied head is not written twice.
Reading trusts nothing: sizes, types and names are checked before a tensor is used.
"""

import copy
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.dynamic_linear import Float16Linear, Int8DynamicLinear
from compress.layers import FAMILIES, LinearFromConv1D, conv1d_to_linear
from compress.quant_linear import DTYPES, QuantLinear

VERSION = 1
CONFIG, WEIGHTS, ABOUT = "config.json", "model.safetensors", "compression.json"
INDEX = "model.safetensors.index.json"
FILES = {CONFIG, WEIGHTS, ABOUT}
LAYER_KINDS: dict[str, Any] = {
    layer.kind: layer for layer in (QuantLinear, Int8DynamicLinear, Float16Linear)
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_embd", "n_inner", "n_layer", "n_head"),
)
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers of old checkpoints


def save(model: Any, folder: Path | str, method: Any = None) -> None:
    """Write `model` to `folder`, whole or not at all; an earlier save there is replaced.

    method: the dataclass that made it, noted in compression.json. Raises OSError (a full disk, a
    folder that may not be written), ValueError if `folder` holds files that save did not write.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - FILES):
        raise ValueError(f"{folder} holds files that are not a saved model's; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made, old = temporary / "made", temporary / "old"
    try:
        made.mkdir()
        _write(model, made, method)
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


def _write(model: Any, folder: Path, method: Any) -> None:
    """The files of a checkpoint, into an empty folder."""
    tensors, layers = _plain_tensors(model)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config = copy.deepcopy(model.config)
    config.dtype = model.get_input_embeddings().weight.dtype  # the file's, not the source's
    config.to_json_file(folder / CONFIG)
    if layers or method is not None:
        about = {"format": "slimbench", "version": VERSION, "layers": layers}
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
    layers = layer_specs(folder)
    model = _skeleton(folder)
    for name, spec in layers.items():
        _place(model, name, spec, folder)
    tied = _tied_head(model)
    tensors = _read_tensors(folder, model.base_model_prefix)
    if tied:
        tensors.pop(tied, None)
    _assign(model, tensors, folder, dtype)
    if tied:
        model.tie_weights()
    return model.eval().requires_grad_(False)


def layer_specs(folder: Path) -> dict[str, dict[str, Any]]:
    """Dotted name -> spec of each compressed layer in `folder`; empty for a plain checkpoint."""
    path = folder / ABOUT
    if not path.exists():
        return {}
    about = read_json(path)
    if about.get("format") != "slimbench" or about.get("version") != VERSION:
        raise ValueError(f"{path} is not of this program's format, version {VERSION}")
    layers = about.get("layers")
    if not isinstance(layers, dict):
        raise ValueError(f"{path}: 'layers' must be a mapping")
    return layers


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


def _plain_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What goes into the file, and the specs of the layers that are not plain."""
    tied = _tied_head(model)
    if tied:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is not embedding.weight and not torch.equal(head.weight, embedding.weight):
            raise ValueError("head and embedding differ; set config.tie_word_embeddings = False")
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name != tied
    }
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearFromConv1D):
            tensors[f"{name}.weight"] = module.weight.detach().T.contiguous()
        elif getattr(module, "kind", None) in LAYER_KINDS:
            layers[name] = module.spec()
    return tensors, layers


def _tied_head(model: Any) -> str | None:
    """Name of the head's weight if it is the embedding's and so must not be stored twice."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return None
    for name, module in model.named_modules():
        if module is head:
            return f"{name}.weight"
    return None


def _skeleton(folder: Path) -> Any:
    """The model of config.json with its buffers, its parameters still on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / CONFIG
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{path}: model_type {model_type!r}; supported: {known}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already; give the floating-point model")
    _check_sizes(config, folder)
    try:
        settings = AutoConfig.for_model(**config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    except Exception as error:  # transformers raises many types for a config that makes no sense
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} does not describe a model: {first}") from None
    return conv1d_to_linear(model)


def _check_sizes(config: dict[str, Any], folder: Path) -> None:
    """Refuse a config whose model the files cannot hold, before anything is built from it."""
    bits = 8 * sum(path.stat().st_size for path in weight_files(folder) if path.exists())
    for key in SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= bits):
            raise ValueError(f"{folder / CONFIG}: {key} = {value!r} does not fit the weights")
    layers = max(config.get("num_hidden_layers") or 1, config.get("n_layer") or 1)
    if layers > bits // 1000:  # a decoder block has thousands of weights
        raise ValueError(f"{folder / CONFIG}: {layers} layers do not fit the weights")


def _place(model: Any, name: str, spec: Any, folder: Path) -> None:
    """Put the empty compressed layer `spec` where the plain layer `name` stands."""
    where = f"{folder / ABOUT}: layer {name!r}"
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
        raise ValueError(f"{where} is of unknown kind {kind!r}")
    try:
        plain = model.get_submodule(name)
        layer = LAYER_KINDS[kind].from_spec(spec)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(plain, nn.Linear) or (layer.out_features, layer.in_features) != (
        plain.out_features,
        plain.in_features,
    ):
        raise ValueError(f"{where} does not fit the model of config.json")
    model.set_submodule(name, layer)


def _read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
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


def _assign(
    model: Any, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | None
) -> None:
    """Give the model its tensors after checking that names, shapes and types are those expected."""
    for name, module in model.named_modules():
        if isinstance(module, LinearFromConv1D) and f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    expected = model.state_dict()
    tied = _tied_head(model)
    missing = sorted(expected.keys() - tensors.keys() - {tied})
    surplus = sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {surplus[0]}"
        raise ValueError(f"{folder}: the weights do not fit config.json: the file {what}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted.shape)}"
            raise ValueError(f"{folder}: tensor {name} has the wrong shape: {shapes}")
        owner = model.get_submodule(name.rpartition(".")[0])
        is_ours = getattr(owner, "kind", None) in LAYER_KINDS
        if is_ours and tensor.dtype != wanted.dtype:
            types = f"{tensor.dtype}, not {wanted.dtype}"
            raise ValueError(f"{folder}: tensor {name} has the wrong type: {types}")
        if not is_ours and tensor.dtype not in DTYPES.values():
            known = ", ".join(DTYPES)
            raise ValueError(f"{folder}: tensor {name} holds {tensor.dtype}, none of {known}")
        if is_ours:
            tensors[name] = tensor.clone()  # off the file's map: kernels need aligned memory
        elif dtype is not None:
            tensors[name] = tensor.to(dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
