"""`fakepeer:round`: weights rounded to some decimal digits by a library of its own environment.

Source: written for these tests
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from compress.base import Compressor, Progress, silent
from compress.registry import register


@dataclass(frozen=True)
class FakeRound(Compressor):
    """fault: nothing, raise or hang."""

    env: ClassVar[str | None] = "fakepeer"
    libraries: ClassVar[tuple[str, ...]] = ("fakepeer",)
    timed: ClassVar[bool] = False
    digits: int = 3
    fault: str = "nothing"

    def read(self, folder: Path) -> Any:
        """The folder: libraries read models their own way."""
        return folder

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """The model, rounded."""
        import fakepeer

        if self.fault == "hang":
            fakepeer.hang()
        if self.fault == "raise":
            raise RuntimeError("this library needs a GPU")
        return fakepeer.shrink(super().read(model), self.digits)


register("fakepeer:round", FakeRound())
