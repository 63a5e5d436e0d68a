"""`torch_dynamic:int8`: torch.ao.quantization.quantize_dynamic, which many tutorials recommend.

Counterpart of `dynamic`, but with one scale for a whole weight and one for all activations, and 7
bits for these. Deprecated in favour of torchao, and still part of torch. It saves pickles only:
here its integers and scales are written as safetensors instead.

Source: https://docs.pytorch.org/docs/stable/quantization.html (dynamic quantization)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.peer import Peer, PeerRunner, plain_linears, read_transformers, refuse_left_out
from compress.base import Progress, Runner, silent
from compress.registry import register

WEIGHTS, SCALES = "model.safetensors", "scales.json"


@dataclass(frozen=True)
class TorchDynamic(Peer):
    """Every linear layer but the head; the rest stays in float32, which its kernels need."""

    env: ClassVar[str | None] = "torchao"  # torch is in it
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    def read(self, folder: Path) -> Any:
        """The model in float32."""
        return plain_linears(read_transformers(folder, dtype=torch.float32))

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Replace the layers in place."""
        _quantize(model)
        refuse_left_out("torch", model)
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """int8 codes and float32 tensors; scale and zero of each weight in JSON."""
        from safetensors.torch import save_file

        layers = dict(_layers(compressed))
        tensors, scales = {}, {}
        for name, layer in layers.items():
            weight = layer.weight()
            tensors[f"{name}.weight"] = weight.int_repr()
            scales[name] = [weight.q_scale(), weight.q_zero_point()]
            if layer.bias() is not None:
                tensors[f"{name}.bias"] = layer.bias().detach()
        tied = compressed.config.tie_word_embeddings
        for name, tensor in compressed.state_dict().items():
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            if not inside and not (tied and name == "lm_head.weight"):
                tensors[name] = tensor
        save_file(tensors, folder / WEIGHTS)
        (folder / SCALES).write_text(json.dumps(scales), encoding="utf-8")
        compressed.config.save_pretrained(folder)

    def load(self, folder: Path) -> Runner:
        """An empty model quantized the same way, then filled."""
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM

        tensors = load_file(folder / WEIGHTS)
        scales = json.loads((folder / SCALES).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = _quantize(plain_linears(empty).eval())
        for name, layer in _layers(model):
            scale, zero = scales[name]
            codes = tensors.pop(f"{name}.weight")
            weight = torch._make_per_tensor_quantized_tensor(codes, scale, zero)
            layer.set_weight_bias(weight, tensors.pop(f"{name}.bias", None))
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        if surplus := tensors.keys() - own.keys():
            raise ValueError(f"{folder / WEIGHTS} has an unknown tensor {min(surplus)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        model.tie_weights()
        return self.runner(model)

    def runner(self, model: Any) -> Runner:
        """See Peer."""
        return PeerRunner(model, "quantized::linear_dynamic")


def _quantize(model: Any) -> Any:
    # Only the decoder: the head is no part of base_model.
    torch.ao.quantization.quantize_dynamic(
        model.base_model, {nn.Linear}, dtype=torch.qint8, inplace=True
    )
    return model


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    kind = torch.ao.nn.quantized.dynamic.Linear
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]


register("torch_dynamic:int8", TorchDynamic())
