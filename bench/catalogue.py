"""What there is to name on the command line, a line each: what `bench list` prints."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from bench import data, models
from bench.metrics import METRICS
from bench.run import METHOD_PACKAGES
from compress import registry
from compress.export import formats


def lines() -> Iterator[str]:
    """Methods with their settings, models, data, metrics, formats."""
    registry.discover(*METHOD_PACKAGES)
    yield "Methods, with their settings and defaults"
    for name in registry.names():
        method = registry.get(name)
        values = [f"{field.name}={getattr(method, field.name)!r}" for field in fields(method)]
        yield f"  {name}: {first_line(type(method))}"
        yield f"      {', '.join(values) or 'no settings'}"
    yield "\nModels (or a hub id, a folder, a GGUF file)"
    yield from (f"  {alias}: {models.about(alias)}" for alias in models.ALIASES)
    yield "\nData (or a .txt, .jsonl, .jsonl.gz file)"
    yield from (f"  {name}: {about}" for name, about in data.names().items())
    yield "\nMetrics"
    yield from (f"  {name}: {first_line(metric)}" for name, metric in METRICS.items())
    yield "\nFormats of `export` and `file:PATH`, with what they hold"
    yield from (f"  {name}: {format.HOLDS}" for name, format in formats().items())


def first_line(thing: Any) -> str:
    """The first line of the docstring of the file that `thing` is defined in."""
    return (inspect.getdoc(sys.modules[thing.__module__]) or "").partition("\n")[0]
