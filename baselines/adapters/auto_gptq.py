"""`auto_gptq:gptq`: the first widely used library for GPTQ; no longer maintained.

Counterpart of `gptq`, with its bits, groups and calibration. The library refuses to quantize
without CUDA, for no reason in its arithmetic: the adapter answers its questions for a GPU with
"cpu". Its CPU path, which the library calls very slow, rebuilds each weight at each call.

Source: E. Frantar et al., "GPTQ", 2022, https://arxiv.org/abs/2210.17323;
https://github.com/AutoGPTQ/AutoGPTQ
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, samples
from compress.base import Progress, Runner, silent
from compress.registry import register


@dataclass(frozen=True)
class AutoGptq(Peer):
    """bits, group_size, symmetric, damping as in `gptq`. desc_act: most important columns first."""

    needs_calibration: ClassVar[bool] = True
    env: ClassVar[str | None] = "auto_gptq"
    libraries: ClassVar[tuple[str, ...]] = ("auto-gptq",)

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    desc_act: bool = False
    damping: float = 0.01

    def read(self, folder: Path) -> Any:
        """The library's model, not quantized yet."""
        import auto_gptq.modeling._base as library
        from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

        library.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda device=None: None
        config = BaseQuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.symmetric,
            desc_act=self.desc_act,
            damp_percent=self.damping,
        )
        has_cuda, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        try:
            return AutoGPTQForCausalLM.from_pretrained(
                str(folder), config, torch_dtype=torch.float32
            )
        finally:
            torch.cuda.is_available = has_cuda

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Quantize, one sample in a batch."""
        model.quantize(samples(calibration), batch_size=1, cache_examples_on_gpu=False)
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """In the GPTQ format, in 16 bits but for the codes."""
        compressed.model.half()
        compressed.save_quantized(str(folder), use_safetensors=True)
        [made] = folder.glob("gptq_model-*.safetensors")
        made.rename(folder / "model.safetensors")  # a name that it finds as well, and others do

    def load(self, folder: Path) -> Runner:
        """By the library, without its CUDA kernels."""
        from auto_gptq import AutoGPTQForCausalLM

        loaded = AutoGPTQForCausalLM.from_quantized(
            str(folder),
            device="cpu",
            torch_dtype=torch.float32,
            disable_exllama=True,
            disable_exllamav2=True,
            use_cuda_fp16=False,
        )
        return self.runner(loaded.model)


register("auto_gptq:gptq", AutoGptq())
