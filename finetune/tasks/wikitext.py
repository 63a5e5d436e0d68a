"""`wikitext`: language modelling on WikiText-2 raw; every token is learned.

A split is one running text, ` = Title = ` lines and blank lines included, as `bench.data` takes
it; so the perplexity of the test split is the bench's `window-1024` figure. Blocks are cut when
batches are made.

The splits are the published ones where wiki.train.raw lies beside the other two files, or where
all come from the hub. A data folder with only wiki.valid.raw and wiki.test.raw has no training
text: there `train` is the first 90 % of the articles of wiki.valid.raw and `validation` the rest.
That is a tenth of the published training text, and the same text that the bench calibrates on:
say so beside a figure that comes from it.

Source: S. Merity et al., "Pointer Sentinel Mixture Models", 2016, https://arxiv.org/abs/1609.07843
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.data_sets import SOURCES, from_rows, local
from finetune.tasks.base import Example, Task, register
from finetune.tasks.task_data import read_text, rows

FILES = {name: f"wikitext-2-raw/wiki.{name}.raw" for name in ("train", "valid", "test")}
HUB = SOURCES["wikitext2"].hub
# ` = Title = ` between blank lines; not ` = = Part = = `, nor a formula on a line of its own.
TITLE = re.compile(r"(?:(?<=\n \n)|(?<=\A \n)|\A) = (?!= )[^\n]*(?<! =) = ?(?=\n \n)")


class WikiText(Task):
    """Language modelling on WikiText-2 raw."""

    name = "wikitext"
    kind = "language_model"
    metric = "perplexity"

    def read(self, split: str) -> list[Example]:
        """One example: the whole text of the split."""
        only_valid = local(FILES["train"]) is None and local(FILES["valid"]) is not None
        if only_valid and split != "test":
            articles = split_articles(_text("valid"))
            border = len(articles) * 9 // 10
            part = articles[:border] if split == "train" else articles[border:]
            text = "".join(part)
        else:
            text = _text("valid" if split == "validation" else split)
        return [Example("", text, group=split)] if text.strip() else []


def split_articles(text: str) -> list[str]:
    """`text` cut before each title; the pieces joined give `text` again."""
    starts = [match.start() for match in TITLE.finditer(text)]
    borders = [0, *starts[1:], len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


def _text(file: str) -> str:
    split = "validation" if file == "valid" else file
    found = rows("wikitext", FILES[file], _whole, HUB | {"split": split})
    texts = found.build(lambda row: str(row["text"]))
    content = texts if found.where.endswith(".raw") else from_rows("wikitext2", texts)
    return "".join(content)


def _whole(path: Path) -> list[dict[str, Any]]:
    return [{"text": read_text(path)}]


register(WikiText())
