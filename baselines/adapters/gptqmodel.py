"""`gptqmodel:gptq`, `gptqmodel:awq`: ModelCloud's library, the heir of AutoGPTQ.

Counterparts of `gptq` and `awq`, with their bits, groups and calibration. Artefacts are in the GPTQ
and AWQ formats and run on the library's own CPU kernels.

Source: https://github.com/ModelCloud/GPTQModel (QuantizeConfig, GPTQModel.quantize)
"""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from baselines.peer import Peer, samples
from compress.base import Progress, Runner, silent
from compress.registry import register


@dataclass(frozen=True)
class GptqModel(Peer):
    """The library's defaults, but for what is named here.

    algorithm: gptq or awq. desc_act: columns in order of decreasing importance; its own default,
    off for gptq, reorders whole groups instead. damping: of gptq.
    """

    needs_calibration: ClassVar[bool] = True
    env: ClassVar[str | None] = "gptqmodel"
    libraries: ClassVar[tuple[str, ...]] = ("gptqmodel",)

    algorithm: str = "gptq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    desc_act: bool = False
    damping: float = 0.05

    def __post_init__(self) -> None:
        """Raises ValueError for an algorithm that is not the library's."""
        if self.algorithm not in ("gptq", "awq"):
            raise ValueError(f"algorithm must be gptq or awq, not {self.algorithm!r}")

    def read(self, folder: Path) -> Any:
        """The library's model, not quantized yet."""
        library = _library()
        common: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        common |= {"sym": self.symmetric, "offload_to_disk": False, "device": "cpu"}
        if self.algorithm == "awq":
            from gptqmodel.quantization import FORMAT, METHOD

            config = library.QuantizeConfig(method=METHOD.AWQ, format=FORMAT.GEMM, **common)
        else:
            common |= {"desc_act": self.desc_act, "damp_percent": self.damping}
            config = library.QuantizeConfig(**common)
        return library.GPTQModel.load(str(folder), config)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Quantize, one sample in a batch."""
        options = {}
        if self.algorithm == "awq":
            from gptqmodel import BACKEND

            # Packs to the same bytes; the kernel that it would choose validates with CUDA only.
            options["backend"] = BACKEND.AWQ_TORCH
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves logs
            model.quantize(samples(calibration), batch_size=1, **options)
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """In the GPTQ or AWQ format."""
        compressed.save(str(folder))

    def load(self, folder: Path) -> Runner:
        """On the library's own kernels."""
        return self.runner(_library().GPTQModel.load(str(folder), device="cpu").model)


def _library() -> Any:
    # Else the library sets aside more threads for itself than a small machine has, and fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))
    import gptqmodel

    return gptqmodel


register("gptqmodel:gptq", GptqModel())
register("gptqmodel:awq", GptqModel(algorithm="awq", symmetric=False))
