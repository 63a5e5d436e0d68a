"""Records -> Markdown, CSV or JSON; nothing typed by hand, every figure derived when read.

One row a record. Where the software changed, only its newest answer to a question is shown.
Rows that may be compared (same model, data, protocol and machine) form a group with one
uncompressed parent, against which perplexity differences and their intervals are taken.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any

from bench import pareto, stages
from bench.job import PARENT, Job, question
from bench.stats import RESAMPLES, paired_delta
from compress import registry
from results.store import Record

MEASURED = (
    *("perplexity", "size_bytes", "weights", "bits_per_weight"),
    *("prefill_ms", "decode_tokens_per_s", "load_s"),
    *("compress_s", "compress_cpu_s", "compress_peak_rss_bytes"),
)
COLUMNS = (
    *("model", "method", "settings", "data", "protocol", "status"),
    *(*MEASURED, "front", "key", "error"),
)
FASTER = {"prefill_ms": -1, "decode_tokens_per_s": 1}  # the power of a ratio that is a speed-up
TEXTS = ("method", "settings", "front", "key", "status", "stage")  # columns that are not figures
Group = list[Record]


def rows(records: list[Record]) -> list[dict[str, Any]]:
    """One dict a record, keys exactly COLUMNS; None where nothing was measured."""
    return [row(record, pareto.fronts(group)) for group in groups(records) for record in group]


def row(record: Record, on: Callable[[Record], list[str]] = lambda alone: []) -> dict[str, Any]:
    """The columns of one record. on: the Pareto fronts that a record is on."""
    job = record["job"]
    named = {name: job[name] for name in ("model", "method", "data")}
    texts = {"settings": settings_text(job), "protocol": protocol_text(job)}
    values = {name: record["values"].get(name) for name in MEASURED}
    about = {name: record.get(name) for name in ("status", "key", "error")}
    about["front"] = " ".join(on(record)) or None
    found = named | texts | values | about
    return {name: found[name] for name in COLUMNS}


def groups(records: list[Record]) -> list[Group]:
    """Comparable records together, best perplexity first, those without one last."""

    def comparable(record: Record) -> tuple[str, ...]:
        job = record["job"]
        names = ("model", "revision", "data", "data_sha")
        return (*(str(job[name]) for name in names), protocol_text(job), record["machine"]["name"])

    def rank(record: Record) -> tuple[Any, ...]:
        perplexity = record["values"].get("perplexity")
        failed = record["status"] != "ok" or perplexity is None
        return failed, perplexity or 0.0, record["job"]["method"], record["key"]

    ordered = sorted(newest(records), key=comparable)
    return [sorted(group, key=rank) for _, group in groupby(ordered, comparable)]


def newest(records: list[Record]) -> list[Record]:
    """The latest record of each question on each machine."""
    latest: dict[tuple[str, str], Record] = {}
    for record in sorted(filter(readable, records), key=lambda record: record["started"]):
        latest[question(record["job"]), record["machine"]["name"]] = record
    return list(latest.values())


def readable(record: Record) -> bool:
    """Whether this is a record of a Job with numbers in it; other kinds are passed over."""
    fields = {field.name for field in dataclasses.fields(Job)}
    numbers = (record["values"].get(name) for name in MEASURED)
    return fields <= record["job"].keys() and all(
        number is None or isinstance(number, (int, float)) for number in numbers
    )


def settings_text(job: dict[str, Any]) -> str:
    """Settings that differ from the method's defaults, and calibration that differs from ours."""
    text = registry.changed(job["method"], job["settings"])
    parts = [re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)]  # a checksum's first digits do
    drawn = job["calibration"]
    if drawn and (drawn["data"], drawn["samples"], drawn["length"]) != (job["data"], 64, 512):
        parts.append(f"calibration={drawn['data']}:{drawn['samples']}x{drawn['length']}")
    return "; ".join(part for part in parts if part)


def protocol_text(job: dict[str, Any]) -> str:
    """How it was measured, in one line: equal text means comparable."""
    protocol = {name: "all" if value is None else value for name, value in job["protocol"].items()}
    protocol |= {name: job[name] for name in ("device", "threads", "seed")}
    return " ".join(f"{name}={value}" for name, value in sorted(protocol.items()))


def to_csv(records: list[Record]) -> str:
    """RFC 4180 with a header line; raw units; empty where nothing was measured."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(records))
    return stream.getvalue()


def to_json(records: list[Record]) -> str:
    """A list of objects; raw units; null where nothing was measured."""
    return json.dumps(rows(records), indent=1, ensure_ascii=False) + "\n"


def to_markdown(records: list[Record]) -> str:
    """One table a group, in units for people."""
    lines = ["# Leaderboard", ""]
    if not records:
        return "\n".join([*lines, "No records yet: `python -m bench run` makes them.", ""])
    lines += [
        f"Made by `python -m bench leaderboard` from {len(newest(records))} records; "
        "edit nothing here. Lower perplexity is better.",
        f"Change: of perplexity against `{PARENT}`, with its 95 % interval (paired bootstrap over "
        f"blocks, {RESAMPLES:,} resamples; one row at a time, not corrected for the number of "
        "rows). An interval that holds 0 means no difference was seen.",
        "Perplexity is per token, over windows that do not overlap, each scored by itself without "
        "BOS; the first token of a window is context only. Latency is for batch 1, after a "
        "warm-up, as medians; in brackets how many times as fast as the parent. MB are 10^6 bytes.",
        "Front: no other row of the table has both less perplexity and fewer bytes (size), or both "
        "less perplexity and faster decoding (decode).",
    ]
    for group in groups(records):
        lines += ["", *_heading(group), ""]
        lines += markdown(table(group))
        change = partial(change_text, parent=next(filter(is_parent, group), None))
        if steps := stages.table(group, change):
            lines += ["", "Stage by stage:", "", *markdown([stages.HEADER, *steps])]
    return "\n".join([*lines, ""])


def markdown(cells: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, its header first."""
    header, *rest = cells
    return [
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if name in TEXTS else "--:" for name in header) + "|",
        *("| " + " | ".join(map(escape, line)) + " |" for line in rest),
    ]


def _heading(group: Group) -> list[str]:
    latest = max(group, key=_started)
    job, machine = latest["job"], latest["machine"]
    ram = f", {machine['ram_bytes'] / 2**30:.0f} GiB" if machine.get("ram_bytes") else ""
    flags = f" ({' '.join(machine['flags'])})" if machine.get("flags") else ""
    versions = _versions(group)
    ours = versions.pop("software", "unknown")
    commits = sorted({_commit(record) for record in group})
    source = (latest.get("lineage") or {}).get("source", "the model's own folder or hub")
    day = datetime.fromisoformat(latest["started"]).date()
    return [
        f"## {escape(job['model'])} on {escape(job['data'])}",
        "",
        f"- protocol: {escape(protocol_text(job))}",
        f"- weights: revision {job['revision']}, from {escape(str(source))}",
        f"- data: {_data_text(group)}",
        f"- machine: {escape(machine['cpu'])}, {machine['cores']} cores{ram}{flags}; "
        f"threads used: {job['threads']}",
        f"- software: {ours}; commit {', '.join(commits)}; newest record {day}",
        *(f"- {peer}: {found}" for peer, found in sorted(versions.items())),
    ]


def _versions(group: Group) -> dict[str, str]:
    """What the newest records ran on: under `software`, and a peer's own under its environment."""
    found: dict[str, dict[str, str]] = {}
    for record in sorted(group, key=_started):
        job = record["job"]
        name = job["environment"].rpartition("-")[0] if ":" in job["method"] else "software"
        if record["packages"]:  # a peer whose environment is missing has none
            found.setdefault(name, {}).update(record["packages"])
    return {
        name: " ".join(f"{part} {number}" for part, number in packages.items())
        for name, packages in found.items()
    }


def _started(record: Record) -> str:
    return record["started"]


def _commit(record: Record) -> str:
    return (record.get("commit") or "unknown")[:12] + (" changed" if record.get("dirty") else "")


def _data_text(group: Group) -> str:
    used = next((record["blocks"]["evaluation"] for record in group if record.get("blocks")), None)
    if used is None:  # nothing but failures
        return f"checksum {group[0]['job']['data_sha']}"
    return (
        f"{escape(used['split'])}, {used['tokens']:,} tokens, {used['count']} windows used, "
        f"SHA-256 of the text {used['sha256'][:16]}"
    )


def table(group: Group) -> list[list[str]]:
    """The header and the lines of a group as text, in units for people."""
    parent = next((record for record in group if is_parent(record)), None)
    number = {
        "perplexity": ("perplexity", 1, ".3f"),
        "size MB": ("size_bytes", 1e6, ".1f"),
        "weights M": ("weights", 1e6, ".1f"),
        "bits/weight": ("bits_per_weight", 1, ".2f"),
        "prefill ms": ("prefill_ms", 1, ".1f"),
        "decode tokens/s": ("decode_tokens_per_s", 1, ".1f"),
        "load s": ("load_s", 1, ".2f"),
        "compress s": ("compress_s", 1, ".1f"),
        "CPU s": ("compress_cpu_s", 1, ".1f"),
        "peak MB": ("compress_peak_rss_bytes", 1e6, ".0f"),
    }
    columns: dict[str, Callable[[Record], str]] = {
        "method": lambda record: record["job"]["method"],
        "settings": lambda record: settings_text(record["job"]),
    }
    for heading, (name, unit, form) in number.items():
        columns[heading] = _reader(name, unit, form)
        if name == "perplexity":
            columns["change"] = lambda record: change_text(record, parent)
        if name in FASTER:
            columns[heading] = partial(_with_ratio, name, columns[heading], parent)
    on = pareto.fronts(group)
    columns["front"] = lambda record: ", ".join(on(record))
    columns["key"] = lambda record: record["key"]
    columns["status"] = _status
    return [list(columns), *([show(record) for show in columns.values()] for record in group)]


def is_parent(record: Record) -> bool:
    """Whether the others are compared with it: `none` as it is registered, and measured."""
    plain = record["job"]["method"] == PARENT and not settings_text(record["job"])
    return plain and record["status"] == "ok"


def _reader(name: str, unit: float, form: str) -> Callable[[Record], str]:
    return lambda record: stages.number(record["values"].get(name), unit, form)


def _with_ratio(
    name: str, show: Callable[[Record], str], parent: Record | None, record: Record
) -> str:
    ours, base = (each["values"].get(name) if each else None for each in (record, parent))
    if not ours or not base or record is parent:
        return show(record)
    return f"{show(record)} ({(ours / base) ** FASTER[name]:.2f}x)"


def _status(record: Record) -> str:
    return f"{record['status']}: {record['error']}" if record.get("error") else record["status"]


def change_text(record: Record, parent: Record | None) -> str:
    """Change of perplexity against the parent in per cent with its interval; empty if unknown."""
    if parent is None or record is parent:
        return ""
    ours, base = record["values"], parent["values"]
    blocks, parents = ours.get("block_nll_nats"), base.get("block_nll_nats")
    if not blocks or not parents or len(blocks) != len(parents):
        return ""
    tokens = ours["scored_tokens"] / len(blocks)  # blocks are of one length
    change, low, high = (100 * value for value in paired_delta(blocks, parents, tokens))
    if low != low:  # one block has no spread
        return f"{change:+.2f} %"
    return f"{change:+.2f} % [{low:+.2f}, {high:+.2f}]"


def escape(text: str) -> str:
    """`text` as one Markdown table cell: no markup of its own, no line break, no column break."""
    text = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "\\`")
