"""Models for inference: a name becomes a model and its tokenizer, plain or compressed.

A name is what the bench takes: an alias, a hub id, a folder. A folder with compression.json is a
compressed artefact and runs as it is; it may hold no tokenizer, and then one has to be named. The
folder of a run stands for its model; an adapter that was not merged is not a model, and refused.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import models
from bench.errors import UsageError
from compress import checkpoint, model_files
from compress.dtypes import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPE_NAMES = ("stored", *DTYPES)  # "stored": as the file has it


def load_for_inference(
    name: str, dtype: torch.dtype | None = None, tokenizer: str | None = None
) -> "tuple[Any, PreTrainedTokenizerBase]":
    """The model `name` and its tokenizer, in evaluation mode, without gradients.

    dtype: of the layers that are not compressed; None keeps what is stored. tokenizer: a model
    whose tokenizer is taken if `name` has none. Raises ValueError, one line with the cure.
    """
    found = find(name)
    return checkpoint.load(found.folder, dtype), tokenizer_of(found, tokenizer)


def find(name: str) -> models.Model:
    """models.resolve; the folder of a run stands for the model that it finished with.

    Raises UsageError, with the cure, for a run or a LoRA adapter that is not a model yet.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / model_files.CONFIG).exists():
        if (folder / "model" / model_files.CONFIG).exists():
            return models.resolve(str(folder / "model"))
        if (folder / "adapter_config.json").is_file() or (folder / "adapter").is_dir():
            raise UsageError(
                f"{folder} holds a LoRA adapter, not a model; run `python -m finetune merge` on it "
                "and give the merged folder"
            )
        if (folder / "run.json").is_file():
            raise UsageError(
                f"{folder} is a run that has not finished; run `python -m finetune merge` on it "
                "for the model of its newest checkpoint"
            )
    return models.resolve(name)


def has_tokenizer(model: models.Model) -> bool:
    """Whether the folder holds a tokenizer: compressed artefacts need not."""
    return any((model.folder / file).is_file() for file in models.TOKENIZER_FILES)


def tokenizer_of(model: models.Model, instead: str | None = None) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer, or that of the model called `instead` if it has none."""
    if has_tokenizer(model):
        return models.tokenizer(model)
    if instead is None:
        raise UsageError(
            f"{model.folder} holds no tokenizer; "
            "name the model that it was made from with --tokenizer"
        )
    return models.tokenizer(find(instead))


def dtype_named(name: str) -> torch.dtype | None:
    """The type for one of DTYPE_NAMES; None for "stored"."""
    return DTYPES.get(name)
