"""What each stage of a pipeline did to the model: a table from the stages' own records."""

import json
from collections.abc import Callable
from typing import Any

from compress import registry
from compress.pipeline import JOIN
from results.store import Record

HEADER = ["stage", "size MB", "perplexity", "change", "decode tokens/s", "compress s of the stage"]


def table(group: list[Record], change: Callable[[Record], str]) -> list[list[str]]:
    """Lines under HEADER: for every pipeline of `group` one a stage. change: see leaderboard.

    A pipeline that is the beginning of another is shown as that. A stage is the record of the same
    stages up to it with equal settings on the same calibration, and blank where there is none.
    """
    known = {identity(record["job"]): record for record in group}
    whole = [each for each in group if JOIN in each["job"]["method"] and each["status"] == "ok"]
    begun = {
        identity(first)
        for each in whole
        for count in range(1, each["job"]["method"].count(JOIN) + 1)
        for first in first_stages(each["job"], count)
    }
    lines: list[list[str]] = []
    for record in whole:
        job = record["job"]
        if identity(job) in begun:
            continue
        stages = registry.stages_of(job["method"], job["settings"])
        for count, (stage, cost) in enumerate(
            zip(stages, record["values"]["stages"], strict=True), 1
        ):
            found = (known.get(identity(first)) for first in first_stages(job, count))
            so_far = next(filter(None, found), None)
            values = so_far["values"] if so_far else {}
            name = registry.describe(*stage)
            lines.append(
                [
                    name if count == 1 else f"+ {name}",
                    number(values.get("size_bytes"), 1e6, ".1f"),
                    number(values.get("perplexity"), 1, ".3f"),
                    change(so_far) if so_far else "",
                    number(values.get("decode_tokens_per_s"), 1, ".1f"),
                    number(cost.get("compress_s"), 1, ".1f"),
                ]
            )
    return lines


def first_stages(job: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The jobs that may make what the first `count` stages of a pipeline's job make.

    With the pipeline's calibration, or without one if none of these stages needs it.
    """
    names, stages = job["method"].split(JOIN)[:count], job["settings"]["stages"][:count]
    name = JOIN.join(names)
    settings = stages[0] if count == 1 else {"name": name, "stages": stages}
    found = job | {"method": name, "settings": settings}
    return [found, found | {"calibration": None}]


def identity(job: dict[str, Any]) -> str:
    """Equal for equal methods, settings and calibration: within a group the rest is equal."""
    return json.dumps([job[name] for name in ("method", "settings", "calibration")], sort_keys=True)


def number(value: float | None, unit: float, form: str) -> str:
    """`value` in units for people; empty where nothing was measured."""
    return "" if value is None else format(value / unit, form)
