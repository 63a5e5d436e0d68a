"""What adapters of peer libraries share: reading, checking, writing and running models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.base import Compressor, Runner, TorchRunner
from compress.layers import conv1d_to_linear


@dataclass(frozen=True)
class Peer(Compressor):
    """A method of another library, by default one that transformers can read, write and run.

    Override what the library does its own way. It is imported inside `read`, `compress`, `save`
    and `load` only: the bench imports adapters where their libraries are missing.
    """

    foreign: ClassVar[bool] = True

    def read(self, folder: Path) -> Any:
        """The model in bfloat16."""
        return read_transformers(folder, dtype=torch.bfloat16)

    def save(self, compressed: Any, folder: Path) -> None:
        """As transformers writes its own models."""
        compressed.save_pretrained(folder)

    def load(self, folder: Path) -> Runner:
        """Through transformers, which knows the library's format."""
        return self.runner(read_transformers(folder))

    def runner(self, model: Any) -> Runner:
        """A transformers model whose linear layers are the library's."""
        return PeerRunner(model, str(self.env))


class PeerRunner(TorchRunner):
    """Runner over a transformers model whose kernels are known by their library's name only."""

    def __init__(self, model: Any, library: str):
        super().__init__(model, own=False)
        self.library = library

    def kernels(self, rows: int) -> list[str]:
        """See Runner."""
        return [self.library, *self.step_name(rows)]


class WholeLogits:
    """Part of a Runner whose library computes the logits of all positions at once."""

    def logits(self, ids: Tensor) -> Tensor:
        """See Runner."""
        raise NotImplementedError

    def logit_chunks(self, ids: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """See Runner. One sequence after the other."""
        for number, row in enumerate(ids):
            logits = self.logits(row[None])[0]
            for start in range(0, len(row), chunk_tokens):
                piece = logits[start : start + chunk_tokens]
                first = number * len(row) + start
                yield slice(first, first + len(piece)), piece


def read_transformers(folder: Path, **options: Any) -> Any:
    """The model in `folder`, in evaluation mode. options: for from_pretrained (dtype, ...).

    Raises ValueError if the folder lacks a tensor.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, loaded = auto.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    if missing := loaded["missing_keys"]:  # else they would be random numbers
        raise ValueError(f"{folder} lacks {len(missing)} tensors, such as {min(missing)}")
    return model.eval()


def plain_linears(model: Any) -> Any:
    """`model` with nn.Linear where GPT-2 has Conv1D: libraries look for that very type."""
    for layer in conv1d_to_linear(model).modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = nn.Linear
    return model


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is an ordinary linear one."""
    return type(layer).__name__ in ("Linear", "LinearFromConv1D", "Conv1D") and isinstance(
        getattr(layer, "weight", None), nn.Parameter
    )


def refuse_left_out(
    library: str, model: Any, plain: Callable[[nn.Module], bool] = is_plain
) -> None:
    """Raise ValueError if a linear layer of the decoder is still `plain`.

    Libraries skip in silence. model: after quantization; its head is not looked at.
    """
    left = [name for name, layer in model.base_model.named_modules() if plain(layer)]
    if left:
        raise ValueError(
            f"{library} left {len(left)} layers as they were, such as {left[0]}; "
            "does the group size divide their width?"
        )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def fill(model: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """`model`, empty until now, with the tensors that were read from `folder`.

    Raises ValueError if one is missing, but for a tied head's, or belongs nowhere.
    """
    missing, surplus = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if surplus or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder} lacks {missing} or has {surplus} too many")
    return model


def required(calibration: Tensor | None) -> Tensor:
    """The calibration samples. Raises ValueError if there are none."""
    if calibration is None:
        raise ValueError("this method needs calibration samples")
    return calibration


def samples(calibration: Tensor | None) -> list[dict[str, list[int]]]:
    """(samples, length) token ids as the rows that libraries take: input_ids, attention_mask."""
    rows = required(calibration).tolist()
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
