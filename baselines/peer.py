"""What adapters of peer libraries have in common: they read, write and run models their own way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.base import Compressor, Runner, TorchRunner


@dataclass(frozen=True)
class Peer(Compressor):
    """A method of another library, in an environment of its own.

    Import the library in `read`, `compress`, `save` and `load` only: the bench imports adapters
    where the library is missing. What `read` does (importing, reading the model) is not counted as
    cost of compression, as for methods of ours.
    """

    def save(self, compressed: Any, folder: Path) -> None:
        """As transformers' own models are written."""
        compressed.save_pretrained(folder)

    def load(self, folder: Path) -> Runner:
        """Through transformers, which knows the library's format."""
        return TorchRunner(read_transformers(folder, "auto"))


def read_transformers(folder: Path, dtype: Any, **more: Any) -> Any:
    """The model in `folder` as transformers reads it, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, **more
    )
    return model.eval()


def samples(calibration: Tensor | None) -> list[dict[str, list[int]]]:
    """(samples, seq) token ids as lists of input_ids and attention_mask."""
    if calibration is None:
        raise ValueError("this method needs calibration samples")
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration.tolist()]
