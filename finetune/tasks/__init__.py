"""Fine-tuning tasks, one file each; `get(name)` gives one, `TASKS` holds all of them."""

from compress.registry import discover
from finetune.tasks.base import SPLITS, TASKS, Decoding, Example, Task, checksum, get

__all__ = ["SPLITS", "TASKS", "Decoding", "Example", "Task", "checksum", "get"]

discover("finetune.tasks")
