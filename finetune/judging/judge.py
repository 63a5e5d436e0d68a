"""Judge a model in memory on examples: every figure with its interval, every item's outcome.

Running text is judged on windows that do not overlap, as in `bench.metrics.perplexity`; a choice by
the log-probabilities of its candidates; a generation by the answers themselves.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.errors import UsageError
from bench.metrics.perplexity import BATCH_TOKENS, block_sums, token_nll
from compress.base import TorchRunner
from finetune.judging.answer_metrics import accuracy, answer_measures, binary_f1
from finetune.judging.intervals import Measure, bootstrap, ratio
from finetune.judging.nlg_metrics import nlg_scores
from finetune.judging.scoring import Report, generate_answers, score_candidates, silent
from finetune.tasks import Decoding, Example, Task


class Outcome(NamedTuple):
    """What was found. items: one dict of plain values for each example or window."""

    measures: dict[str, Measure]
    items: list[dict[str, Any]]
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Judging:
    """How to judge. decoding: None takes the task's; limit: of windows of running text."""

    batch: int = 16
    window: int = 1024
    limit: int | None = None
    decoding: Decoding | None = None
    seed: int = 0


def judge(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    how: Judging = Judging(),
    report: Report = silent,
) -> Outcome:
    """The figures of a model in memory, such as one in training.

    model: GPT-2 or Llama of transformers or of compress, in evaluation mode.
    """
    by_kind: dict[str, Callable[..., Outcome]] = {
        "language_model": _language_model,
        "choice": _choice,
        "generation": _generation,
    }
    return by_kind[task.kind](model, tokenizer, task, examples, how, report)


def _language_model(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    how: Judging,
    report: Report,
) -> Outcome:
    window = min(how.window, model.config.max_position_embeddings)
    ids: list[int] = []
    for number, example in enumerate(examples):
        ids += [tokenizer.eos_token_id] * (number > 0)
        # verbose=False: a text longer than the model's context is what we cut, not a mistake.
        ids += tokenizer(example.target, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if count == 0:
        raise UsageError(f"{len(ids)} tokens are less than a window of {window}; lower --window")
    windows = torch.tensor(ids[: count * window]).view(count, window)[: how.limit]
    runner, rows = TorchRunner(model), max(1, BATCH_TOKENS // window)
    sums: list[list[float]] = []  # nll, right first guesses, tokens
    for part in windows.to(model.device).split(rows):
        nll, right = block_sums(runner, part, token_nll, guessed)
        sums += [[a, b, window - 1.0] for a, b in zip(nll, right, strict=True)]
        report(len(sums), len(windows))
    table = np.array(sums)
    measures = {
        "perplexity": bootstrap(table[:, [0, 2]], lambda s: np.exp(ratio(s)), seed=how.seed),
        "next_token_accuracy": bootstrap(table[:, [1, 2]], ratio, seed=how.seed),
    }
    items = [{"nll_nats": a, "correct": int(b), "tokens": int(c)} for a, b, c in sums]
    return Outcome(measures, items, {"window": window, "windows": len(sums), "tokens": len(ids)})


def guessed(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each target was the likeliest token. logits: (n, vocab); targets: (n,)."""
    return logits.argmax(-1) == targets


def _choice(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    how: Judging,
    report: Report,
) -> Outcome:
    scores = score_candidates(model, tokenizer, examples, how.batch, report)
    right = [example.target for example in examples]
    likeliest, per_byte, items = [], [], []
    for example, logs in zip(examples, scores, strict=True):
        lengths = [len(text.strip().encode()) for text in example.candidates]
        shares = [log / max(1, length) for log, length in zip(logs, lengths, strict=True)]
        best, by_byte = int(np.argmax(logs)), int(np.argmax(shares))
        likeliest.append(example.candidates[best])
        per_byte.append(example.candidates[by_byte])
        items.append(
            {
                "group": example.group,
                "log_probabilities": [round(log, 4) for log in logs],
                "right": example.candidates.index(example.target),
                "chosen": best,
                "chosen_per_byte": by_byte,
            }
        )
    measures = {
        "accuracy": accuracy(likeliest, right),
        "accuracy_per_byte": accuracy(per_byte, right),
    }
    if task.metric == "accuracy_f1":
        positive = examples[0].candidates[0]
        measures["f1"] = binary_f1(likeliest, right, positive, how.seed)
    always_same = Counter(item["right"] for item in items).most_common(1)[0][1] / len(items)
    protocol = {
        "score": "summed ln p of the candidate's tokens after the prompt, end of text not counted",
        "always_the_same_choice": always_same,
    }
    return Outcome(measures, items, protocol)


def _generation(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    how: Judging,
    report: Report,
) -> Outcome:
    decoding = how.decoding or task.decoding
    prompts = [example.prompt for example in examples]
    answers = generate_answers(
        model, tokenizer, prompts, **asdict(decoding), batch=how.batch, report=report
    )
    references = [example.references for example in examples]
    groups = [example.group for example in examples]
    protocol: dict[str, Any] = {
        "decoding": asdict(decoding),
        "answer": "at least one token, up to a line break",
    }
    if task.metric == "nlg":
        measures, scores, more = nlg_scores(answers, references, groups, how.seed)
        protocol |= more
    else:
        measures, scores = answer_measures(answers, references, groups, how.seed)
    items: list[dict[str, Any]] = [
        {"group": group, "answer": answer} | score
        for group, answer, score in zip(groups, answers, scores, strict=True)
    ]
    return Outcome(measures, items, protocol)
