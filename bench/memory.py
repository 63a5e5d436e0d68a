"""Peak resident memory of this process since a chosen moment, as the kernel counts it.

In a process forked from the server, pages of library code count when they are first touched:
up to 90 MB too much for torch, never too little.
"""

import contextlib
import re
import resource
import sys
from pathlib import Path


def reset_peak() -> int:
    """Forget the peak so far where the kernel allows it (Linux); returns the bytes resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most bytes that were resident at once since `reset_peak`, else since the start."""
    in_kib = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * in_kib


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
