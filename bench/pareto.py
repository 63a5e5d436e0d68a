"""The Pareto front: rows that no other row of their group beats in all that counts."""

from collections.abc import Callable
from typing import Any

from results.store import Record

# What a front is of, beside perplexity: its name -> (value, whether less of it is better).
FRONTS = {"size": ("size_bytes", True), "decode": ("decode_tokens_per_s", False)}


def fronts(group: list[Record]) -> Callable[[Record], list[str]]:
    """Which of FRONTS a record of `group` is on.

    It is on one if no other has no more perplexity and no more of the cost, and less of either.
    """
    on = {name: front(group, *of) for name, of in FRONTS.items()}
    return lambda record: [name for name, keys in on.items() if record["key"] in keys]


def front(group: list[Record], value: str, less: bool) -> set[str]:
    """Keys of the records that are measured, `ok` and on the front."""
    points: dict[str, tuple[Any, Any]] = {}
    for record in group:
        quality, cost = (record["values"].get(name) for name in ("perplexity", value))
        if record["status"] == "ok" and quality is not None and cost is not None:
            points[record["key"]] = quality, cost if less else -cost
    return {
        key
        for key, (quality, cost) in points.items()
        if not any(
            other[0] <= quality and other[1] <= cost and other != (quality, cost)
            for other in points.values()
        )
    }
