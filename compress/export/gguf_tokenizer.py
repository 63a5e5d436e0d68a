"""The tokenizer of a folder as GGUF's values: pieces, their types, merges, special tokens.

Byte-level BPE (tokenizer.json) is GGUF's "gpt2", where a name stands for the way text is split
before merging: llama.cpp knows the patterns by name only, so any other way is refused.
SentencePiece BPE (tokenizer.model) is GGUF's "llama".
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.model_files import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
FAST, PIECES, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [BYTES], "smollm": [DIGITS, BYTES]}  # llama.cpp's name -> tokenizer.json's steps
STRANGE = ("normalizer", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class Vocabulary:
    """Number -> text and type of each token, and the values that belong to this kind."""

    texts: dict[int, str]
    types: dict[int, int]
    values: dict[str, Any]


def metadata_of(folder: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's values of the tokenizer in `folder`; without one the file has no vocabulary.

    config: of the model; its vocabulary may be larger than the tokenizer's. Raises ValueError for
    a tokenizer that is missing or that llama.cpp has no equal of.
    """
    if folder is None:
        return {f"{PREFIX}model": "no_vocab"}
    fast = _fast(folder) if (folder / FAST).exists() else None
    about = json.loads(fast.to_str()) if fast else {}
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    size = config["vocab_size"]
    if (folder / PIECES).exists():
        found = _sentencepiece(folder / PIECES, size)
    elif fast:
        found = _byte_level(folder / FAST, about)
    else:
        raise ValueError(f"{folder} holds no {FAST} and no {PIECES}")
    for token in about.get("added_tokens") or []:
        found.texts[token["id"]] = token["content"]
        found.types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(found.texts) >= size:
        raise ValueError(f"{folder}: token {max(found.texts)} is none of the model's {size}")

    ids = _special_ids(settings, config, {text: index for index, text in found.texts.items()})
    if "eos" not in ids:  # llama.cpp would take token 11 or 2
        raise ValueError(f"{folder} names no token that ends a text (eos_token)")
    begins, ends = _added(fast, ids) if fast else _added_by_settings(settings)
    values = found.values | {
        "tokens": [found.texts.get(index, f"[PAD{index}]") for index in range(size)],
        "token_type": [found.types.get(index, UNUSED) for index in range(size)],
        **{f"{KEYS[name]}_token_id": number for name, number in ids.items()},
        "add_bos_token": begins,
        "add_eos_token": ends,
    }
    template = _chat_template(folder, settings)
    return {f"{PREFIX}{key}": value for key, value in values.items()} | (
        {"tokenizer.chat_template": template} if template else {}
    )


def _fast(folder: Path) -> Any:
    """The tokenizer of a tokenizer.json, which checks the file, or ValueError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / FAST))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder / FAST} is not a tokenizer: {error}") from None


def _byte_level(file: Path, about: dict[str, Any]) -> Vocabulary:
    """Raises ValueError unless the tokenizer is a byte-level BPE that llama.cpp has a name for."""
    model, before = about["model"], about.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if model.get("byte_fallback"):
        raise ValueError(f"{file} comes from SentencePiece; GGUF needs its {PIECES}, too")
    if model["type"] != "BPE" or all(step.get("type") != "ByteLevel" for step in steps):
        raise ValueError(f"{file} is not a byte-level BPE, which is what llama.cpp knows")
    keys = {*BYTES, *DIGITS}
    split = [{key: value for key, value in step.items() if key in keys} for step in steps]
    names = [name for name, known in SPLITS.items() if split == known]
    strange = [key for key in STRANGE if model.get(key) or about.get(key)]
    if not names or strange:
        what = strange[0] if strange else "way of splitting text"
        raise ValueError(f"{file}: llama.cpp has no name for its {what}")
    texts = {index: text for text, index in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    values = {"model": "gpt2", "pre": names[0], "merges": merges}
    return Vocabulary(texts, dict.fromkeys(texts, NORMAL), values)


def _sentencepiece(file: Path, size: int) -> Vocabulary:
    """Raises ValueError unless llama.cpp splits text as the model in `file` does.

    size: of the model's vocabulary, which the list of scores must have.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as messages

    model: Any = messages.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        raise ValueError(f"{file} is not a SentencePiece model") from None
    trained, normal = model.trainer_spec, model.normalizer_spec
    known = {
        "model_type=bpe": trained.model_type == trained.BPE,
        "byte_fallback=true": trained.byte_fallback,
        "normalization_rule_name=identity": normal.name == "identity",
        "remove_extra_whitespaces=false": not normal.remove_extra_whitespaces,
    }
    if lacking := [setting for setting, given in known.items() if not given]:
        raise ValueError(f"{file}: llama.cpp knows only SentencePiece with {lacking[0]}")
    scores = [piece.score for piece in model.pieces]
    values = {
        "model": "llama",
        "pre": "default",
        "scores": scores + [0.0] * (size - len(scores)),
        "add_space_prefix": normal.add_dummy_prefix,
    }
    texts = {index: piece.piece for index, piece in enumerate(model.pieces)}
    types = {index: piece.type for index, piece in enumerate(model.pieces)}  # the same numbers
    return Vocabulary(texts, types, values)


def _special_ids(
    settings: dict[str, Any], config: dict[str, Any], numbers: dict[str, int]
) -> dict[str, int]:
    """bos, eos, unk and pad as tokenizer_config.json names them, or else config.json."""
    ids = {}
    for name in KEYS:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = numbers.get(text) if text else config.get(f"{name}_token_id")
        if type(found) is int and 0 <= found < config["vocab_size"]:
            ids[name] = found
    return ids


def _added(tokenizer: Any, ids: dict[str, int]) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token by itself. ValueError if it gets others."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=on).ids for on in (True, False))
    begins = len(whole) > len(bare) and whole[0] == ids.get("bos")
    ends = len(whole) > len(bare) + begins and whole[-1] == ids["eos"]
    if whole[begins : len(whole) - ends] != bare:
        raise ValueError(f"{FAST} adds tokens to a text that GGUF cannot say: {whole}")
    return begins, ends


def _added_by_settings(settings: dict[str, Any]) -> tuple[bool, bool]:
    """See `_added`; what LlamaTokenizer does where nothing is said."""
    return bool(settings.get("add_bos_token", True)), bool(settings.get("add_eos_token", False))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    return found if isinstance(found, str) else None
