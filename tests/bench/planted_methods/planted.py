"""`planted`: leaves the model as it is, unless told to misbehave. Keeps count of its calls.

Source: written for these tests
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.base import Compressor, Progress, Runner, silent
from compress.registry import register


@dataclass(frozen=True)
class Planted(Compressor):
    """Appends "step pid" to `folder`/calls, then does `fault` in `step` unless `folder`/go exists.

    fault: nothing, raise, hang (together with a process of its own), kill or nan.
    """

    fault: str = "nothing"
    step: str = "compress"
    folder: str = ""

    def __post_init__(self) -> None:
        """Refuses what cannot be, as real methods do."""
        if self.step not in ("compress", "load"):
            raise ValueError(f"step must be compress or load, not {self.step!r}")

    def compress(
        self, model: nn.Module, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """The model itself."""
        progress(1, 2)
        self._act("compress")
        if self.fault == "nan":
            next(model.parameters()).data.fill_(float("nan"))
        return model

    def load(self, folder: Path) -> Runner:
        """The saved model."""
        self._act("load")
        return super().load(folder)

    def _act(self, step: str) -> None:
        if not self.folder:
            return
        helper = None
        if self.fault == "hang" and step == self.step:
            helper = subprocess.Popen(["sleep", "100"])
        with (Path(self.folder) / "calls").open("a") as calls:
            calls.write(f"{step} {os.getpid()} {helper.pid if helper else ''}\n")
        if step != self.step or (Path(self.folder) / "go").exists():
            return
        if self.fault == "raise":
            raise ValueError("planted fault\nin two lines")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            print("about to hang", flush=True)
            time.sleep(100)


register("planted", Planted())
