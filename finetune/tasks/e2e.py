"""`e2e`: from a restaurant's data to a sentence about it; the sentence is learned.

Format, the linearised meaning of the LoRA paper's experiments:

    name : Blue Pan | Type : pub | price : less than £20 || Blue Pan is a cheap pub.

A meaning has several references. To train, each is an example of its own; to evaluate, a meaning
is one example and all its references count. Sentences are as published, not cut into words.

The splits are the published ones where trainset.csv lies beside the other files, or where all come
from the hub. A data folder with only devset.csv and testset_w_refs.csv has no training set: there
devset.csv is split by meaning, and the tenth whose SHA-256 is greatest is `validation`. Results
from that smaller training set (11 % of the published one) are not those of a paper: say so.

Decoding follows the LoRA paper: 10 beams, length penalty 0.9, no 4 tokens repeated.

Source: J. Novikova et al., "The E2E Dataset", 2017, https://arxiv.org/abs/1706.09254;
E. Hu et al., "LoRA", 2021, table 11, https://arxiv.org/abs/2106.09685
"""

import hashlib
import re
from typing import Any

from bench.data_sets import local
from finetune.tasks.base import Decoding, Example, Task, register
from finetune.tasks.task_data import Rows, comma_separated, held_out, rows

FILES = {
    "train": "e2e-nlg/trainset.csv",
    "validation": "e2e-nlg/devset.csv",
    "test": "e2e-nlg/testset_w_refs.csv",
}
HUB = {"path": "tuetschek/e2e_nlg", "revision": "refs/convert/parquet"}
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
MISREAD = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}  # as the challenge's own script mends them


class DataToText(Task):
    """From a restaurant's data to a sentence about it (E2E)."""

    name = "e2e"
    kind = "generation"
    metric = "nlg"
    decoding = Decoding(max_new_tokens=80, beams=10, length_penalty=0.9, no_repeat_ngram=4)

    def read(self, split: str) -> list[Example]:
        """See the top of this file."""
        pairs = _pairs(split)
        meanings: dict[str, list[str]] = {}
        for meaning, reference in pairs:
            meanings.setdefault(meaning, []).append(reference)
        if split == "train":
            return [_example(meaning, (text,)) for meaning, text in pairs]
        return [_example(meaning, tuple(texts)) for meaning, texts in meanings.items()]


def linearise(meaning: str) -> str:
    """`name[X], eatType[pub]` as `name : X | Type : pub`. Raises ValueError if it is neither."""
    slots = SLOT.findall(meaning)
    if not slots or SLOT.sub("", meaning).strip():
        raise ValueError(f"{meaning!r} is not of the form name[value], name[value]")
    return " | ".join(f"{NAMES.get(name, name)} : {value}" for name, value in slots)


def _pairs(split: str) -> list[tuple[str, str]]:
    """(meaning, reference) of every row, in the order of the file."""
    only_dev = local(FILES["train"]) is None and local(FILES["validation"]) is not None
    if not only_dev or split == "test":
        return _rows(split).build(_pair)
    found = _rows("validation").build(_pair)
    kept = held_out(meaning for meaning, _ in found)
    return [pair for pair in found if (pair[0] in kept) == (split == "validation")]


def _rows(split: str) -> Rows:
    return rows("e2e", FILES[split], comma_separated, HUB | {"split": split})


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    from_hub = "meaning_representation" in row
    names = ("meaning_representation", "human_reference") if from_hub else ("mr", "ref")
    meaning, reference = (" ".join(row[name].split()) for name in names)
    for wrong, right in MISREAD.items():
        meaning, reference = meaning.replace(wrong, right), reference.replace(wrong, right)
    linearise(meaning)  # refused here, where the row is known
    return meaning, reference


def _example(meaning: str, references: tuple[str, ...]) -> Example:
    group = hashlib.sha256(meaning.encode()).hexdigest()[:12]
    prompt = f"{linearise(meaning)} ||"
    return Example(prompt, f" {references[0]}", references=references, group=group)


register(DataToText())
