"""The tokenizer of a folder as GGUF's values: pieces, their types, merges, special tokens.

Byte-level BPE (tokenizer.json) is GGUF's "gpt2", where a name stands for the way text is split
before merging: llama.cpp knows the patterns by name only, so any other way is refused.
SentencePiece BPE (tokenizer.model) is GGUF's "llama".
"""

import json
from pathlib import Path
from typing import Any

from compress.model_files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
FAST, PIECES, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [BYTES], "smollm": [DIGITS, BYTES]}
KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def metadata_of(folder: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    """GGUF's values of the tokenizer in `folder`; without one the file has no vocabulary.

    config: of the model; its vocabulary may be larger than the tokenizer's. Raises ValueError for
    a tokenizer that is missing or that llama.cpp has no equal of.
    """
    if folder is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    if not (folder / FAST).exists() and not (folder / PIECES).exists():
        raise ValueError(f"{folder} holds no {FAST} and no {PIECES}")
    about = read_json(folder / FAST) if (folder / FAST).exists() else {}
    pieces = _sentencepiece(folder) if (folder / PIECES).exists() else _byte_level(folder, about)
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    texts, types = pieces.pop("tokens"), pieces.pop("types")
    for token in about.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    size = config["vocab_size"]
    if max(texts) >= size:
        raise ValueError(f"{folder}: token {max(texts)} is none of the model's {size}")
    values = {"tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(size)]}
    values["tokenizer.ggml.token_type"] = [types.get(i, UNUSED) for i in range(size)]
    if "tokenizer.ggml.scores" in pieces:
        scores = pieces.pop("tokenizer.ggml.scores")
        values["tokenizer.ggml.scores"] = [scores.get(i, -1000.0) for i in range(size)]
    ids = _special_ids(settings, config, {text: index for index, text in texts.items()})
    if "tokenizer.ggml.eos_token_id" not in ids:  # llama.cpp would take token 11 or 2
        raise ValueError(f"{folder} names no token that ends a text (eos_token)")
    values |= pieces | ids | _added_by_itself(folder, settings, ids)
    template = _chat_template(folder, settings)
    return values | ({"tokenizer.chat_template": template} if template else {})


def _byte_level(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Pieces of a tokenizer.json. Raises ValueError unless it is a byte-level BPE with a name."""
    model = about.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not _is_bytes(about):
        cure = (
            f"give its {PIECES}" if isinstance(model, dict) and model.get("byte_fallback") else ""
        )
        raise ValueError(
            f"{folder / FAST} is no byte-level BPE, which GGUF could hold {cure}".strip()
        )
    pre = about.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    split = [
        {key: step.get(key) for key in ("type", *BYTES, *DIGITS) if key in step} for step in steps
    ]
    names = [name for name, known in SPLITS.items() if split == known]
    strange = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    strange += [key for key in ("ignore_merges", "byte_fallback") if model.get(key)]
    strange += ["normalizer"] if about.get("normalizer") else []
    if not names or strange:
        what = f"its {strange[0]}" if strange else "the way it splits text"
        raise ValueError(f"{folder / FAST}: llama.cpp has no name for {what}")
    texts = {index: text for text, index in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.merges": merges,
        "tokens": texts,
        "types": dict.fromkeys(texts, NORMAL),
    }


def _is_bytes(about: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps(about.get("pre_tokenizer"))


def _sentencepiece(folder: Path) -> dict[str, Any]:
    """Pieces of a tokenizer.model. Raises ValueError unless llama.cpp splits text the same way."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as messages

    model: Any = messages.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString((folder / PIECES).read_bytes())
    except DecodeError:
        raise ValueError(f"{folder / PIECES} is not a SentencePiece model") from None
    trained, normal = model.trainer_spec, model.normalizer_spec
    wanted = {
        "model_type BPE": trained.model_type == trained.BPE,
        "byte_fallback": trained.byte_fallback,
        "no normalization": normal.name == "identity",
        "remove_extra_whitespaces=false": not normal.remove_extra_whitespaces,
    }
    if lacking := [what for what, there in wanted.items() if not there]:
        raise ValueError(f"{folder / PIECES}: llama.cpp reads SentencePiece with {lacking[0]} only")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": normal.add_dummy_prefix,
        "tokenizer.ggml.scores": {i: piece.score for i, piece in enumerate(model.pieces)},
        "tokens": {i: piece.piece for i, piece in enumerate(model.pieces)},
        "types": {i: piece.type for i, piece in enumerate(model.pieces)},  # the same numbers
    }


def _special_ids(
    settings: dict[str, Any], config: dict[str, Any], numbers: dict[str, int]
) -> dict[str, int]:
    """The special tokens that tokenizer_config.json names, or else config.json."""
    ids = {}
    for ours, theirs in KEYS.items():
        token = settings.get(f"{ours}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = numbers.get(text) if text else config.get(f"{ours}_token_id")
        if type(found) is int and 0 <= found < config["vocab_size"]:
            ids[f"tokenizer.ggml.{theirs}_token_id"] = found
    return ids


def _added_by_itself(
    folder: Path, settings: dict[str, Any], ids: dict[str, int]
) -> dict[str, bool]:
    """Whether the tokenizer puts the first and the last token of a text there by itself."""
    first, last = (ids.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if (folder / FAST).exists():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / FAST))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{folder / FAST} is not a tokenizer: {error}") from None
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        ids_found = tokenizer.encode("a").ids
        begins, ends = (
            ids_found != bare and ids_found[0] == first,
            ids_found[-1] == last != bare[-1],
        )
        if [first] * begins + bare + [last] * ends != ids_found:
            raise ValueError(f"{folder / FAST} adds tokens to a text that GGUF cannot say")
    else:
        begins = bool(settings.get("add_bos_token", True))  # LlamaTokenizer's own choice
        ends = bool(settings.get("add_eos_token", False))
    return {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    return found if isinstance(found, str) else None
