"""`qa`: science questions of ARC-DA, answered in a few words; one answer is learned.

Format: `Question: ... \\nAnswer:` and then the answer. Every question has several right answers,
written by different people. All of them count when an answer is judged; learned is the one that
agrees most with the others, by token F1, and the first of equals. Few answers come twice, so the
most frequent one is seldom more than the first, which is as odd as any: on the training questions
its mean F1 with the others is 0.35, that of the one learned here 0.41.

train and validation are the published training rows; validation is the tenth of the questions
whose ids have the greatest SHA-256. test is the published test set. The published development
set is not used.

Source: S. Bhakthavatsalam et al., "Think you have Solved Direct-Answer Question Answering? Try
ARC-DA", 2021, https://arxiv.org/abs/2102.03315
"""

from collections.abc import Sequence
from typing import Any

from finetune.judging.answer_metrics import token_f1
from finetune.tasks.base import Decoding, Example, Task, register
from finetune.tasks.task_data import held_out, json_lines, rows


class QuestionAnswering(Task):
    """Science questions of ARC-DA, answered in a few words."""

    name = "qa"
    kind = "generation"
    metric = "answers"
    decoding = Decoding(max_new_tokens=24)

    def read(self, split: str) -> list[Example]:
        """See the top of this file."""
        part = "test" if split == "test" else "train"
        found = rows(self.name, f"arc-da/{part}.jsonl", json_lines, None).build(_example)
        if split == "test":
            return found
        kept = held_out(example.group for example in found)
        return [example for example in found if (example.group in kept) == (split == "validation")]


def ask(question: str) -> str:
    """The prompt of a question."""
    return f"Question: {question}\nAnswer:"


def typical(answers: Sequence[str]) -> str:
    """The answer with the greatest summed token F1 with all; the first of equals."""
    return max(answers, key=lambda answer: sum(token_f1(answer, [other]) for other in answers))


def _example(row: dict[str, Any]) -> Example:
    answers = tuple(answer.strip() for answer in row["answers"] if answer.strip())
    prompt = ask(row["question"].strip())
    return Example(prompt, f" {typical(answers)}", references=answers, group=row["question_id"])


register(QuestionAnswering())
