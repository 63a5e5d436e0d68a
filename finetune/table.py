"""What `evaluate` found, side by side: a table for each task, a line for each model.

A table holds what was judged in the same way on the same examples. A model is also compared with
the one it was made from (its base, or what was compressed), item by item: the mean difference has
a bootstrap interval, and one that contains 0 cannot be told from noise. Figures of a whole corpus,
such as BLEU, have no items; two of them are compared by eye, by their intervals.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.terminal import out
from finetune.judging.intervals import Measure, mean
from finetune.options import setting
from results.store import write_atomically

Record = dict[str, Any]
NEEDED = ("model", "task", "split", "data_sha256", "measures", "items", "protocol")
HEAD = """# Evaluations

Made by `python -m finetune table`; edit nothing here. Values with their 95 % intervals; the last
column is paired over items, and an interval that holds 0 means no difference was seen.

"""
PER_MODEL = ("dtype", "device")  # parts of the protocol that belong to a row


@dataclass(frozen=True)
class Settings:
    """Which evaluations."""

    files: tuple[str, ...] = setting(
        (), "Files that evaluate wrote, or folders that hold some.", positional=True
    )
    out: Path | None = setting(None, "Markdown file to write as well.")


def run(settings: Settings) -> str:
    """Put evaluations side by side: a table for each task, with differences from the base."""
    text = HEAD + markdown(read(settings.files))
    if settings.out:
        write_atomically(settings.out, text)
    out.print(text, markup=False, end="")
    return text


def read(places: Sequence[str]) -> list[Record]:
    """The evaluations in `places`, in that order; those of a folder by name.

    Raises UsageError naming a file that is none, or if there is nothing.
    """
    files: list[tuple[Path, bool]] = []  # (file, whether it was named itself)
    for place in map(Path, places):
        if place.is_dir():
            files += [(file, False) for file in sorted(place.rglob("*.json"))]
        else:
            files.append((place, True))
    records = []
    for file, named in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} cannot be read as JSON: {error}") from None
        lacking = [name for name in NEEDED if not isinstance(record, dict) or name not in record]
        if not lacking:
            records.append(record)
        elif named:
            raise UsageError(f"{file} is no evaluation: it lacks {lacking[0]!r}")
    if not records:
        raise UsageError("no evaluation there; make one with `python -m finetune evaluate`")
    return records


def markdown(records: Sequence[Record]) -> str:
    """Tables of evaluations that judge the same examples in the same way."""

    def alike(record: Record) -> tuple[str, ...]:
        protocol = {k: v for k, v in record["protocol"].items() if k not in PER_MODEL}
        how = json.dumps(protocol, sort_keys=True)
        return record["task"], record["split"], record["data_sha256"], how

    parts = []
    for _, group in groupby(sorted(records, key=alike), alike):
        parts.append(_table(list(group)))
    return "\n".join(parts)


def _table(records: list[Record]) -> str:
    first = records[0]
    by_revision = {record["model"]["revision"]: record for record in records}

    def parent_of(record: Record) -> Record | None:
        found = by_revision.get(record["model"].get("parent"))
        return None if found is by_revision[record["model"]["revision"]] else found

    def ancestors(record: Record) -> list[str]:
        """Names from the first ancestor that was judged too down to the model itself."""
        parent = parent_of(record)
        return [*(ancestors(parent) if parent else []), record["model"]["alias"]]

    names = [name for name, found in first["measures"].items() if found["value"] is not None]
    lines = [f"### {first['task']}, {first['split']}: {len(first['items'])} items", ""]
    heads = ["model", "trained", *(name.replace("_", " ") for name in names), "against its parent"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in sorted(records, key=ancestors):
        parent = parent_of(record)
        cells = [record["model"]["alias"], training(record)]
        cells += [_figure(Measure(**record["measures"][name])) for name in names]
        cells.append(_against(record, parent) if parent else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    always = first["protocol"].get("always_the_same_choice")
    if always is not None:
        lines += ["", f"The same choice every time: {always:.4f}."]
    if decoding := first["protocol"].get("decoding"):
        lines += ["", "Decoding: " + ", ".join(f"{k} {v}" for k, v in decoding.items()) + "."]
    return "\n".join(lines) + "\n"


def training(record: Record) -> str:
    """How the model was trained, in a few words of its lineage; empty if it was not."""
    lineage = record["model"].get("lineage") or {}
    recipe = lineage.get("recipe", {})
    if "task" not in recipe:
        return ""
    method = recipe["method"] + (f" rank {recipe['rank']}" if recipe["method"] == "lora" else "")
    return (
        f"{recipe['task']}, {method}, {lineage['step']} steps of {recipe['batch']}, "
        f"rate {recipe['learning_rate']:g}"
    )


def outcomes(record: Record) -> dict[str, list[float]]:
    """Of each figure that is a mean over items, the items' values in order."""
    items = record["items"]
    if items and "chosen" in items[0]:
        return {"accuracy": [float(item["chosen"] == item["right"]) for item in items]}
    if items and "nll_nats" in items[0]:  # windows of equal length
        return {"nats per token": [item["nll_nats"] / item["tokens"] for item in items]}
    names = [name for name in record["measures"] if all(name in item for item in items)]
    return {
        name: [item[name] for item in items]
        for name in names
        if name != "meteor"  # the corpus's METEOR is not the mean
    }


def difference(record: Record, parent: Record) -> tuple[str, Measure] | None:
    """The first figure that both have for each item, and its paired difference."""
    own, its = outcomes(record), outcomes(parent)
    for name in own:
        if name in its and len(own[name]) == len(its[name]):
            changes = [a - b for a, b in zip(own[name], its[name], strict=True)]
            groups = [item.get("group", str(n)) for n, item in enumerate(record["items"])]
            return name, mean(changes, groups)
    return None


def _against(record: Record, parent: Record) -> str:
    found = difference(record, parent)
    if found is None:
        return ""
    name, change = found
    return f"{name.replace('_', ' ')} {_figure(change, '+.4f')}"


def _figure(measure: Measure, form: str = ".4f") -> str:
    if measure.value is None:
        return ""
    interval = "" if measure.low is None else f" [{measure.low:{form}}, {measure.high:{form}}]"
    return f"{measure.value:{form}}{interval}"
