"""A byte-level BPE tokenizer of one's own, trained by the library `tokenizers`.

The same kind as GPT-2's: its splitting pattern, all 256 bytes in the alphabet, so that no text is
unknown to it, and no prefix space. Special tokens come first; `<|endoftext|>` is always id 0.
Training is deterministic: equal documents in equal order give equal files. Its memory grows with
the number of different words, not with the length of the text.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

END = "<|endoftext|>"


def train(
    documents: Iterable[str], vocabulary: int, special_tokens: tuple[str, ...] = (END,)
) -> Any:
    """A PreTrainedTokenizerFast of exactly `vocabulary` tokens, `special_tokens` among them.

    Raises ValueError if the documents do not repeat enough for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys((END, *special_tokens)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # a pair met once says nothing about the language
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if (found := tokenizer.get_vocab_size()) != vocabulary:
        raise ValueError(f"this text makes {found} tokens, not {vocabulary}; ask for {found}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, extra_special_tokens=special[1:]
    )


def save(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer so that transformers 4 and 5 read it just as it is."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The class that takes tokenizer.json as it is; GPT2Tokenizer would put its own splitter in.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for private in ("backend", "is_local", "local_files_only"):
        settings.pop(private, None)
    extra = settings.pop("extra_special_tokens", None)
    if isinstance(extra, list) and extra:
        settings["additional_special_tokens"] = extra  # the name that both versions know
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
