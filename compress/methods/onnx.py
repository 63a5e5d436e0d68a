"""ONNX: the model as a graph that ONNX Runtime, and whatever else reads ONNX, runs.

Alone it is the model as it is. After another method it is what that made: `gptq+onnx` multiplies
GPTQ's own codes (MatMulNBits), `dynamic+onnx` integers, `prune_structured+recover+onnx` smaller
matrices. Nothing is rounded on the way, but that 3-bit codes are stored in 4 bits and a scale that
a whole row shares is repeated.

Helps where Python and torch are not wanted, or ONNX Runtime's kernels are the faster ones.
accuracy_level=4 rounds what goes into a product of codes to int8 as well: faster, another model,
and measured as it runs.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html;
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from compress import onnx_graph
from compress.base import Compressor, Progress, Runner, silent
from compress.dtypes import DTYPES
from compress.layers import cast_parameters
from compress.onnx_runner import OnnxRunner, library
from compress.registry import register


@dataclass(frozen=True)
class Onnx(Compressor):
    """dtype: that the graph computes in, float32 or float16 (for processors that have it; others
    convert). accuracy_level: of products with codes: 1 computes in float32, 4 in int8.
    """

    foreign: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("floats", "codes", "factors")
    leaves: ClassVar[str] = "graph"
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")

    dtype: str = "float32"
    accuracy_level: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError on a setting that makes no sense."""
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be float32 or float16, not {self.dtype!r}")
        if self.accuracy_level not in (1, 4):
            raise ValueError(f"accuracy_level must be 1 or 4, not {self.accuracy_level}")

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """`model`, which is used up, as an onnx_graph.Exported.

        Raises ValueError for a layer that no operator means, for a number too large for float16, or
        if onnxruntime is missing.
        """
        library()
        if self.dtype == "float16":
            cast_parameters(model, DTYPES[self.dtype])
        return onnx_graph.export(model, DTYPES[self.dtype], self.accuracy_level)

    def save(self, compressed: Any, folder: Path) -> None:
        """model.onnx, model.onnx_data with the numbers, and config.json."""
        compressed.save(folder)

    def load(self, folder: Path) -> Runner:
        """In ONNX Runtime."""
        return OnnxRunner(folder)


register("onnx", Onnx())
