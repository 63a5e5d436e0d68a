"""`autoawq:awq`: the first widely used library for AWQ; no longer maintained.

Counterpart of `awq`, with its bits, groups and calibration. It quantizes on a CPU; to run there
what it saved it needs intel-extension-for-pytorch, which is archived, so its file is read by
multiplying codes and scales out again, and not timed.

Source: J. Lin et al., "AWQ", 2023, https://arxiv.org/abs/2306.00978;
https://github.com/casper-hansen/AutoAWQ
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, fill, read_tokenizer, required
from compress.base import Progress, Runner, TorchRunner, silent
from compress.registry import register


@dataclass(frozen=True)
class AutoAwq(Peer):
    """bits (4 only) and group_size as in `awq`; its grid is asymmetric."""

    needs_calibration: ClassVar[bool] = True
    env: ClassVar[str | None] = "autoawq"
    timed: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("autoawq",)

    bits: int = 4
    group_size: int = 64

    def read(self, folder: Path) -> Any:
        """(the library's model in bfloat16, its tokenizer)."""
        from awq import AutoAWQForCausalLM

        model = AutoAWQForCausalLM.from_pretrained(
            str(folder), device_map={"": "cpu"}, torch_dtype=torch.bfloat16, safetensors=True
        )
        return model, read_tokenizer(folder)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Scale, clip, round and pack."""
        ids = required(calibration)
        network, tokenizer = model
        grid = {"zero_point": True, "q_group_size": self.group_size, "w_bit": self.bits}
        network.quantize(
            tokenizer,
            quant_config=grid | {"version": "GEMM"},
            calib_data=ids.tolist(),
            max_calib_samples=len(ids),
            max_calib_seq_len=ids.shape[1],
        )
        return network

    def save(self, compressed: Any, folder: Path) -> None:
        """In the AWQ format, in 16 bits but for the codes."""
        compressed.model.half()
        compressed.save_quantized(str(folder))

    def load(self, folder: Path) -> Runner:
        """A plain model with the weights that the library's codes, scales and zeros stand for."""
        from awq.utils.packing_utils import dequantize_gemm
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM

        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        for name in [each.removesuffix(".qweight") for each in tensors if ".qweight" in each]:
            codes, zeros, scales = (
                tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")
            )
            weight = dequantize_gemm(codes, zeros, scales, self.bits, self.group_size)
            tensors[f"{name}.weight"] = weight.T.contiguous()
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        return TorchRunner(fill(model, tensors, folder))


register("autoawq:awq", AutoAwq())
