"""Save and load models: safetensors for tensors, JSON for everything else, never pickle.

A folder holds config.json (transformers' own), model.safetensors and compression.json, which
lists the layers that are not plain ones. A folder without compression.json is an ordinary
Hugging Face checkpoint, and an uncompressed model is saved as one: GPT-2's Conv1D weights,
which are Linear in memory, are written back transposed, and a tied head is not written twice.
Reading trusts nothing: sizes, types and names are checked before a tensor is used.
"""

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
from compress.quant_linear import QuantLinear

VERSION = 1
LAYER_KINDS: dict[str, Any] = {
    layer.kind: layer for layer in (QuantLinear, Int8DynamicLinear, Float16Linear)
}
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers of old checkpoints


def save(model: Any, folder: Path | str, method: Any = None) -> None:
    """Write `model` to `folder`, whole or not at all; an existing folder of ours is replaced.

    method: the dataclass that made it, noted in compression.json. Raises OSError (a full disk, a
    folder that may not be written), ValueError if `folder` holds something that is not a model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a model folder; choose an empty or a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors, layers = _plain_tensors(model)
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / 'model.safetensors'}: {error}") from None
        (temporary / "model.safetensors").chmod(0o644)
        model.config.to_json_file(temporary / "config.json")
        if layers or method is not None:
            about = {"format": "slimbench", "version": VERSION, "layers": layers}
            if method is not None:
                about["method"] = type(method).__name__
                about["settings"] = dataclasses.asdict(method)
            _write_json(temporary / "compression.json", about)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    path = folder / "compression.json"
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
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a model folder: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not. Raises ValueError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        cure = "convert its pickled weights to safetensors first" if pickled else "nothing to load"
        raise ValueError(f"{folder} holds no .safetensors file; {cure}")
    return files


def _plain_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What goes into the file, and the specs of the layers that are not plain."""
    tied = _tied_head(model)
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

    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{path}: model_type {config.get('model_type')!r}; supported: {known}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already; give the floating-point model")
    try:
        settings = AutoConfig.for_model(**config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # transformers raises many types for a config that makes no sense
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} does not describe a model: {first}") from None
    return conv1d_to_linear(model)


def _place(model: Any, name: str, spec: Any, folder: Path) -> None:
    """Put the empty compressed layer `spec` where the plain layer `name` stands."""
    where = f"{folder / 'compression.json'}: layer {name!r}"
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind not in LAYER_KINDS:
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
        if not is_ours and not tensor.is_floating_point():
            raise ValueError(f"{folder}: tensor {name} holds {tensor.dtype}, not floats")
        if is_ours:
            tensors[name] = tensor.clone()  # off the file's map: kernels need aligned memory
        elif dtype is not None:
            tensors[name] = tensor.to(dtype)
    model.load_state_dict(tensors, strict=False, assign=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
