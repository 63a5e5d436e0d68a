"""The cache: a folder is made once, whole or not at all, whoever asks and whoever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.paths import cache_dir, made_once

# Writes half, says so, waits for a line on stdin, writes the rest.
SLOW_MAKER = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
from bench.paths import made_once
def write(folder):
    folder.mkdir()
    (folder / "one").write_text("1")
    print("half", flush=True)
    sys.stdin.readline()
    (folder / "two").write_text("2")
print(sorted(path.name for path in made_once("box", write).iterdir()), flush=True)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_MAKER],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_cache_is_where_the_variable_says_and_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMBENCH_CACHE", "here")
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SLIMBENCH_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "slimbench"


def test_written_once(cache):
    calls = []

    def write(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()

    assert made_once("a/b", write) == made_once("a/b", write) == cache / "a" / "b"
    assert len(calls) == 1


def test_a_failing_write_leaves_nothing(cache):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        made_once("box", write)
    assert visible(cache) == []


def test_the_second_process_waits_says_so_and_finds_it_done(cache):
    with start() as first:
        assert first.stdout.readline() == "half\n"
        assert not (cache / "box").exists()  # half-written: not visible
        with start() as second:
            second.stdin.close()  # should it write after all, it does not hang
            assert second.stdout.readline() == "waiting: another process is making box\n"
            print(file=first.stdin, flush=True)
            assert second.stdout.read() == "['one', 'two']\n"  # without writing "half" itself
        assert first.stdout.read() == "['one', 'two']\n"
    assert visible(cache) == ["box"]


def test_a_killed_process_blocks_nobody(cache):
    with start() as killed:
        assert killed.stdout.readline() == "half\n"
        killed.send_signal(signal.SIGKILL)
    assert not (cache / "box").exists()
    (cache / ".box.part" / "junk").mkdir()
    began = time.monotonic()
    assert made_once("box", os.mkdir) == cache / "box"
    assert time.monotonic() - began < 10
    assert visible(cache) == ["box"]
    assert visible(cache / "box") == []
