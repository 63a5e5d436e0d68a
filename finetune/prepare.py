"""Raw text to memory-mapped token files, and tasks to JSON lines.

Inputs are cleaned (documents.py, wiki.py), tokenised by a model's tokenizer or by one that is
trained on them (byte_bpe.py), and written to OUT/train.tokens and OUT/validation.tokens
(token_file.py) beside OUT/tokenizer and OUT/prepare.json, which says what came from where. Each
finished input lies in OUT/parts and is not done again; what lies there may be deleted when all is
done. The bytes do not depend on the number of workers.

Memory does not grow with the length of the inputs. As measured: 0.4 GB, 0.1 GB more for each
worker (2 GB while it has a document of 16 MiB, the longest allowed), and 70 bytes for each
document at the end. Disk: all tokens twice, at 2 or 4 bytes each, until OUT/parts is deleted.
A core works through 1.3 MB of a dump's XML or 2 MB of plain text in a second.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import UsageError
from bench.machine import cores
from bench.terminal import Report, watching
from finetune.options import setting
from finetune.text import documents, encoder, parts
from finetune.text.documents import Cleaning
from finetune.text.encoder import Encoder
from finetune.text.join_parts import held_out, join
from finetune.text.sources import Source, find
from finetune.text.token_file import TokenFile
from finetune.text.worker_pool import InOrder, workers
from results.store import write_atomically

SUMMARY = "prepare.json"
VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What to read, how to clean and tokenise it, and where to."""

    inputs: tuple[str, ...] = setting(
        (), "Files or folders: .txt, .raw, .json, .jsonl, .xml (also .gz, .bz2).", positional=True
    )
    out: Path = setting(Path("prepared"), "Folder for the result.")
    tokenizer: str | None = setting(None, "Model whose tokenizer to use: alias, hub id or folder.")
    train_tokenizer: int | None = setting(
        None, "Train a byte-level BPE of this size on the inputs instead.", least=257
    )
    tokenizer_characters: int = setting(
        100_000_000, "Text to train it on at most, an equal share from each file.", least=1
    )
    special_tokens: tuple[str, ...] = setting((), "More of them for a trained tokenizer.")
    validation: float = setting(0.01, "Share of the documents to hold out; below 0.5.", least=0)
    split_on: str = setting(
        Cleaning.split_on,
        r"Pattern that parts documents in a .txt; '^\s*$': paragraphs, '$': lines, '': nothing.",
    )
    field: str = setting(Cleaning.field, "Field with the text in .json and .jsonl.")
    minimum: int = setting(Cleaning.minimum, "Characters below which a text is dropped.", least=1)
    workers: int | None = setting(None, "Processes; by default as many as cores.", least=1)
    seed: int = setting(0, "Of the choice of held-out documents.", least=0)
    task: str | None = setting(None, "Write this fine-tuning task to OUT as JSON lines instead.")

    def __post_init__(self) -> None:
        """Raises UsageError for what does not go together."""
        if bool(self.inputs) == bool(self.task):
            raise UsageError("give either files and folders to prepare, or --task")
        if self.inputs and bool(self.tokenizer) == bool(self.train_tokenizer):
            raise UsageError("give either --tokenizer (a model's) or --train-tokenizer (its size)")
        if not 0 <= self.validation < 0.5:
            raise UsageError(f"--validation is a share below 0.5, not {self.validation}")
        self.cleaning()

    def cleaning(self) -> Cleaning:
        """The settings that decide what documents come out."""
        return Cleaning(self.field, self.split_on, self.minimum)


def run(settings: Settings) -> dict[str, Any]:
    """Turn raw text into memory-mapped token files, or a task into JSON lines.

    The same command again goes on where a stopped one ended. Files written: OUT/train.tokens,
    OUT/validation.tokens, OUT/tokenizer, OUT/prepare.json, and OUT/parts, which may be deleted.
    """
    with watching() as (watch, say):
        if settings.task:
            return write_task(settings.task, settings.out, say)
        with _locked(settings.out), workers(settings.workers or cores()) as in_order:
            return _prepare(settings, in_order, watch, say)


def _prepare(
    settings: Settings,
    in_order: InOrder,
    watch: Callable[[str], Report],
    say: Callable[[str], None],
) -> dict[str, Any]:
    out, cleaning = settings.out, settings.cleaning()
    reading = watch("hashing")
    sources = find(settings.inputs, out, lambda done, total: reading("files", done, total))
    recipe: dict[str, Any] = {
        "cleaning": asdict(cleaning) | {"version": documents.VERSION},
        "sources": [source.about() for source in sources],
        "validation": settings.validation,
        "seed": settings.seed,
    }
    encode = _encoder(settings, sources, recipe, in_order, watch)
    recipe |= {"tokenizer": encode.sha256, "version": VERSION}
    if (done := _finished(out, recipe)) is not None:
        say(f"{out} is prepared already: {_line(done)}")
        return done
    (out / SUMMARY).unlink(missing_ok=True)  # it tells the state of the files beside it
    for left in (out / "parts").glob(".*.part"):  # by a run that was killed
        left.unlink()
    paths = [parts.path_of(source, cleaning, encode, out / "parts") for source in sources]
    both = zip(paths, sources, strict=True)
    todo = {path: source for path, source in both if not parts.is_finished(path)}
    reached = _meter(watch("tokenising"), todo.values())
    parts.make(todo, cleaning, encode, in_order, reached, say)

    joined = join(paths, out, settings.validation, settings.seed, recipe["sources"])
    summary = {
        "recipe": recipe,
        "tokenizer": {"vocabulary": encode.vocabulary, "end": encode.end, "sha256": encode.meaning},
        "sources": [_about(s, p) for s, p in zip(sources, paths, strict=True)],
        "duplicates": joined.duplicates,
        "tokens_cut_from_the_longest": joined.cut,
        "train": _figures(joined.train),
        "validation": _figures(joined.validation),
    }
    write_atomically(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    if joined.cut:
        say(f"too few documents: validation has the last {joined.cut:,} tokens of the longest one")
    say(f"{out}: {_line(summary)}")
    return summary


def write_task(name: str, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """OUT/{train,validation,test}.jsonl of a task; `text` is prompt and target, for the bench.

    A split whose data is not here is passed over, and said so. Raises ValueError if none is here.
    """
    from finetune import tasks

    task = tasks.get(name)
    counts: dict[str, int] = {}
    lost: list[ValueError] = []
    for split in tasks.SPLITS:
        try:
            examples = task.examples(split)
        except ValueError as error:
            lost.append(error)
            say(f"no {split}: {error}")
            continue
        rows = [asdict(example) | {"text": example.prompt + example.target} for example in examples]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(out / f"{split}.jsonl", "".join(lines))
        counts[split] = len(rows)
        say(f"{out / split}.jsonl: {len(rows):,} examples")
    if not counts:
        raise lost[0]
    return {"task": name, "examples": counts}


def _encoder(
    settings: Settings,
    sources: list[Source],
    recipe: dict[str, Any],
    in_order: InOrder,
    watch: Callable[[str], Report],
) -> Encoder:
    """The tokenizer that was asked for, in OUT/tokenizer."""
    place = settings.out / "tokenizer"
    if settings.tokenizer:
        return encoder.from_model(settings.tokenizer, place, settings.minimum)
    assert settings.train_tokenizer is not None
    share = max(1, settings.tokenizer_characters // len(sources))
    ignored = [Counter[str]() for _ in sources]
    reached = _meter(watch("training the tokenizer"), sources)
    batches = parts.batches(sources, settings.cleaning(), ignored, reached, share)
    read = in_order(partial(encoder.read_texts, minimum=settings.minimum), batches)
    return encoder.trained(
        _not_held_out(read, settings.validation, settings.seed),
        settings.train_tokenizer,
        settings.special_tokens,
        recipe | {"characters_of_a_source": share},
        place,
        settings.minimum,
    )


def _not_held_out(
    results: Iterator[tuple[int, list[str]]], share: float, seed: int
) -> Iterator[str]:
    """The texts to train on; the tokenizer must not learn from the others either."""
    for _, texts in results:
        digests = np.array([documents.digest(text) for text in texts], np.uint64)
        held = held_out(digests, share, seed)
        yield from (text for text, is_held in zip(texts, held, strict=True) if not is_held)


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """What prepare.json says, if it is of this recipe and the files beside it are still its own."""
    try:
        summary = json.loads((out / SUMMARY).read_text())
        if summary["recipe"] != recipe:
            return None
        for name in ("train", "validation"):
            if (
                summary[name]
                and TokenFile(out / f"{name}.tokens").sha256() != summary[name]["sha256"]
            ):
                return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return summary


def _about(source: Source, part: Path) -> dict[str, Any]:
    header = TokenFile(part).header
    figures = ("documents", "characters", "tokens", "dropped")
    return source.about() | {"bytes": source.size} | {name: header[name] for name in figures}


def _figures(file: TokenFile | None) -> dict[str, Any] | None:
    if file is None:
        return None
    return {name: file.header[name] for name in ("documents", "tokens")} | {"sha256": file.sha256()}


def _line(summary: dict[str, Any]) -> str:
    held = (summary["validation"] or {"tokens": 0})["tokens"]
    figures = f"{summary['train']['tokens']:,} tokens to train on, {held:,} held out"
    return f"{figures}, {summary['duplicates']:,} duplicates dropped"


def _meter(report: Report, sources: Iterable[Source]) -> Callable[[int], None]:
    total = sum(source.size for source in sources)
    return lambda position: report("kB", position >> 10, total >> 10)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold OUT/.lock. Raises UsageError if another process does: they would mix their files."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is preparing {out}; choose another --out") from None
        yield
