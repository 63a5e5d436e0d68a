"""The cache: where it lies, and how a folder in it is made once, whole, whoever asks.

A cached folder is written beside its place and renamed at the end, under a lock of its own.
So a reader never sees a half-written folder, two processes never make the same one twice, and
what a killed process left behind is swept away by the next one that wants the same folder.
"""

import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.kernel_choice import cache_dir

log = logging.getLogger(__name__)


def made_once(place: str, write: Callable[[Path], None]) -> Path:
    """The folder cache_dir()/place; if it is missing, `write(folder)` makes it first.

    `write` gets a path that does not exist yet, in a scratch folder that it may use too: the
    scratch folder is deleted afterwards. If `write` raises, nothing is left.
    """
    final = cache_dir() / place
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_name(f".{final.name}.lock")):
        if not final.is_dir():  # another process may have made it while this one waited
            scratch = final.with_name(f".{final.name}.part")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                write(scratch / final.name)
                (scratch / final.name).rename(final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return final


def replaced(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write(path)` fill a new folder beside `folder`, then put it in its place, whole."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    write(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if it is not there."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def free_bytes(place: Path) -> int:
    """Free disk space where `place` is, or would be."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting: another process is making %s", path.with_suffix("").name[1:])
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
