"""`auto_round:int4`: Intel's AutoRound, which learns the rounding by signed gradients.

Counterpart of `gptq`, with its bits, groups and calibration. `iterations` is the library's 200 cut
to what a CPU can do in minutes.

Source: W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2023,
https://arxiv.org/abs/2309.05516; https://github.com/intel/auto-round
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, read_tokenizer, required
from compress.base import Progress, silent
from compress.registry import register


@dataclass(frozen=True)
class AutoRoundInt(Peer):
    """bits, group_size, symmetric as in `gptq`. iterations: steps of the search in each block."""

    needs_calibration: ClassVar[bool] = True
    env: ClassVar[str | None] = "auto_round"
    libraries: ClassVar[tuple[str, ...]] = ("auto-round",)

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    iterations: int = 20

    def read(self, folder: Path) -> Any:
        """(the model in bfloat16, its tokenizer)."""
        import auto_round  # noqa: F401 - slow to import: not part of the cost

        return super().read(folder), read_tokenizer(folder)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Learn the rounding; the library packs the weights when it saves them."""
        from auto_round import AutoRound

        ids = required(calibration)
        network, tokenizer = model
        made = AutoRound(
            network,
            tokenizer,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.symmetric,
            iters=self.iterations,
            seqlen=ids.shape[1],
            nsamples=len(ids),
            dataset=[
                # without the mask, tokens that equal the padding token would be left out
                {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
                for row in ids
            ],
            device_map="cpu",
            enable_torch_compile=False,
        )
        made.quantize()
        return made

    def save(self, compressed: Any, folder: Path) -> None:
        """In the library's own format."""
        compressed.save_quantized(str(folder), format="auto_round", inplace=True)


register("auto_round:int4", AutoRoundInt())
