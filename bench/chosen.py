"""What `--methods` names: methods with their settings, pipelines by stages, groups of methods."""

from collections.abc import Iterator
from typing import Any

from bench.errors import UsageError
from bench.job import PARENT
from compress import registry
from compress.base import Compressor
from compress.pipeline import JOIN

GROUPS = {"ours": "compress.methods", "peers": "baselines.adapters"}  # for every method there


def chosen_methods(text: str, overrides: tuple[str, ...]) -> list[tuple[str, Any]]:
    """(name, Compressor) of the parent and of every method in `text`, with overrides applied.

    What is written in brackets wins over `--set`, which wins over the default. `ours` and `peers`
    stand for every method of theirs.
    """
    try:
        wanted = [
            method
            for name, own in registry.parse_list(text)
            for method in (group(name, own) if name in GROUPS else [(name, own)])
        ]
        if not wanted:
            raise UsageError(f"no method in {text!r}; see: python -m bench list")
        settings: dict[str, dict[str, Any]] = {
            stage: {} for name, _ in wanted for stage in name.split(JOIN)
        }
        for override in overrides:
            target, equals, value = override.partition("=")
            name, dot, setting = target.strip().rpartition(".")
            if not equals or not dot or not value.strip():
                raise UsageError(f"cannot read --set {override!r}; write method.setting=value")
            if name not in settings:
                known = ", ".join(sorted(settings))
                raise UsageError(f"--set {override}: no method {name!r} in this run ({known})")
            settings[name][setting] = registry.read_value(value)

        def overridden(name: str, own: dict[str, Any]) -> dict[str, Any]:
            if JOIN not in name:
                return settings[name] | own
            return {"stages": [overridden(*stage) for stage in registry.stages_of(name, own)]}

        chosen = [
            (name, registry.get(name, **overridden(name, own)).pinned()) for name, own in wanted
        ]
        return [(PARENT, registry.get(PARENT)), *chosen]
    except (registry.UnknownName, UsageError):
        raise
    except ValueError as error:  # a value that the method refuses was typed by a person
        raise UsageError(str(error)) from error


def permuted(
    compressors: list[tuple[str, Compressor]],
) -> tuple[list[tuple[str, Compressor]], list[str]]:
    """Pipelines in every order that fits, the others as they are; why the other orders do not."""
    found: list[tuple[str, Compressor]] = []
    reasons: list[str] = []
    for name, method in compressors:
        fit, refused = method.orders()
        found += [(each.name, each) for each in fit] or [(name, method)]
        reasons += refused
    return found, reasons


def group(name: str, own: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every method of a group of GROUPS with its defaults.

    But the parent and `file:PATH`, and what compresses nothing by itself: the graph.
    """
    if own:
        raise UsageError(f"{name!r} stands for many methods and takes no settings; name them")
    package = f"{GROUPS[name]}."
    found = {each: registry.get(each) for each in registry.names()}
    return [
        (name, {})
        for name, method in found.items()
        if name not in (PARENT, registry.FILE)
        and method.leaves != "graph"
        and type(method).__module__.startswith(package)
    ]


def staged(
    compressors: list[tuple[str, Compressor]],
) -> Iterator[tuple[str, Compressor, bool]]:
    """The methods, and before each pipeline what its stages make; whether it goes on from the last.

    So every stage has a record of its own, and pipelines that begin alike share it.
    """
    for name, method in compressors:
        for number, stage in enumerate([*method.prefixes(), (name, method)]):
            yield *stage, number > 0
