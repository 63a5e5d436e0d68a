"""Parts: each input file cleaned and tokenised on its own, in batches, and kept when finished.

A part is a token file named after the hash of all that decides its content; a rerun finds it and
goes on behind it. Beside it lies an index with 24 bytes a document: digest, tokens, characters.
Duplicates and the validation share are a matter of joining (join_parts.py), which reads the
indexes, so that neither costs a second tokenising.

Batches are whole documents of about a million characters; with w workers up to 2 w + 1 of them
are in memory. Results are taken in the order of the input, so the bytes are the same for any w.
"""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

from finetune.text import documents, wiki
from finetune.text.documents import Cleaning, Raw, raw_documents
from finetune.text.encoder import INDEX, Encoder
from finetune.text.sources import Source
from finetune.text.token_file import TokenFile, TokenWriter
from finetune.text.wiki import Page
from finetune.text.worker_pool import InOrder
from results.store import slug

BATCH = 1 << 20  # characters
SAID = 50  # with more files than these, only the slow ones get a line


def path_of(source: Source, cleaning: Cleaning, encoder: Encoder, folder: Path) -> Path:
    """Where the part of `source` belongs; another name if anything would change its tokens."""
    form = documents.kind(source.path)
    parser = wiki.parser_version() if form == "xml" else ""
    facts = [source.sha256, form, source.path.suffix, asdict(cleaning), documents.VERSION, parser]
    key = json.dumps([*facts, encoder.sha256, encoder.end], sort_keys=True)
    name = f"{slug(source.path.name)}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return folder / f"{name}.tokens"


def batches(
    sources: list[Source],
    cleaning: Cleaning,
    counts: list[Counter[str]],
    reached: Callable[[int], None] = lambda position: None,
    budget: int | None = None,
) -> Iterator[tuple[int, list[Raw]]]:
    """The documents of all sources in batches; the last of each source may be empty.

    counts: what each source's reader passed over. reached: told the bytes read of all sources.
    budget: characters after which a source is left.
    """
    before = 0
    for place, source in enumerate(sources):
        batch: list[Raw] = []
        size = total = 0

        def report(position: int, before: int = before) -> None:
            reached(before + position)

        for raw in raw_documents(source.path, cleaning, counts[place], report):
            if budget is not None and total >= budget:
                break
            length = len(raw.markup if isinstance(raw, Page) else raw.text)
            batch.append(raw)
            size, total = size + length, total + length
            if size >= BATCH:
                yield place, batch
                batch, size = [], 0
        yield place, batch
        before += source.size


def is_finished(part: Path) -> bool:
    """Whether the part and its index are there, whole."""
    try:
        count = TokenFile(part).header["documents"]
        return part.with_suffix(".index").stat().st_size == count * INDEX.itemsize
    except (ValueError, FileNotFoundError):
        return False


def make(
    todo: dict[Path, Source],
    cleaning: Cleaning,
    encoder: Encoder,
    in_order: InOrder,
    reached: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Write the parts (path -> source), one after the other; those written stay, come what may."""
    counts: list[Counter[str]] = [Counter() for _ in todo]
    paths, sources = list(todo), list(todo.values())
    results = in_order(encoder, batches(sources, cleaning, counts, reached))
    started = time.monotonic()
    for place, group in itertools.groupby(results, itemgetter(0)):
        source, path = sources[place], paths[place]
        about = (encoder.meaning, [source.about()])
        half = path.with_name(f".{path.stem}.index.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as index, TokenWriter(path, encoder.vocabulary, *about) as writer:
            characters, dropped = 0, Counter[str]()
            for _, encoded in group:
                writer.append(encoded.tokens, len(encoded.entries))
                index.write(encoded.entries.tobytes())
                characters += int(encoded.entries["characters"].sum())
                dropped.update(encoded.dropped)
            index.flush()
            os.fsync(index.fileno())
            half.replace(path.with_suffix(".index"))  # before the part: it makes the part count
            dropped.update(counts[place])
            dropped.pop("pages", None)  # of the dump, all of them
            writer.finish(end=encoder.end, characters=characters, dropped=dict(dropped))
        seconds, started = time.monotonic() - started, time.monotonic()
        figures = f"{writer.documents:,} documents, {writer.tokens:,} tokens, {seconds:.1f} s"
        lost = "".join(f", {count:,} {what}" for what, count in sorted(dropped.items()))
        if len(todo) <= SAID or seconds > 10:
            say(f"{source.name}: {figures}" + (f"; dropped{lost[1:]}" if lost else ""))
