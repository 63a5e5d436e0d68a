"""Starts the worker of a job in the right interpreter and turns its end into a record.

Methods that need no environment of their own run in processes forked from a server that has
imported torch and transformers once, and has computed nothing: each starts in milliseconds,
clean. Peers start this file's `child` in their own interpreter. Both end in
`worker.main`, write to a log in their box, and die with us, however we die.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

from bench import environments
from bench.box import new_box
from bench.job import Job
from bench.machine import LIBRARIES, commit, machine, packages
from bench.paths import cache_dir
from bench.source_hash import ROOT

PRELOAD = [
    "bench.worker",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
]
POLL_S = 0.25  # how often the progress of a running worker is looked at
Report = Callable[[str, int, int], None]  # (unit, done, total)


class Failed(Exception):
    """A worker ended without a result; the message is the reason, in one line."""


@dataclass(frozen=True)
class Task:
    """A job, and where and how it runs: what does not change its result."""

    job: Job
    folder: Path  # of the model's weights
    env: str | None  # None: this interpreter
    packages: tuple[str, ...]  # that hold the methods
    timeout_s: float
    before: "Task | None" = None  # whose artefact a pipeline's last stage goes on from

    @property
    def artefact(self) -> Path:
        """The folder of the compressed model. Costs are in it, so it belongs to one machine."""
        return artefact_folder(machine()["name"], self.job.compress_key())


def artefact_folder(machine_name: str, compress_key: str) -> Path:
    """Where the artefact of a record is, or was: the cache may have been emptied since."""
    return cache_dir() / "artefacts" / machine_name / compress_key


def launch(
    task: Task, report: Report = lambda unit, done, total: None, measure: bool = True
) -> dict[str, Any]:
    """Run `task` to its end. Never raises for a failing method: the failure is the record.

    measure: False stops when the artefact is there, and leaves the record without measured values.
    status: "ok"; "skipped" (environment missing); "failed" (error holds the reason).
    """
    started = time.perf_counter()
    head, dirty = commit(ROOT)
    record: dict[str, Any] = {
        "key": task.job.key(),
        "compress_key": task.job.compress_key(),
        "job": asdict(task.job),
        "machine": machine(),
        "packages": (
            environments.packages_of(task.env, LIBRARIES) if task.env else packages(LIBRARIES)
        ),
        "commit": head,
        "dirty": dirty,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "ok",
        "error": None,
        "values": {},
    }
    try:
        python = environments.python_of(task.env) if task.env else None
    except FileNotFoundError as missing:
        return record | {"status": "skipped", "error": str(missing), "duration_s": 0.0}
    with new_box() as box:
        try:
            record |= _run(task, box, python, report, measure)
        except Failed as failure:
            record |= {"status": "failed", "error": str(failure), "log_tail": _tail(box)}
    return record | {"duration_s": round(time.perf_counter() - started, 3)}


def _run(
    task: Task, box: Path, python: Path | None, report: Report, measure: bool
) -> dict[str, Any]:
    if cost_of(task.artefact) is None and task.before is not None:
        _before(task.before, report)
    described = {
        "job": asdict(task.job),
        "folder": str(task.folder.resolve()),
        "artefact": str(task.artefact),
        "before": str(task.before.artefact) if task.before else None,
        "packages": task.packages,
    }
    (box / "task.json").write_text(json.dumps(described), encoding="utf-8")
    deadline = time.monotonic() + task.timeout_s
    for step in ("compress", "measure") if measure else ("compress",):
        if step == "measure" or cost_of(task.artefact) is None:
            _step(step, box, python, deadline, task.timeout_s, report)
    cost = cost_of(task.artefact)
    if cost is None:
        raise Failed(f"the artefact {task.artefact.name} is incomplete; run again")
    if not measure:
        return {"values": cost["values"], "blocks": cost["blocks"]}
    measured = json.loads((box / "measured.json").read_text(encoding="utf-8"))
    return measured | {
        "values": cost["values"] | measured["values"],
        "blocks": cost["blocks"] | measured["blocks"],
    }


def _before(task: Task, report: Report) -> None:
    """Make the artefact of a stage, where it is not there. Raises Failed, naming the stage."""
    record = launch(task, report, measure=False)
    if record["status"] != "ok":
        raise Failed(f"after {task.job.method}: {record['error']}")


def _step(
    step: str, box: Path, python: Path | None, deadline: float, timeout_s: float, report: Report
) -> None:
    process, code = _start(step, box, python), None
    try:
        while (code := _wait(process)) is None:
            if time.monotonic() > deadline:
                raise Failed(f"{step}: no result after {timeout_s:g} s; see --timeout-s")
            with contextlib.suppress(OSError, ValueError):
                unit, done, total = (box / "progress").read_text().split()
                report(unit, int(done), int(total))
    finally:
        _end(process, alive=code is None)  # alive: it is too late, or Ctrl-C
    if code != 0:
        raise Failed(f"{step}: {_reason(box, code)}")


def start_server() -> None:
    """Have the server import its modules in the background; does nothing if it runs already."""
    resource_tracker.ensure_running()  # the server would start it, which unblocks SIGINT
    with _sigint_blocked():  # the server and its children inherit this: Ctrl-C is ours to handle
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()


def _start(step: str, box: Path, python: Path | None) -> Any:
    if python is None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        arguments = (str(box), step, None, (dict(os.environ), os.getcwd()))
        process = context.Process(target=child, args=arguments)
        process.start()
        return process
    # Our packages and no others: an inherited PYTHONPATH would mix environments.
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    start = "import sys; from bench.launch import child; child(*sys.argv[1:], parent=0)"
    command = [str(python), "-c", start, str(box), step]
    with (box / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=log, stderr=log)


def child(
    box: str, step: str, parent: int | None, around: tuple[dict[str, str], str] | None = None
) -> None:
    """The first function in a worker process: cut the ties to the terminal, then work.

    parent: a file descriptor that ends when the launcher does; None: multiprocessing knows it.
    around: the launcher's environment variables and folder, where they were not inherited.
    """
    os.setsid()  # a group of its own: killed with all that it started
    if parent is None:
        process = multiprocessing.parent_process()
        assert process is not None
        parent = process.sentinel
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    if around is not None:
        os.environ.clear()
        os.environ.update(around[0])
        os.chdir(around[1])
    log = os.open(Path(box) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from bench import worker  # the launcher itself never needs what this imports

    sys.exit(worker.main(Path(box), step))


def _die_with(parent: int) -> None:
    connection.wait([parent])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def cost_of(artefact: Path) -> dict[str, Any] | None:
    """cost.json of a finished artefact; None if it is not there or its files were cut short."""
    try:
        cost = json.loads((artefact / "cost.json").read_text(encoding="utf-8"))
        files = cost["files"].items()
        whole = all((artefact / "model" / name).stat().st_size == size for name, size in files)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return cost if whole else None


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(process: Any) -> int | None:
    if isinstance(process, subprocess.Popen):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_S)
        return None
    process.join(POLL_S)
    return process.exitcode


def _end(process: Any, alive: bool) -> None:
    if alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
        process.kill()  # it may not have had the time to form a group
    if isinstance(process, subprocess.Popen):
        process.communicate()
    else:
        process.join()
        process.close()


def _reason(box: Path, code: int) -> str:
    with contextlib.suppress(OSError, ValueError):
        return impersonal(json.loads((box / "error.json").read_text(encoding="utf-8"))["error"])
    if code < 0:
        hint = ": out of memory?" if code == -signal.SIGKILL else ""
        return f"the worker died of {signal.Signals(-code).name}{hint}"
    last = _tail(box).strip().splitlines()
    return last[-1] if last else f"the worker ended with exit code {code} and said nothing"


def _tail(box: Path, characters: int = 2000) -> str:
    try:
        text = (box / "log.txt").read_text(encoding="utf-8", errors="replace")[-characters:]
    except OSError:
        return ""
    return impersonal(text)


def impersonal(text: str) -> str:
    """`text` without this machine's folders: records are shared."""
    for name, folder in (("CODE", ROOT), ("CACHE", cache_dir()), ("HOME", Path.home())):
        text = text.replace(str(folder), name)
    return text
