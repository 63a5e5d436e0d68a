"""`quanto:int8`, `quanto:int4`: Hugging Face's optimum-quanto, weights rounded to nearest.

Counterparts of `int8_sym` and `rtn`. The library chooses the groups of int4 itself: of 128 inputs,
or 96, 64 or 32, the largest that divides a row; one scale a row if none does.

Source: https://github.com/huggingface/optimum-quanto (QuantizedModelForCausalLM)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, PeerRunner
from compress.base import Progress, Runner, TorchRunner, silent
from compress.registry import register


@dataclass(frozen=True)
class Quanto(Peer):
    """bits: 8, 4 or 2."""

    env: ClassVar[str | None] = "quanto"
    libraries: ClassVar[tuple[str, ...]] = ("optimum-quanto",)

    bits: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError for bits that the library has not."""
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, not {self.bits}")

    def read(self, folder: Path) -> Any:
        """The model in bfloat16."""
        import optimum.quanto  # noqa: F401 - slow to import: not part of the cost

        return super().read(folder)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Round every linear layer but the head."""
        from optimum.quanto import QuantizedModelForCausalLM

        weights = f"qint{self.bits}"
        with torch.no_grad():
            return QuantizedModelForCausalLM.quantize(model, weights=weights, exclude="lm_head")

    def load(self, folder: Path) -> Runner:
        """By the library."""
        from optimum.quanto import QuantizedModelForCausalLM

        model = QuantizedModelForCausalLM.from_pretrained(folder)._wrapped
        for layer in model.modules():
            holder: Any = getattr(layer, "weight", None)
            while hasattr(holder, "_data") and type(holder._data) is not Tensor:
                holder = holder._data  # packed codes hold the plain tensor one level down
            if hasattr(holder, "_data"):
                # Its codes lie in the mapped file, where torch's kernel finds them unaligned.
                holder._data = holder._data.clone()
        return QuantoRunner(model, "quanto")


def _with_gradients_off(method: Any) -> Any:
    """A method of TorchRunner without inference mode, which the library's tensors refuse."""
    return torch.no_grad()(method.__wrapped__)


class QuantoRunner(PeerRunner):
    """See PeerRunner."""

    logits = _with_gradients_off(TorchRunner.logits)
    logit_chunks = _with_gradients_off(TorchRunner.logit_chunks)
    prefill = _with_gradients_off(TorchRunner.prefill)
    decode = _with_gradients_off(TorchRunner.decode)


register("quanto:int8", Quanto())
register("quanto:int4", Quanto(bits=4))
