"""`llmcompressor:gptq`, `:awq`, `:smoothquant`: what vLLM's compression library makes.

Counterparts of `gptq` and `awq`, with their bits, groups and calibration; `smoothquant` is one of
`dynamic`: int8 weights, a scale a row, times int8 activations, a scale a token. transformers
rebuilds bfloat16 weights when it loads the saved file: quality and size are the artefact's, speed
is not measured.

Source: https://github.com/vllm-project/llm-compressor (oneshot, GPTQModifier, AWQModifier,
SmoothQuantModifier)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, read_transformers, samples
from compress.base import Progress, Runner, silent
from compress.registry import register


@dataclass(frozen=True)
class LlmCompressor(Peer):
    """One recipe: weights of `bits` bits in groups, or int8 weights and activations.

    algorithm: gptq, awq or smoothquant (which has its own bits and groups). act_order: static (the
    library's default), group or none. damping: of gptq. smoothing: strength of smoothquant.
    """

    needs_calibration: ClassVar[bool] = True
    env: ClassVar[str | None] = "llmcompressor"
    timed: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("llmcompressor", "compressed-tensors")

    algorithm: str = "gptq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    act_order: str = "static"
    damping: float = 0.01
    smoothing: float = 0.8

    def __post_init__(self) -> None:
        """Raises ValueError for what the library has not."""
        if self.algorithm not in ("gptq", "awq", "smoothquant"):
            raise ValueError(f"algorithm must be gptq, awq or smoothquant, not {self.algorithm!r}")
        if self.act_order not in ("static", "group", "none"):
            raise ValueError(f"act_order must be static, group or none, not {self.act_order!r}")

    def read(self, folder: Path) -> Any:
        """The model in bfloat16."""
        import llmcompressor.modifiers.quantization  # noqa: F401 - slow: not part of the cost

        return super().read(folder)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Run the recipe, block by block."""
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.pipelines.cache import IntermediatesCache

        if not torch.accelerator.is_available():
            # AWQ pins memory for copies to a GPU, which fails where there is none.
            IntermediatesCache.pin_memory = lambda *arguments, **options: None
        rows = samples(calibration)
        oneshot(  # each modifier sees what the one before it made: its default pipeline
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=self._recipe(),
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]["input_ids"]),
            shuffle_calibration_samples=False,
        )
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """In the compressed-tensors format."""
        compressed.save_pretrained(folder, save_compressed=True)

    def load(self, folder: Path) -> Runner:
        """By transformers, its weights rebuilt."""
        from transformers import CompressedTensorsConfig

        config = CompressedTensorsConfig(dequantize=True)
        return self.runner(read_transformers(folder, quantization_config=config))

    def _recipe(self) -> list[Any]:
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        if self.algorithm == "smoothquant":
            smooth = SmoothQuantModifier(smoothing_strength=self.smoothing)
            return [smooth, GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group_size,
        }
        grid = {"group_0": {"targets": ["Linear"], "weights": weights}}
        common: dict[str, Any] = {"config_groups": grid, "ignore": ["lm_head"]}
        if self.algorithm == "awq":
            return [AWQModifier(), QuantizationModifier(**common)]
        order = None if self.act_order == "none" else self.act_order
        return [GPTQModifier(actorder=order, dampening_frac=self.damping, **common)]


register("llmcompressor:gptq", LlmCompressor())
register("llmcompressor:awq", LlmCompressor(algorithm="awq", symmetric=False))
register("llmcompressor:smoothquant", LlmCompressor(algorithm="smoothquant"))
