"""`choice`: multiple-choice questions of CommonsenseQA; the text of the right answer is learned.

Format, with `<bot>:` and `<choice>:` as tokens of their own:

    What is a doorbell for?
    <choice>: calling attention
    <choice>: ... (five in all)
    <bot>: calling attention

The candidates are the texts of the answers and not the letters A to E: smollm2-135m as published
picks the right letter for 19.7 % of the first 300 test questions, which is chance; it does know
something of which words go with a question (31 % by log-probability per byte without a list, 28 %
with one). The choices are listed, after the question, because the gradient then says "this one of
the five, not the others", and reading them the model has seen the question already; without the
list the wrong ones, chosen to be as likely beside the question's main word, are never pushed down.
That the list is better after training is this argument, not a comparison; what training with it
gave is in results/FINETUNING.md.

train and validation are the official training rows; validation is the tenth whose ids have the
greatest SHA-256. test is the official development set, since the test set's answers are secret.

Source: A. Talmor et al., "CommonsenseQA", 2019, https://arxiv.org/abs/1811.00937 (random split)
"""

from collections.abc import Sequence
from typing import Any

from finetune.tasks.base import Example, Task, register
from finetune.tasks.task_data import held_out, json_lines, rows

BOT, CHOICE = "<bot>:", "<choice>:"
FILES = {
    "train": "commonsense_qa/train_rand_split.jsonl.gz",
    "validation": "commonsense_qa/dev_rand_split.jsonl",  # as the hub calls the development set
}


class Choice(Task):
    """Multiple-choice questions of CommonsenseQA."""

    name = "choice"
    kind = "choice"
    metric = "accuracy"
    special_tokens = (BOT, CHOICE)

    def read(self, split: str) -> list[Example]:
        """See the top of this file."""
        part = "validation" if split == "test" else "train"
        hub = {"path": "tau/commonsense_qa", "split": part}
        found = rows(self.name, FILES[part], json_lines, hub).build(_example)
        if split == "test":
            return found
        kept = held_out(example.group for example in found)
        return [example for example in found if (example.group in kept) == (split == "validation")]


def ask(question: str, choices: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The prompt of a question, and its candidates."""
    listed = "".join(f"{CHOICE} {choice}\n" for choice in choices)
    return f"{question}\n{listed}{BOT}", tuple(f" {choice}" for choice in choices)


def _example(row: dict[str, Any]) -> Example:
    question = row["question"]
    if isinstance(question, dict):  # the original file
        stem = question["stem"]
        labelled = {choice["label"]: choice["text"] for choice in question["choices"]}
    else:  # the hub
        stem = question
        labelled = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    prompt, candidates = ask(stem.strip(), [text.strip() for text in labelled.values()])
    target = f" {labelled[row['answerKey']].strip()}"
    return Example(prompt, target, candidates, group=row["id"])


register(Choice())
