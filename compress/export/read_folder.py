"""Reading a Hugging Face folder of a quantized model that came from anywhere.

What GPTQ, AWQ and compressed-tensors share: the files must lie in the folder, config.json must
describe a model we know, and each layer's tensors must have the type and the shape that this model
and the format give them, which is checked before anything of their size is made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.dtypes import DTYPES, dtype_of
from compress.export.quantized_folder import SETTINGS, is_exact
from compress.layers import FAMILIES
from compress.model_config import skeleton
from compress.model_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    assign,
    file_bytes,
    place,
    read_json,
    read_tensors,
    weight_files,
)
from compress.quant_linear import QuantLinear

FLOATS = tuple(DTYPES.values())


class Settings:
    """A JSON object whose values are checked as they are asked for; errors begin with `where`."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be a JSON object")
        self.values, self.where = values, where

    def choice(self, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
        """The value of `key`, one of `known`; null counts as missing, which is `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if any(type(value) is type(one) and value == one for one in known):
            return value
        raise ValueError(f"{self.where}: {key} = {value!r:.60} is not supported, only {known}")

    def object(self, key: str) -> "Settings":
        """The object at `key`; missing or null is an empty one."""
        value = self.values.get(key)
        return Settings({} if value is None else value, f"{self.where}: {key}")

    def group_size(self, default: int | None = None) -> int:
        """Inputs of a row that share a scale; -1 for all of them."""
        size = self.values.get("group_size", default)
        if type(size) is not int or not (size == -1 or 0 < size < 2**31):
            raise ValueError(f"{self.where}: group_size = {size!r:.60} is no size of a group")
        return size

    def refuse(self, *keys: str) -> None:
        """Raises ValueError if one of `keys`, which would change what a model means, is set."""
        for key in keys:
            if self.values.get(key):
                value = f"{self.values[key]!r:.60}"
                raise ValueError(f"{self.where}: {key} = {value} is not supported")


class Parts:
    """The tensors that a folder holds of one layer, each checked when it is taken."""

    def __init__(self, tensors: dict[str, Tensor], where: str, rows: int, columns: int):
        self._tensors, self.where, self.rows, self.columns = tensors, where, rows, columns

    def __contains__(self, part: str) -> bool:
        return part in self._tensors

    def take(self, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor `part`, off the file's map. Raises ValueError if it is not as said."""
        tensor = self._tensors.pop(part, None)
        if tensor is None:
            raise ValueError(f"{self.where}.{part} is missing")
        if tuple(tensor.shape) != shape:
            shapes = f"{tuple(tensor.shape)}, not {shape}"
            raise ValueError(f"{self.where}.{part} has the wrong shape: {shapes}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{self.where}.{part} has the wrong type: {tensor.dtype}")
        return tensor.clone()

    def take_scale(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """Like `take`, of any floating-point type; ValueError if a number is not finite."""
        scale = self.take(part, shape, *FLOATS)
        if not scale.isfinite().all():
            raise ValueError(f"{self.where}.{part} holds NaN or infinity")
        return scale

    def take_bias(self) -> Tensor | None:
        """The bias, (rows,), if there is one."""
        return self.take("bias", (self.rows,), *FLOATS) if "bias" in self else None

    @staticmethod
    def middle(zero: Tensor, bits: int) -> bool:
        """Whether `zero` is everywhere that of symmetric codes, which QuantLinear leaves out."""
        return bool((zero == 2 ** (bits - 1)).all())

    def finish(self) -> None:
        """Raises ValueError if a tensor was not taken."""
        for part in self._tensors:
            raise ValueError(f"{self.where}.{part} is no part of a layer of this format")

    def groups(self, size: int) -> tuple[int, int]:
        """(group size, groups) of this layer where the format says `size`."""
        size = self.columns if size == -1 else min(size, self.columns)
        return size, -(-self.columns // size)


def own_file(folder: Path, name: str) -> Path:
    """A regular file of `folder`. Raises ValueError if it is none, or a link that leads out."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing or no regular file")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is a link that leads out of the folder")
    return path


def quantization_method(path: Path) -> Any:
    """The `quant_method` of a folder's config.json; None where there is none."""
    try:
        settings = read_json(own_file(path, CONFIG)).get(SETTINGS)
    except ValueError:
        return None
    return settings.get("quant_method") if isinstance(settings, dict) else None


def open_folder(path: Path) -> tuple[dict[str, Any], Settings]:
    """config.json without its quantization_config, and that. Raises ValueError, see `read`."""
    config = read_json(own_file(path, CONFIG))
    for name in (INDEX, WEIGHTS):
        if (path / name).exists():
            own_file(path, name)
    for file in weight_files(path):
        own_file(path, file.name)
    settings = Settings(config.pop(SETTINGS, None), f"{path / CONFIG}: {SETTINGS}")
    return config, settings


def read(
    path: Path, config: dict[str, Any], marker: str, layer: Callable[[Parts], QuantLinear]
) -> Any:
    """The model of a folder, its layers kept as codes, ready for inference.

    config: see `open_folder`. marker: the tensor that only layers of codes have. layer: makes one
    of them. The model computes in the type that config.json names, and in float32 if a scale would
    have to be rounded to that type. Raises ValueError, one line naming file and tensor.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    tensors = read_tensors(path, family.blocks.partition(".")[0] if family else "")
    _check_layers(config, path / CONFIG, len(tensors))
    model = skeleton(config, path / CONFIG, file_bytes(path))
    owned: dict[str, dict[str, Tensor]] = {}
    for full in tensors:
        owner, _, part = full.rpartition(".")
        owned.setdefault(owner, {})[part] = tensors[full]
    layers: dict[str, QuantLinear] = {}
    for name, inside in owned.items():
        if marker in inside:
            for part in inside:
                del tensors[f"{name}.{part}"]
            parts = Parts(inside, f"{path}: {name}", *_shape(model, name, path))
            layers[name] = layer(parts)
            parts.finish()
    if not layers:
        raise ValueError(f"{path} holds no quantized layer: no tensor is called {marker}")
    dtype = _settle_type(config, path / CONFIG, layers, tensors)
    for name, made in layers.items():
        place(model, name, made, f"{path}: {name}")
    assign(model, tensors, path, dtype)
    return model.eval().requires_grad_(False)


def _check_layers(config: dict[str, Any], where: Path, tensors: int) -> None:
    """Refuse more decoder blocks than tensors before any is built: each has some of its own."""
    for key in ("num_hidden_layers", "n_layer"):
        value = config.get(key)
        if type(value) is int and value > tensors:
            raise ValueError(f"{where}: {key} = {value} does not fit {tensors} tensors")


def _shape(model: Any, name: str, path: Path) -> tuple[int, int]:
    """(out, in) of the linear layer `name`. Raises ValueError if the model has none."""
    try:
        plain = model.get_submodule(name)
    except AttributeError:
        plain = None
    if not isinstance(plain, nn.Linear):
        raise ValueError(f"{path}: {name} is no linear layer of the model of config.json")
    return plain.out_features, plain.in_features


def _settle_type(
    config: dict[str, Any], where: Path, layers: dict[str, QuantLinear], plain: dict[str, Tensor]
) -> torch.dtype:
    """Choose the type that the model computes in and convert scales and biases to it, exactly."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    if config.get(key) is None:
        wanted = next((x.dtype for x in plain.values() if x.dtype in FLOATS), torch.float32)
    else:
        try:
            wanted = dtype_of(config, key)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    exact = all(is_exact(layer.scale, wanted) for layer in layers.values())
    for layer in layers.values():
        layer.scale = layer.scale.to(wanted) if exact else layer.scale
        bias_type = wanted if exact else torch.float32
        layer.bias = None if layer.bias is None else layer.bias.to(bias_type)
    return wanted if exact else torch.float32
