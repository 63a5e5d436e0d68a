"""Judge a model on a task: perplexity, accuracy, exact match and F1, or the five E2E figures.

A language model is judged on windows that do not overlap, as in `bench.metrics.perplexity`; a
choice by the log-probabilities of its candidates; a generation by the answers themselves. Every
figure comes with an interval or says why it has none. What was found goes into one JSON file: the
figures, the outcome of every item (never the text of the data), how it was measured, the checksum
of the examples and the versions of everything.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from bench.errors import UsageError
from bench.machine import LIBRARIES, commit, cores, machine, packages
from bench.metrics.perplexity import BATCH_TOKENS, CHUNK_TOKENS, token_nll
from bench.source_hash import ROOT
from bench.terminal import out, watching
from compress import checkpoint
from compress.base import TorchRunner
from finetune.decoding.loading import DTYPE_NAMES, dtype_named, find, tokenizer_of
from finetune.judging.answer_metrics import accuracy, answer_measures, binary_f1
from finetune.judging.intervals import Measure, bootstrap, ratio
from finetune.judging.nlg_metrics import check_installed, nlg_scores
from finetune.judging.scoring import Report, generate_answers, score_candidates
from finetune.options import setting, to_json
from finetune.tasks import SPLITS, Decoding, Example, Task, checksum, get
from results.store import slug, write_atomically

SCORERS = ("sacrebleu", "pycocoevalcap", "scipy")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """Which model, on what, and how."""

    model: str = setting("smollm2-135m", "Alias, hub id or folder, compressed or not.")
    task: str = setting("mrpc", "What to judge it on: wikitext, choice, qa, mrpc, e2e.")
    split: str = setting("test", "Part of the data.", choices=SPLITS)
    limit: int | None = setting(None, "Only the first so many examples or windows.", least=1)
    batch: int = setting(16, "Rows in a forward pass.", least=1)
    max_new_tokens: int | None = setting(None, "Longest answer; default: the task's.", least=1)
    beams: int | None = setting(None, "Beams of the search; default: the task's.", least=1)
    length_penalty: float | None = setting(None, "Of beam search; default: the task's.")
    no_repeat_ngram: int | None = setting(
        None, "So many tokens never come twice in an answer; 0: they may.", least=0
    )
    window: int = setting(1024, "Tokens of a window, for language models.", least=2)
    dtype: str = setting("stored", "Type to compute in.", choices=DTYPE_NAMES)
    device: str = setting("auto", "Where to compute; auto: a GPU if there is one.", choices=DEVICES)
    threads: int | None = setting(None, "Threads to compute with; default: all cores.", least=1)
    tokenizer: str | None = setting(None, "Model whose tokenizer is taken if this one has none.")
    seed: int = setting(0, "Of the bootstrap.", least=0)
    out: Path | None = setting(
        None, "JSON file to write; default: evaluation-TASK-SPLIT.json in the model's folder."
    )

    def decoding(self, task: Task) -> Decoding:
        """The task's decoding with what was set here."""
        names = ("max_new_tokens", "beams", "length_penalty", "no_repeat_ngram")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(task.decoding, **given)


class Outcome(NamedTuple):
    """What was found. items: one dict of plain values for each example or window."""

    measures: dict[str, Measure]
    items: list[dict[str, Any]]
    protocol: dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Judge a model on a task: print the figures and write them to a JSON file.

    The file lies in the model's folder, or where --out says.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    task = get(settings.task)
    examples = task.examples(settings.split)
    if task.kind != "language_model":
        examples = examples[: settings.limit]
    if task.metric == "nlg":
        check_installed()  # now, and not after the answers were generated
    found = find(settings.model)
    tokenizer = tokenizer_of(found, settings.tokenizer)
    torch.set_num_threads(settings.threads or cores())
    model: Any = checkpoint.load(found.folder, dtype_named(settings.dtype))
    model.to(_device(settings.device))
    with watching() as (watch, _):
        report = watch(f"{found.alias} on {task.name}")
        outcome = judge(model, tokenizer, task, examples, settings, lambda n, of: report("", n, of))
    record = {
        "model": {"alias": found.alias, "revision": found.revision},
        "task": task.name,
        "split": settings.split,
        "examples": len(examples),
        "data_sha256": checksum(examples),
        "measures": {name: asdict(measure) for name, measure in outcome.measures.items()},
        "protocol": outcome.protocol | {"dtype": str(model.dtype), "device": str(model.device)},
        "settings": to_json(replace(settings, model=found.alias, out=None)),
        "commit": commit(ROOT)[0],
        "packages": packages((*LIBRARIES, *SCORERS)),
        "machine": machine(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 1),
        "items": outcome.items,
    }
    file = settings.out or _place(settings, found.alias)
    write_atomically(file, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    show(record)
    out.print(f"written to {file}", markup=False)
    return record


def judge(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    report: Report = lambda done, total: None,
) -> Outcome:
    """The figures of a model that is loaded already, such as one in training.

    model: GPT-2 or Llama of transformers or of compress, in evaluation mode.
    """
    by_kind: dict[str, Callable[..., Outcome]] = {
        "language_model": _language_model,
        "choice": _choice,
        "generation": _generation,
    }
    return by_kind[task.kind](model, tokenizer, task, examples, settings, report)


def _language_model(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    report: Report,
) -> Outcome:
    window = min(settings.window, model.config.max_position_embeddings)
    ids: list[int] = []
    for number, example in enumerate(examples):
        ids += [tokenizer.eos_token_id] * (number > 0)
        # verbose=False: a text longer than the model's context is what we cut, not a mistake.
        ids += tokenizer(example.target, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if count == 0:
        raise UsageError(f"{len(ids)} tokens are less than a window of {window}; lower --window")
    windows = torch.tensor(ids[: count * window]).view(count, window)[: settings.limit]
    runner, rows = TorchRunner(model), max(1, BATCH_TOKENS // window)
    sums: list[list[float]] = []  # nll, right first guesses, tokens
    for part in windows.to(model.device).split(rows):
        targets = part.flatten().roll(-1)  # the last of each window has none: dropped below
        nll = torch.full(targets.shape, math.nan, dtype=torch.float64)
        right = torch.zeros(targets.shape, dtype=torch.float64)
        for piece, logits in runner.logit_chunks(part, CHUNK_TOKENS):
            nll[piece] = token_nll(logits, targets[piece]).double().cpu()
            right[piece] = (logits.argmax(-1) == targets[piece]).double().cpu()
        both = torch.stack([nll, right]).view(2, len(part), window)[:, :, :-1].sum(-1)
        if not bool(both.isfinite().all()):
            raise FloatingPointError("the model's logits hold NaN or infinity")
        sums += [[float(a), float(b), window - 1.0] for a, b in both.T]
        report(len(sums), len(windows))
    table = np.array(sums)
    measures = {
        "perplexity": bootstrap(table[:, [0, 2]], lambda s: np.exp(ratio(s)), seed=settings.seed),
        "next_token_accuracy": bootstrap(table[:, [1, 2]], ratio, seed=settings.seed),
    }
    items = [{"nll_nats": a, "correct": int(b), "tokens": int(c)} for a, b, c in sums]
    return Outcome(measures, items, {"window": window, "windows": len(sums), "tokens": len(ids)})


def _choice(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    report: Report,
) -> Outcome:
    scores = score_candidates(model, tokenizer, examples, settings.batch, report)
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
        measures["f1"] = binary_f1(likeliest, right, positive, settings.seed)
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
    settings: Settings,
    report: Report,
) -> Outcome:
    decoding = settings.decoding(task)
    prompts = [example.prompt for example in examples]
    answers = generate_answers(
        model, tokenizer, prompts, **asdict(decoding), batch=settings.batch, report=report
    )
    references = [example.references for example in examples]
    groups = [example.group for example in examples]
    protocol: dict[str, Any] = {
        "decoding": asdict(decoding),
        "answer": "at least one token, up to a line break",
    }
    if task.metric == "nlg":
        measures, scores, more = nlg_scores(answers, references, groups, settings.seed)
        protocol |= more
    else:
        measures, scores = answer_measures(answers, references, groups, settings.seed)
    items: list[dict[str, Any]] = [
        {"group": group, "answer": answer} | score
        for group, answer, score in zip(groups, answers, scores, strict=True)
    ]
    return Outcome(measures, items, protocol)


def show(record: dict[str, Any]) -> None:
    """The figures as a table."""
    title = f"{record['model']['alias']} on {record['task']}, {record['split']}"
    table = Table("figure", "value", "95 % interval", "", title=title, title_justify="left")
    for name, measure in record["measures"].items():
        value, low, high = measure["value"], measure["low"], measure["high"]
        table.add_row(
            name.replace("_", " "),
            "" if value is None else f"{value:.4f}",
            "" if low is None else f"{low:.4f} to {high:.4f}",
            measure["method"],
        )
    out.print(table, soft_wrap=False)
    if (baseline := record["protocol"].get("always_the_same_choice")) is not None:
        out.print(f"the same choice every time: {baseline:.4f}", markup=False)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("--device cuda: there is no GPU that torch can use; choose cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _place(settings: Settings, alias: str) -> Path:
    """In the model's folder if it was named as one; else here, under the model's name."""
    name = f"{settings.task}-{settings.split}.json"
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder / f"evaluation-{name}"
    return Path(f"evaluation-{slug(alias)}-{name}")
