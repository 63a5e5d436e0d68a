"""What to run: one model, one method with all its settings, one way of measuring."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

PARENT = "none"  # the method that every other is compared with
MEASURE_ONLY = ("data", "data_sha", "protocol", "metrics")  # cannot change the artefact
VERSIONS = ("code", "environment")  # change when the software does, not when the question does


@dataclass(frozen=True)
class Job:
    """Everything that can change a result, and nothing else. All of it is plain JSON."""

    model: str  # alias in bench/models.py
    revision: str  # of the model's weights
    data: str  # evaluation data, by alias or path
    data_sha: str  # of its text
    calibration: dict[str, Any] | None  # data, sha, samples, length, seed; None: not needed
    method: str
    settings: dict[str, Any]  # every field of the method, defaults included
    protocol: dict[str, Any]  # window, limit, prompt and generated lengths
    metrics: tuple[str, ...]
    seed: int
    threads: int
    device: str
    environment: str  # the libraries that the worker runs under
    code: dict[str, str]  # hash of our source files: {"compress": ..., "measure": ...}

    def key(self) -> str:
        """12 hex digits; equal jobs have equal keys on every machine and Python."""
        return short_hash(asdict(self))

    def compress_key(self) -> str:
        """The key of the artefact: jobs that differ only in how they measure share it.

        Threads count, since the cost of compression is kept with the artefact.
        """
        parts = {name: value for name, value in asdict(self).items() if name not in MEASURE_ONLY}
        return short_hash(parts | {"code": self.code["compress"]})


def question(job: dict[str, Any]) -> str:
    """What a record's job asks, whatever version of the software answered: text to compare."""
    asked = {name: value for name, value in job.items() if name not in VERSIONS}
    return json.dumps(asked, sort_keys=True)


def short_hash(value: Any) -> str:
    """12 hex digits of the SHA-256 of `value` as JSON; the order of dict keys does not count."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
