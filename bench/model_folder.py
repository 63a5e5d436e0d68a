"""Write a model as a plain folder: config, safetensors, tokenizer, and where it comes from."""

import json
from pathlib import Path
from typing import Any

from compress import checkpoint


def write(model: Any, tokenizer: Any, folder: Path, lineage: dict[str, Any]) -> None:
    """Write everything so that transformers 4, which some peers need, reads the same model.

    lineage: what `lineage.json` says; at least `source`, one line for people.
    """
    checkpoint.save(model, folder)
    tokenizer.save_pretrained(folder)

    config = checkpoint.read_json(folder / "config.json")
    config.pop("transformers_version", None)  # equal models get equal bytes
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"architectures": [type(model).__name__], "dtype": dtype}
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
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
