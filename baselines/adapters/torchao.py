"""`torchao:int8`, `torchao:int8_dynamic`, `torchao:int4`: PyTorch's own quantization library.

Counterparts of `int8_sym`, `dynamic` and `rtn`: weights rounded to nearest, no calibration.

Source: https://github.com/pytorch/ao (quantize_, Int8WeightOnlyConfig,
Int8DynamicActivationInt8WeightConfig, Int4WeightOnlyConfig)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, fill, is_plain, plain_linears, refuse_left_out
from compress.base import Progress, Runner, silent
from compress.registry import register

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TorchAo(Peer):
    """kind: int8, int8_dynamic or int4. group_size: of int4."""

    env: ClassVar[str | None] = "torchao"
    libraries: ClassVar[tuple[str, ...]] = ("torchao",)

    kind: str = "int8"
    group_size: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError for a kind that is not adapted."""
        if self.kind not in ("int8", "int8_dynamic", "int4"):
            raise ValueError(f"kind must be int8, int8_dynamic or int4, not {self.kind!r}")

    def read(self, folder: Path) -> Any:
        """The model in bfloat16."""
        import torchao  # noqa: F401 - slow to import: not part of the cost

        return plain_linears(super().read(folder))

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Round the linear layers of the blocks. Raises ValueError if the library left some out."""
        from torchao.quantization import quantize_
        from torchao.utils import TorchAOBaseTensor

        quantize_(model.base_model, self._config())  # the head is not part of it
        refuse_left_out(
            "torchao",
            model,
            lambda layer: is_plain(layer) and not isinstance(layer.weight, TorchAOBaseTensor),
        )
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """Its tensors taken apart by the library, in safetensors."""
        from safetensors.torch import save_file

        state = compressed.state_dict()
        if compressed.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        tensors, metadata = _safetensors().flatten_tensor_state_dict(state)
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        compressed.config.save_pretrained(folder)

    def load(self, folder: Path) -> Runner:
        """The tensors put together again in an empty model."""
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM

        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state, left = _safetensors().unflatten_tensor_state_dict(tensors, metadata)
        if left:
            raise ValueError(f"{folder / WEIGHTS}: {next(iter(left))} belongs to no tensor")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = plain_linears(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        return self.runner(fill(model, state, folder))

    def _config(self) -> Any:
        from torchao import quantization

        if self.kind == "int8":
            return quantization.Int8WeightOnlyConfig()
        if self.kind == "int8_dynamic":
            return quantization.Int8DynamicActivationInt8WeightConfig()
        # The stock int4 config is for GPUs; this is the layout of torch's CPU kernel.
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=self.group_size)


def _safetensors() -> Any:
    """The library's module for safetensors, told of the int4 layout for CPUs, which it forgot."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.prototype.safetensors import safetensors_support, safetensors_utils

    name = Int4OpaqueTensor.__name__
    if name not in safetensors_utils.ALLOWED_CLASSES:
        safetensors_utils.ALLOWED_CLASSES[name] = Int4OpaqueTensor
        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(name)
    return safetensors_support


register("torchao:int8", TorchAo())
register("torchao:int8_dynamic", TorchAo(kind="int8_dynamic"))
register("torchao:int4", TorchAo(kind="int4"))
