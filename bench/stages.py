"""What each stage of a pipeline did to the model: a table from the stages' own records."""

from collections.abc import Callable
from typing import Any

from compress import registry
from compress.pipeline import JOIN
from results.store import Record

HEADER = ["stage", "size MB", "perplexity", "change", "decode tokens/s", "compress s of the stage"]


def table(group: list[Record], change: Callable[[Record], str]) -> list[list[str]]:
    """Lines under HEADER: for every pipeline of `group` one a stage. change: see leaderboard.

    A pipeline that is the beginning of another is shown as that. A stage is the record of the same
    stages up to it with equal settings, and blank where there is none.
    """
    known = {identity(record["job"]): record for record in group}
    whole = [each for each in group if JOIN in each["job"]["method"] and each["status"] == "ok"]
    begun = {
        identity(first_stages(each["job"], count))
        for each in whole
        for count in range(1, len(each["job"]["settings"]["stages"]))
    }
    lines: list[list[str]] = []
    for record in whole:
        job = record["job"]
        names = job["method"].split(JOIN)
        if identity(job) in begun:
            continue
        costs = record["values"].get("stages", [])
        for count in range(1, len(names) + 1):
            so_far = known.get(identity(first_stages(job, count)))
            values = so_far["values"] if so_far else {}
            settings = job["settings"]["stages"][count - 1]
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            name = registry.describe(names[count - 1], plain)
            cost = costs[count - 1] if count <= len(costs) else {}
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


def first_stages(job: dict[str, Any], count: int) -> dict[str, Any]:
    """The job that makes what the first `count` stages of a pipeline's job make."""
    names, stages = job["method"].split(JOIN)[:count], job["settings"]["stages"][:count]
    name = JOIN.join(names)
    settings = stages[0] if count == 1 else {"name": name, "stages": stages}
    return job | {"method": name, "settings": settings}


def identity(job: dict[str, Any]) -> str:
    """Equal for equal methods with equal settings: within a group the rest is equal."""
    return f"{job['method']} {sorted(job['settings'].items())}"


def number(value: float | None, unit: float, form: str) -> str:
    """`value` in units for people; empty where nothing was measured."""
    return "" if value is None else format(value / unit, form)
