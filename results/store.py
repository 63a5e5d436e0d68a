"""Records as files: `<root>/runs/<machine>/<model>/<method>-<key>.json`, whole or not there.

A record is a dict that JSON can hold, with at least `key` (hex digits), `machine.name`,
`job.model` and `job.method`. The store looks at nothing else in it.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ABANDONED_S = 60.0  # writing a record takes milliseconds
log = logging.getLogger(__name__)


class UnknownKey(ValueError):
    """A key that no record has, or that several records share as a prefix."""


def slug(text: str) -> str:
    """`text` as a file name: letters, digits, `.`, `_`, `-`; never empty, never `.` or `..`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80] or "unnamed"


def path(root: Path, machine: str, model: str, method: str, key: str) -> Path:
    """Where the record of `key` lives under `root`."""
    return root / "runs" / slug(machine) / slug(model) / f"{slug(method)}-{key}.json"


def save(record: Record, root: Path) -> Path:
    """Write `record` and return its file; a reader sees the old file or the new one, never half.

    Raises ValueError if a number is NaN or infinite (JSON has no such number), OSError if the
    folder cannot be written; neither leaves anything behind.
    """
    text = json.dumps(record, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    job = record["job"]
    file = path(root, record["machine"]["name"], job["model"], job["method"], record["key"])
    write_atomically(file, text + "\n")
    return file


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` by one holding `text`, through a temporary file in the same folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(file: Path) -> Record | None:
    """The record in `file`; None if it is missing or, after a warning that names it, broken."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        _ = record["key"], record["status"], record["machine"]["name"], record["started"]
        _ = record["job"]["model"], record["job"]["method"], record["values"].items
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("%s is not a record (%s); skipped: delete it, then run again", file, reason)
        return None
    return record


def load_all(root: Path) -> list[Record]:
    """Every readable record under `root`, in the order of their file names."""
    files = sorted((root / "runs").glob("*/*/*.json"))
    return [record for file in files if (record := load(file)) is not None]


def find(root: Path, prefix: str) -> Record:
    """The one record whose key starts with `prefix`. Raises UnknownKey for none or several."""
    found = [record for record in load_all(root) if record["key"].startswith(prefix.lower())]
    if not prefix or not found:
        raise UnknownKey(f"no record {prefix!r} in {root}; keys: python -m bench leaderboard")
    if len(found) > 1:
        # The same job run on several machines has one key: the newest is meant.
        keys = sorted({record["key"] for record in found})
        if len(keys) > 1:
            raise UnknownKey(f"key {prefix!r} fits {', '.join(keys)}; write more digits")
    return max(found, key=lambda record: record["started"])


def prepare(root: Path) -> None:
    """Make sure that records can be written under `root` before hours are spent on them.

    Deletes the temporary files that a killed writer may have left. Raises OSError.
    """
    runs = root / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for file in runs.glob("*/*/.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()
    with tempfile.TemporaryFile(dir=runs):
        pass
