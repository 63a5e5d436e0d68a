"""A run's folder: what was asked for, so that it can be resumed; what came out, with its lineage.

run.json             command, settings, data and base: compared when the run is resumed
log.jsonl            figures of each step (journal.py), curves.svg, tensorboard/
checkpoints/         to resume from (checkpoints.py)
adapter/             LoRA only: peft's own files
model/               the finished model, a plain folder with lineage.json: what the bench takes
"""

import json
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.machine import commit, packages
from bench.source_hash import ROOT
from finetune.options import to_json
from finetune.training import parallel
from finetune.training.loop import FREE
from finetune.training.parallel import Place
from results.store import write_atomically

FILE = "run.json"
PATHS = ("out", "data", "text")  # of this machine; origin names what lay there


def check(settings: Any, command: str) -> None:
    """Raises UsageError if the folder holds a run of another command or of other settings.

    Called before anything is written, so that a mistyped --out damages nothing.
    """
    if (settings.out / FILE).exists():
        asked = _plain({"command": command, "settings": to_json(settings)})
        _compare(read(settings.out), asked, settings.out)


def begin(settings: Any, command: str, origin: dict[str, Any], place: Place) -> None:
    """Write run.json, or check that the run in the folder is this very run.

    origin: what the result depends on besides settings: fingerprints of data, base and tokenizer.
    Raises UsageError naming the first thing that differs.
    """
    path = settings.out / FILE
    asked = _plain({"command": command, "settings": to_json(settings), "origin": origin})
    head, dirty = commit(ROOT)
    software = packages() | {"commit": f"{head}{' changed' if dirty else ''}" if head else None}
    if path.exists():
        before = read(settings.out)
        _compare(before, asked, settings.out)
        software = before.get("software", software)
    parallel.wait(place)
    if place.leads:
        text = json.dumps(asked | {"software": software}, indent=1, sort_keys=True)
        write_atomically(path, text + "\n")


def read(run: Path) -> dict[str, Any]:
    """run.json of a run. Raises ValueError naming the file."""
    path = run / FILE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        _ = recipe["command"], recipe["settings"].items, recipe["origin"].items
    except FileNotFoundError:
        raise ValueError(f"{run} is not the folder of a run: {FILE} is missing") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); start the run again elsewhere") from None
    return recipe


def lineage(run: Path, step: int) -> dict[str, Any]:
    """What lineage.json says of a model that this run made."""
    recipe = read(run)
    settings, origin = recipe["settings"], recipe["origin"]
    base = origin.get("base")
    made = f"{recipe['command']}, {step} steps" + (f", from {base['alias']}" if base else "")
    return {
        "source": made,
        "recipe": {name: value for name, value in settings.items() if name not in PATHS},
        "origin": origin,
        "step": step,
        "software": recipe.get("software"),
    }


def _compare(there: dict[str, Any], asked: dict[str, Any], run: Path) -> None:
    for part in asked:
        old, new = there[part], asked[part]
        if not isinstance(old, dict):
            old, new = {part: old}, {part: new}
        for name in sorted(old.keys() | new.keys()):
            if name not in FREE and old.get(name) != new.get(name):
                raise UsageError(
                    f"{run} holds another run: {name} was {old.get(name)!r}, now "
                    f"{new.get(name)!r}; choose another --out, or delete that folder"
                )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))
