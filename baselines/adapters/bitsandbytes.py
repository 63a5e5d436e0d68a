"""`bitsandbytes:int8`, `bitsandbytes:nf4`: what `AutoModelForCausalLM` gives with its config.

Counterparts of `int8_sym` and `rtn`: LLM.int8(), which keeps inputs beyond a threshold in 16 bits,
and NF4, 16 quantiles of the normal distribution, in blocks of 64.

Source: T. Dettmers et al., "LLM.int8()", 2022, https://arxiv.org/abs/2208.07339; "QLoRA", 2023,
https://arxiv.org/abs/2305.14314; https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, read_transformers, refuse_left_out
from compress.base import Progress, silent
from compress.registry import register


@dataclass(frozen=True)
class BitsAndBytes(Peer):
    """kind: int8 or nf4. threshold: of int8. double_quant: quantize the scales of nf4 too."""

    env: ClassVar[str | None] = "bitsandbytes"
    libraries: ClassVar[tuple[str, ...]] = ("bitsandbytes", "accelerate")

    kind: str = "int8"
    threshold: float = 6.0
    double_quant: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a kind that the library has not."""
        if self.kind not in ("int8", "nf4"):
            raise ValueError(f"kind must be int8 or nf4, not {self.kind!r}")

    def read(self, folder: Path) -> Any:
        """The folder: transformers quantizes while it reads."""
        import bitsandbytes  # noqa: F401 - slow to import: not part of the cost

        return folder

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Read the folder `model` with a quantization config."""
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=self.double_quant,
            )
        options = {"quantization_config": config, "device_map": "cpu"}
        made = read_transformers(model, dtype=torch.bfloat16, **options)
        refuse_left_out("bitsandbytes", made)
        return made


register("bitsandbytes:int8", BitsAndBytes())
register("bitsandbytes:nf4", BitsAndBytes(kind="nf4"))
