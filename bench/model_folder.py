"""Write a model as a folder: config, weights, tokenizer, and where it comes from."""

import json
from pathlib import Path
from typing import Any

from compress import checkpoint, model_config, model_files

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}


def write(model: Any, tokenizer: Any, folder: Path, lineage: dict[str, Any]) -> None:
    """Write everything; see `complete`."""
    checkpoint.save(model, folder)
    complete(folder, tokenizer, lineage)


def complete(folder: Path, tokenizer: Any, lineage: dict[str, Any]) -> None:
    """Put a tokenizer and lineage.json beside saved weights, and mend config.json.

    transformers 4, which some peers need, then reads the same model if it is a plain one; one with
    compressed layers is read by `compress.load`, and names no architecture for others to fill with
    random numbers. lineage: at least `source`, one line for people.
    """
    add_tokenizer(folder, tokenizer, lineage)
    config = model_config.portable(model_files.read_json(folder / "config.json"))
    config.pop("architectures", None)
    if not checkpoint.layer_specs(folder):
        config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    _write(folder / "config.json", config)


def add_tokenizer(folder: Path, tokenizer: Any, lineage: dict[str, Any]) -> None:
    """Put the tokenizer and lineage.json into `folder`."""
    tokenizer.save_pretrained(folder)
    settings = model_files.read_json(folder / "tokenizer_config.json")
    # The class that takes tokenizer.json as it is; GPT2Tokenizer would put its own splitter in.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for private in ("backend", "is_local", "local_files_only"):
        settings.pop(private, None)

    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "lineage.json", lineage)


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
