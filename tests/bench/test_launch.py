"""launch: what becomes of a job that fails, hangs, dies or was half done before."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import launch, run
from bench.launch import cost_of

FAST = {"model": "tiny-llama", "window": 64, "limit": 2, "threads": 1, "metrics": "size,perplexity"}


@pytest.fixture
def task(planted):
    """Makes the task of a planted method with these settings."""

    def make(timeout_s=60.0, metrics="size,perplexity", **settings):
        request = FAST | {"metrics": metrics, "timeout_s": timeout_s}
        return run.plan(run.Request(**request, methods=planted(**settings)))[-1]

    return make


def left_behind(task):
    """Files of boxes, and artefacts, that exist now."""
    cache = Path(os.environ["SLIMBENCH_CACHE"])
    boxes = [file.name for file in (cache / "boxes").iterdir() if file.name != ".lock"]
    return boxes, task.artefact.exists()


def test_a_good_job(task, planted):
    seen = []
    good = task()
    record = launch.launch(good, lambda *state: seen.append(state))
    values = record["values"]
    assert (record["status"], record["error"], record["key"]) == ("ok", None, good.job.key())
    assert planted.calls() == ["compress", "load"]
    assert values["size_bytes"] > 0 and values["perplexity"] > 1
    assert 0 <= values["compress_s"] < 10 and values["compress_cpu_s"] >= 0
    assert values["load_s"] > 0
    assert 0 < values["compress_peak_rss_bytes"] < values["compress_baseline_rss_bytes"]
    assert record["blocks"]["evaluation"]["count"] == 2
    assert record["blocks"]["evaluation"]["length"] == 64
    assert record["packages"]["torch"] and record["machine"]["cores"] >= 1
    assert left_behind(good) == ([], True)
    json.dumps(record, allow_nan=False)


def test_compress_and_measure_are_two_processes_neither_of_them_ours(task, planted):
    launch.launch(task())
    assert len({*planted.pids(), os.getpid()}) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_cannot_reach_the_server_nor_what_it_forks():
    launch.start_server()
    status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
    (mask,) = [int(line.split()[1], 16) for line in status.splitlines() if "SigBlk" in line]
    assert mask >> (signal.SIGINT - 1) & 1


@pytest.mark.parametrize("step", ["compress", "load"])
def test_a_failing_method_is_a_record_with_its_reason_in_one_line(task, planted, step):
    bad = task(fault="raise", step=step)
    record = launch.launch(bad)
    phase = {"compress": "compress", "load": "measure"}[step]
    assert record["status"] == "failed"
    assert record["error"] == f"{phase}: planted fault in two lines"
    assert "Traceback" in record["log_tail"] and "planted.py" in record["log_tail"]
    assert left_behind(bad) == ([], step == "load")


def test_a_method_that_destroys_the_weights_fails(task):
    record = launch.launch(task(fault="nan"))
    assert record["status"] == "failed"
    assert "NaN" in record["error"]


def test_too_long_is_a_failure_and_everything_it_started_is_ended(task, planted, monkeypatch):
    slow = task(fault="hang", timeout_s=1)
    boxes = Path(os.environ["SLIMBENCH_CACHE"]) / "boxes"

    def hung():
        return any("about to hang" in log.read_text() for log in boxes.glob("box-*/log.txt"))

    # Time stands still until the method hangs: how long it takes to start is not what is tested.
    clock = SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=lambda: 1e9 if hung() else 0.0
    )
    monkeypatch.setattr(launch, "time", clock)
    record = launch.launch(slow)
    assert record["status"] == "failed"
    assert record["error"] == "compress: no result after 1 s; see --timeout-s"
    assert record["log_tail"].endswith("about to hang\n")
    assert len(planted.pids()) == 2 and planted.ended()
    assert left_behind(slow) == ([], False)


def test_a_killed_worker_is_a_failure(task):
    record = launch.launch(task(fault="kill"))
    assert record["status"] == "failed"
    assert record["error"] == "compress: the worker died of SIGKILL: out of memory?"


def test_a_finished_artefact_is_measured_without_compressing_again(task, planted):
    first = launch.launch(task(metrics="size"))
    second = launch.launch(task(metrics="size,perplexity"))
    assert planted.calls() == ["compress", "load", "load"]
    assert second["key"] != first["key"] and second["compress_key"] == first["compress_key"]
    assert second["values"]["compress_s"] == first["values"]["compress_s"]


def test_an_artefact_cut_short_is_made_again(task, planted):
    good = task(metrics="size")
    launch.launch(good)
    file = good.artefact / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert cost_of(good.artefact) is None
    assert launch.launch(good)["status"] == "ok"
    assert planted.calls() == ["compress", "load", "compress", "load"]
    assert file.read_bytes() == whole
    assert left_behind(good) == ([], True)


def test_boxes_of_killed_runs_are_swept_and_those_of_living_ones_are_not(task):
    from bench.box import new_box

    boxes = Path(os.environ["SLIMBENCH_CACHE"]) / "boxes"
    (boxes / "box-dead").mkdir(parents=True)
    (boxes / "box-dead" / "half").write_text("x")
    with new_box() as living:
        with new_box() as other:
            assert living != other and living.is_dir()
        assert sorted(file.name for file in boxes.iterdir()) == [".lock", living.name]
    assert sorted(file.name for file in boxes.iterdir()) == [".lock"]


def test_a_missing_environment_is_skipped_with_the_command_that_makes_it(task):
    record = launch.launch(replace(task(), env="nowhere"))
    assert record["status"] == "skipped"
    assert "python -m baselines setup nowhere" in record["error"]


def test_a_worker_with_an_interpreter_of_its_own_gives_the_same_numbers(task, planted, monkeypatch):
    ours = launch.launch(task())
    # What the worker is told, an environment of its own would have installed.
    monkeypatch.setattr(launch.environments, "python_of", lambda env: Path(sys.executable))
    monkeypatch.setattr(launch, "ROOT", f"{launch.ROOT}{os.pathsep}{planted.home}")
    monkeypatch.setattr(launch, "commit", lambda root: (None, False))
    theirs = launch.launch(replace(task(), env="torchao"))
    assert theirs["status"] == "ok", theirs["error"]
    assert theirs["values"]["perplexity"] == ours["values"]["perplexity"]
    assert planted.calls() == ["compress", "load", "load"]
