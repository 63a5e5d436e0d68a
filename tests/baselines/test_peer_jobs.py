"""A peer's jobs run in its environment: success, failure, missing, timeout; groups of methods."""

import sys
from dataclasses import replace

import pytest

from bench import launch, run
from bench.errors import UsageError
from bench.leaderboard import row
from bench.run import Request


@pytest.fixture
def tasks(ready, adapters):
    def plan(methods, **changes):
        request = Request(
            model="tiny-llama", methods=methods, samples=2, length=32, window=64, limit=9, threads=1
        )
        return run.plan(replace(request, **changes))

    return plan


def test_a_peer_is_measured_as_our_methods_are(tasks):
    _, peer = tasks("fakepeer:round")
    assert peer.env == "fakepeer" and peer.job.metrics == ("size", "perplexity")
    record = launch.launch(peer)
    assert record["status"] == "ok", record.get("log_tail")
    assert record["packages"]["fakepeer"] == "1.0"
    assert "fakepeer" not in sys.modules, "the library stays out of this interpreter"
    parent = launch.launch(tasks("none")[0])
    assert parent["status"] == "ok", parent["error"]
    base, rounded = row(parent), row(record)
    assert rounded["perplexity"] == pytest.approx(base["perplexity"], rel=1e-2)
    assert rounded["perplexity"] != base["perplexity"]
    assert base["decode_tokens_per_s"] > 0 and rounded["decode_tokens_per_s"] is None


def test_failure_and_timeout_are_records(tasks):
    _, failing, hanging = tasks("fakepeer:round(fault=raise),fakepeer:round(fault=hang)")
    record = launch.launch(failing)
    assert record["status"] == "failed"
    assert record["error"] == "compress: RuntimeError: this library needs a GPU"
    assert "torch" in record["packages"], "what its environment has"
    record = launch.launch(replace(hanging, timeout_s=8.0))
    assert record["status"] == "failed" and "no result after 8 s" in record["error"]


def test_a_missing_environment_is_skipped(tasks, tmp_path, monkeypatch):
    [_, peer] = tasks("fakepeer:round")
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    record = launch.launch(peer)
    assert record["status"] == "skipped"
    assert record["packages"] == {}, "not those of this interpreter"
    assert record["error"].endswith("is missing; run: python -m baselines setup fakepeer")


def test_groups(tasks):
    names = [task.job.method for task in tasks("peers")]
    assert names == ["none", "fakepeer:round"]
    ours = [task.job.method for task in tasks("ours,peers")]
    assert {"gptq", "awq", "int8_sym", "fakepeer:round"} <= set(ours)
    assert ours.count("none") == 1


def test_what_cannot_be_asked_of_a_group_or_of_an_untimed_peer(tasks):
    with pytest.raises(UsageError, match="'ours' stands for many methods and takes no settings"):
        tasks("ours(bits=3)")
    with pytest.raises(UsageError, match="fakepeer:round runs on rebuilt weights"):
        tasks("fakepeer:round", metrics="latency")
