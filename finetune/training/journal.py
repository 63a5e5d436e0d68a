"""What a run writes while it trains: `log.jsonl`, TensorBoard events, and a picture of the curves.

One JSON object a line, raw values: `{"step": 12, "loss": 4.1, ...}` after a step, and
`{"step": 100, "validation_loss": 3.9, ...}` after an evaluation. A resumed run cuts off the lines
that come after its checkpoint, so the file reads as if nothing had happened.
"""

import json
import os
from pathlib import Path
from typing import Any

from results.store import write_atomically

FILE = "log.jsonl"


class Journal:
    """The log of the run in `folder`, open for more; `step` is the last one that counts."""

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        kept = [entry for entry in entries(folder) if entry["step"] <= step] if step else []
        write_atomically(folder / FILE, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = (folder / FILE).open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else 0
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line; numbers only."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def keep(self) -> None:
        """Have what was written on disk, before a checkpoint that follows it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a crash cut short is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def draw_curves(folder: Path) -> Path:
    """`curves.svg` from the log: training and validation loss, and accuracies if there are any."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "curves"  # equal data give equal bytes
    from matplotlib import pyplot

    log = entries(folder)
    accuracies = sorted({name for entry in log for name in entry if name.endswith("accuracy")})
    figure, panels = pyplot.subplots(
        1, 1 + bool(accuracies), figsize=(6 + 5 * bool(accuracies), 4), squeeze=False
    )
    losses = panels[0][0]
    steps, values = _series(log, "loss")
    losses.plot(steps, values, color="#b8c4d6", linewidth=0.8, label="training, each step")
    losses.plot(steps, _smooth(values), color="#33557f", label="training, running mean")
    losses.plot(*_series(log, "validation_loss"), "o-", color="#c0392b", label="validation")
    losses.set(xlabel="step", ylabel="loss (nats a token)")
    losses.legend(frameon=False)
    for name in accuracies:
        panel = panels[0][1]
        panel.plot(*_series(log, name), "o-", label=name.replace("_", " "))
        panel.set(xlabel="step", ylabel="accuracy")
        panel.legend(frameon=False)
    figure.tight_layout()
    picture = folder / "curves.svg"
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
    return picture


def _series(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float], share: float = 0.95) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean = share * mean + (1 - share) * value
        weight = share * weight + (1 - share)
        smooth.append(mean / weight)
    return smooth
