"""`onnxruntime:fp32`, `:int8_dynamic`, `:int4`: Hugging Face's export, ONNX Runtime's quantizers.

Counterparts of `none`, `dynamic` and `rtn`. int8_dynamic is the textbook form: weights and
activations with one scale a tensor. int4 is MatMulNBits, rounded to nearest, its activations in
int8 (accuracy level 4). The embedding and the head stay in float32.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html;
https://github.com/huggingface/optimum-onnx
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, WholeLogits
from compress.base import Progress, Runner, silent
from compress.registry import register

MODEL = "model.onnx"


@dataclass(frozen=True)
class OnnxRuntime(Peer):
    """kind: fp32, int8_dynamic or int4. group_size, symmetric, accuracy_level: of int4."""

    env: ClassVar[str | None] = "onnxruntime"
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "optimum-onnx")

    kind: str = "fp32"
    group_size: int = 64
    symmetric: bool = False
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for a kind that is not adapted."""
        if self.kind not in ("fp32", "int8_dynamic", "int4"):
            raise ValueError(f"kind must be fp32, int8_dynamic or int4, not {self.kind!r}")

    def read(self, folder: Path) -> Any:
        """The folder: the exporter reads it."""
        import optimum.onnxruntime  # noqa: F401 - slow to import: not part of the cost

        return folder

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Export the folder `model` and quantize the graph; a temporary folder with the result."""
        from optimum.onnxruntime import ORTModelForCausalLM

        made = tempfile.TemporaryDirectory(prefix="slimbench-onnx-")
        plain = Path(made.name) / "plain"
        ORTModelForCausalLM.from_pretrained(
            str(model), export=True, local_files_only=True
        ).save_pretrained(plain)
        if self.kind == "int8_dynamic":
            self._int8(plain)
        elif self.kind == "int4":
            self._int4(plain)
        return made

    def save(self, compressed: Any, folder: Path) -> None:
        """One graph with its weights, and the configs."""
        shutil.copytree(Path(compressed.name) / "plain", folder, dirs_exist_ok=True)
        compressed.cleanup()

    def load(self, folder: Path) -> Runner:
        """In ONNX Runtime, with torch's number of threads."""
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        model = ORTModelForCausalLM.from_pretrained(
            str(folder), session_options=options, local_files_only=True
        )
        return OnnxRunner(model, f"onnxruntime {self.kind}")

    def _int8(self, plain: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = onnx.load(plain / MODEL, load_external_data=False).graph
        quantize_dynamic(
            plain / MODEL,
            plain / "quantized.onnx",
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[head(graph)],
            weight_type=QuantType.QInt8,
        )
        _replace(plain)

    def _int4(self, plain: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        model = ONNXModel(onnx.load(plain / MODEL))
        model.replace_gemm_with_matmul()  # GPT-2's layers, which the quantizer would pass over
        quantizer = MatMulNBitsQuantizer(
            model.model,
            block_size=self.group_size,
            is_symmetric=self.symmetric,
            accuracy_level=self.accuracy_level,
            nodes_to_exclude=[head(model.model.graph)],
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(plain / "quantized.onnx"), False)
        _replace(plain)


class OnnxRunner(WholeLogits):
    """Runner over a graph with a cache."""

    def __init__(self, model: Any, name: str):
        self.model = model
        self.name = name

    def logits(self, ids: Tensor) -> Tensor:
        """See Runner."""
        return self._run(ids).logits.float()

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """See Runner. The graph computes the logits of all positions."""
        out = self._run(ids)
        return out.logits[:, -1], [out.past_key_values, ids.shape[1]]

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """See Runner."""
        out = self._run(ids, past=cache[0], length=cache[1] + 1)
        cache[:] = [out.past_key_values, cache[1] + 1]
        return out.logits[:, -1]

    def kernels(self, rows: int) -> list[str]:
        """See Runner."""
        return [self.name]

    def _run(self, ids: Tensor, past: Any = None, length: int | None = None) -> Any:
        mask = torch.ones(len(ids), length or ids.shape[1], dtype=torch.int64)
        return self.model(ids, attention_mask=mask, past_key_values=past, use_cache=True)


def head(graph: Any) -> str:
    """Name of the node that gives the logits."""
    return next(node.name for node in graph.node if "logits" in node.output)


def _replace(plain: Path) -> None:
    """Put the quantized graph where the exported one stands."""
    for file in plain.glob(f"{MODEL}*"):
        file.unlink()
    (plain / "quantized.onnx").rename(plain / MODEL)


register("onnxruntime:fp32", OnnxRuntime())
register("onnxruntime:int8_dynamic", OnnxRuntime(kind="int8_dynamic"))
register("onnxruntime:int4", OnnxRuntime(kind="int4"))
