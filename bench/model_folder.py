"""Write a model as a folder that stands alone: config, weights, tokenizer, where it comes from."""

import json
from pathlib import Path
from typing import Any

from compress import checkpoint

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}


def write(model: Any, tokenizer: Any, folder: Path, lineage: dict[str, Any]) -> None:
    """Write everything; see `complete`."""
    checkpoint.save(model, folder)
    complete(folder, tokenizer, lineage)


def complete(folder: Path, tokenizer: Any, lineage: dict[str, Any]) -> None:
    """Put beside saved weights what is missing for other programs to read them.

    transformers 4, which some peers need, then reads the same model. lineage: what `lineage.json`
    says; at least `source`, one line for people.
    """
    tokenizer.save_pretrained(folder)

    config = checkpoint.read_json(folder / "config.json")
    config.pop("transformers_version", None)  # equal models get equal bytes
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = config["model_type"]
    config["architectures"] = [ARCHITECTURES[kind]]
    config.setdefault("tie_word_embeddings", kind == "gpt2")  # what leaving it out means there
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]

    settings = checkpoint.read_json(folder / "tokenizer_config.json")
    # The class that takes tokenizer.json as it is; GPT2Tokenizer would put its own splitter in.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for private in ("backend", "is_local", "local_files_only"):
        settings.pop(private, None)

    files = {"config.json": config, "tokenizer_config.json": settings, "lineage.json": lineage}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
