"""Judge a model on a task: perplexity, accuracy, exact match and F1, or the five E2E figures.

Every figure comes with an interval or says why it has none. What was found goes into one JSON file:
the figures, the outcome of every item (never the text of the data), how it was measured, the
checksum of the examples, the model's lineage and the versions of everything.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import models
from bench.errors import UsageError
from bench.machine import LIBRARIES, commit, cores, machine, packages
from bench.source_hash import ROOT
from bench.terminal import out, watching
from compress import checkpoint, model_files
from finetune.decoding.loading import DTYPE_NAMES, dtype_named, find, tokenizer_of
from finetune.judging.judge import Judging, judge
from finetune.judging.nlg_metrics import check_installed
from finetune.options import setting, to_json
from finetune.tasks import SPLITS, Task, checksum, get
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
    tokenizer: str | None = setting(
        None, "What the model was compressed from: its tokenizer is taken if this one has none."
    )
    name: str | None = setting(None, "What tables call the model; default: its alias.")
    seed: int = setting(0, "Of the bootstrap.", least=0)
    out: Path | None = setting(
        None, "JSON file to write; default: evaluation-TASK-SPLIT.json in the model's folder."
    )

    def judging(self, task: Task) -> Judging:
        """How to judge: the task's decoding with what was set here."""
        names = ("max_new_tokens", "beams", "length_penalty", "no_repeat_ngram")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        decoding = replace(task.decoding, **given)
        return Judging(self.batch, self.window, self.limit, decoding, self.seed)


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
        outcome = judge(
            model,
            tokenizer,
            task,
            examples,
            settings.judging(task),
            lambda done, total: report("", done, total),
        )
    record = {
        "model": _about(settings, found),
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
    write_atomically(file, _text(record))
    show(record)
    out.print(f"written to {file}", markup=False)
    return record


def _text(record: dict[str, Any]) -> str:
    """The record as JSON with each item on one line: a third of the size, and diffs can be read."""
    items = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in record["items"]]
    rest = {name: value for name, value in record.items() if name != "items"}
    head = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "items": [\n  ' + ",\n  ".join(items) + "\n ]\n}\n"


def _about(settings: Settings, found: models.Model) -> dict[str, Any]:
    """What the record says of the model. parent: revision of what it was made from."""
    about: dict[str, Any] = {"alias": settings.name or found.alias, "revision": found.revision}
    if (found.folder / checkpoint.ABOUT).exists():
        compression = model_files.read_json(found.folder / checkpoint.ABOUT)
        about["compression"] = {key: compression.get(key) for key in ("method", "settings")}
    if lineage := models.lineage(found):
        about["lineage"] = lineage
        about["parent"] = lineage.get("origin", {}).get("base", {}).get("revision")
    if "compression" in about and settings.tokenizer:
        about["parent"] = find(settings.tokenizer).revision
    return about


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
