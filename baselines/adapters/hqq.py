"""`hqq:int4`: half-quadratic quantization, which needs no calibration.

Counterpart of `rtn` and `rtn_clip`: zeros are optimised for a norm that forgives outliers.

Source: H. Badri, A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog/; https://github.com/mobiusml/hqq
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
class Hqq(Peer):
    """bits and group_size as in `rtn`."""

    env: ClassVar[str | None] = "hqq"
    libraries: ClassVar[tuple[str, ...]] = ("hqq",)

    bits: int = 4
    group_size: int = 64

    def read(self, folder: Path) -> Any:
        """The folder: transformers quantizes while it reads."""
        import hqq.core.quantize  # noqa: F401 - slow to import: not part of the cost

        return folder

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Read the folder `model` with a quantization config."""
        from transformers import HqqConfig

        config = HqqConfig(nbits=self.bits, group_size=self.group_size, axis=1)
        options = {"quantization_config": config, "device_map": "cpu"}
        made = read_transformers(model, dtype=torch.bfloat16, **options)
        refuse_left_out("hqq", made)
        return made


register("hqq:int4", Hqq())
