"""A scratch folder for one job, which does not outlive the run: not even one that is killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.paths import cache_dir


@contextlib.contextmanager
def new_box() -> Iterator[Path]:
    """An empty folder, deleted at the end; first deletes what killed runs have left behind.

    A box is locked while its owner lives; the kernel drops the lock of a dead one.
    """
    boxes = cache_dir() / "boxes"
    boxes.mkdir(parents=True, exist_ok=True)
    with (boxes / ".lock").open("w") as gate:  # so that no box is seen before it is locked
        fcntl.flock(gate, fcntl.LOCK_EX)
        for old in boxes.glob("box-*"):
            with contextlib.suppress(OSError), _locked(old):
                shutil.rmtree(old)
        box = Path(tempfile.mkdtemp(dir=boxes, prefix="box-"))
        owned = _locked(box)
        owned.__enter__()
    try:
        yield box
    finally:
        shutil.rmtree(box, ignore_errors=True)
        owned.__exit__(None, None, None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
