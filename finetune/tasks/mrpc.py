"""`mrpc`: do two sentences mean the same? One word is learned, ` yes` or ` no`.

Format: both sentences, the question, and the answer as the next token, so that the model stays a
plain language model that every other part of the bench can take. Training adds a padding token,
as GPT-2 and Llama have none.

The published files are 4,076 training and 1,725 test pairs. GLUE took 408 of the training pairs as
its validation set: they are found by their sentences, which GLUE spaces differently, and taken out
of train. Their text is that of the published file, so that all splits read alike. From the hub all
splits are GLUE's, in GLUE's spacing: the checksum of the data tells the two apart.

Source: W. Dolan, C. Brockett, "Automatically Constructing a Corpus of Sentential Paraphrases",
2005, https://aclanthology.org/I05-5002/; A. Wang et al., "GLUE", https://arxiv.org/abs/1804.07461
"""

from typing import Any

from finetune.tasks.base import Example, Task, register
from finetune.tasks.task_data import Rows, json_lines, local, rows, tab_separated

PAIRS = "mrpc/msr_paraphrase_{}.txt"
GLUE_VALIDATION = "mrpc/glue_mrpc_validation.jsonl"
HUB = {"path": "nyu-mll/glue", "name": "mrpc"}
YES_NO = (" yes", " no")
PADDING = "<pad>"


class Paraphrase(Task):
    """Do two sentences mean the same? (MRPC)"""

    name = "mrpc"
    kind = "choice"
    metric = "accuracy_f1"
    special_tokens = (PADDING,)
    padding_token = PADDING

    def read(self, split: str) -> list[Example]:
        """See the top of this file."""
        if split == "test" or local(PAIRS.format("train")) is None:
            hub = HUB | {"split": split}
            file = PAIRS.format("test" if split == "test" else "train")
            return rows(self.name, file, tab_separated, hub).build(_example)
        pairs = rows(self.name, PAIRS.format("train"), tab_separated, None)
        glue = rows(self.name, GLUE_VALIDATION, json_lines, HUB | {"split": "validation"})
        wanted = set(glue.build(_key))
        keys = pairs.build(_key)
        if missing := len(wanted - set(keys)):
            raise ValueError(
                f"{missing} of the {len(wanted)} pairs of {glue.where} are not in {pairs.where}: "
                "these files do not belong together; fetch both again"
            )
        kept = [
            row
            for row, key in zip(pairs.rows, keys, strict=True)
            if (key in wanted) == (split == "validation")
        ]
        return Rows(pairs.where, kept).build(_example)


def ask(first: str, second: str) -> str:
    """The prompt of a pair."""
    return f"1: {first}\n2: {second}\nDo both mean the same?"


def _sentences(row: dict[str, Any]) -> tuple[str, str]:
    names = ("sentence1", "sentence2") if "sentence1" in row else ("#1 String", "#2 String")
    return row[names[0]].strip(), row[names[1]].strip()


def _key(row: dict[str, Any]) -> tuple[str, str]:
    """The letters and digits of both sentences: what GLUE's spacing and quotes leave alone."""
    first, second = _sentences(row)
    return _bare(first), _bare(second)


def _bare(sentence: str) -> str:
    return "".join(char for char in sentence.lower() if char.isalnum())


def _example(row: dict[str, Any]) -> Example:
    label = str(row["label"] if "label" in row else row["Quality"])
    group = f"glue-{row['idx']}" if "idx" in row else f"{row['#1 ID']}-{row['#2 ID']}"
    target = YES_NO[("1", "0").index(label)]
    return Example(ask(*_sentences(row)), target, YES_NO, group=group)


register(Paraphrase())
