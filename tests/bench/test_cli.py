"""The command line as a person meets it: exit codes, one-line errors, Ctrl-C, kill -9, reruns."""

import csv
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import compress
from bench import cli, run
from results import store

ROOT = Path(cli.__file__).parent.parent
FAST = ["--model", "tiny-llama", "--window", "64", "--limit", "2", "--threads", "1"]
FAST += ["--metrics", "size,perplexity"]


@pytest.fixture
def bench(capsys):
    """Runs one command in this process: (exit code, stdout, stderr)."""

    def invoke(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return invoke


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


WRONG = {
    "method": (["run", "--methods", "gptqq"], "no method 'gptqq'; did you mean gptq"),
    "setting": (["run", "--methods", "rtn(bit=3)"], "method 'rtn' has no setting 'bit'"),
    "value": (["run", "--methods", "rtn", "--set", "rtn.bits=5"], "bits"),
    "type": (["run", "--methods", "rtn", "--set", "rtn.bits=x"], "rtn.bits must be int, not 'x'"),
    "model": (["run", "--model", "tiny-lama"], "did you mean tiny-llama"),
    "data": (["run", "--data", "sampel"], "did you mean sample"),
    "file": (["run", "--data", "./no.txt"], "'./no.txt' does not exist"),
    "metric": (["run", "--metrics", "siz"], "did you mean size"),
    "window": (["run", "--window", "9999"], "--window 9999: tiny-llama reads at most 2048"),
    "results": (["leaderboard", "--results", "no/where"], "no folder of records at no/where"),
    "format": (["leaderboard", "--format", "xls"], "no format 'xls'; known: md, csv, json"),
    "key": (["show", "ffff", "--results", "."], "no record 'ffff' in ."),
    "export of": (
        ["export", "ffff", "--format", "gguf", "--out", "x", "--results", "."],
        "no record 'ffff' in .",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_command_line_gets_wrong_is_one_line_and_exit_2(
    case, bench, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "launch", None)
    arguments, message = WRONG[case]
    if arguments[0] == "run" and "--model" not in arguments:
        arguments = [*arguments, "--model", "tiny-llama"]
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert files(tmp_path) == {}


@pytest.mark.parametrize("option", [["--limit", "0"], ["--threads", "none"], ["--nonsense"]])
def test_options_that_cannot_be_are_exit_2(option, bench):
    code, _, err = bench("run", *option)
    assert code == 2 and option[0] in err


def test_what_is_found_and_unusable_is_exit_1(bench, tmp_path):
    place = tmp_path / "results"
    place.write_text("a file, not a folder")
    code, _, err = bench("run", *FAST, "--methods", "cast", "--results", place)
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and str(place) in err


def test_a_broken_model_is_exit_1(bench, tmp_path, tiny_llama):
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": ')
    code, _, err = bench("run", *FAST, "--model", folder, "--results", tmp_path / "results")
    assert code == 1
    assert err.count("\n") == 1 and "config.json" in err


def test_debug_adds_the_traceback(bench):
    assert "Traceback" not in bench("run", "--methods", "gptqq")[2]
    assert "Traceback" in bench("run", "--methods", "gptqq", "--debug")[2]


def test_run_show_and_leaderboard(bench, planted, tmp_path):
    results = tmp_path / "results"
    methods = f"{planted()},{planted(fault='raise')}"
    command = ["run", *FAST, "--methods", methods, "--results", results]
    code, out, err = bench(*command)
    first, second, third, *_ = out.splitlines()
    assert (code, err) == (1, "")
    assert first.startswith("none  ok  perplexity ") and " MB  " in first
    assert second.startswith(f"{planted()}  ok  perplexity ")
    assert third.endswith("failed: compress: planted fault in two lines")
    before = files(results)

    code, out, _ = bench(*command)
    assert [line.split("  ")[1].split(":")[0] for line in out.splitlines()[:3]] == [
        "cached",
        "cached",
        "failed",
    ]
    unchanged = [file for file, data in files(results).items() if before[file] == data]
    assert len(unchanged) >= 2

    record = next(r for r in store.load_all(results) if r["job"]["settings"].get("folder"))
    code, out, _ = bench("show", record["key"][:6], "--results", results)
    assert code == 0 and f'"key": "{record["key"]}"' in out

    code, out, _ = bench("leaderboard", "--format", "csv", "--results", results)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["status"] for row in rows] == ["ok", "ok", "failed"]
    code, out, _ = bench("leaderboard", "--results", results)
    assert out == (results / "LEADERBOARD.md").read_text() and "| planted |" in out


def test_what_others_have_made_stands_in_the_same_table(bench, tiny_llama, tmp_path, monkeypatch):
    """A GGUF file of the parent's own numbers scores what the parent scores."""
    monkeypatch.chdir(tmp_path)
    compress.export(compress.load(tiny_llama), "their own", format="gguf", tokenizer=tiny_llama)
    methods = "file:their own/model.gguf,file:their own"
    code, out, err = bench("run", *FAST, "--methods", methods, "--results", "results")
    assert (code, err) == (0, "")
    records = {record["key"]: record for record in store.load_all(Path("results"))}
    parent, *files = sorted(records.values(), key=lambda record: record["job"]["method"] != "none")
    assert len(files) == 2
    for record in files:
        assert record["job"]["settings"]["format"] == "gguf"
        values = record["values"]
        assert values["perplexity"] == pytest.approx(parent["values"]["perplexity"], rel=1e-6)
        assert values["bits_per_weight"] == 32 and values["weights"] == parent["values"]["weights"]
    sha256 = hashlib.sha256(Path("their own/model.gguf").read_bytes()).hexdigest()
    assert f"file(path=their own/model.gguf,sha256={sha256[:8]},format=gguf)  ok  perp" in out


def test_several_models_stand_in_one_leaderboard(bench, tiny_gpt2, tmp_path):
    """A run of finetune leaves its model in RUN/model: it is called RUN, not "model"."""
    shutil.copytree(tiny_gpt2, tmp_path / "adapted" / "model")
    results = tmp_path / "results"
    names = f"tiny-gpt2, {tmp_path}/adapted/model"
    code, out, _ = bench(
        *("run", "--models", names, *FAST[2:], "--methods", "cast", "--results", results)
    )
    assert code == 0 and out.index("tiny-gpt2") < out.index("adapted")
    board = (results / "LEADERBOARD.md").read_text()
    assert board.count("\n## ") == 2 and "## adapted on sample" in board
    code, _, err = bench("run", "--models", " , ", "--results", results)
    assert code == 2 and "names no model" in err


@pytest.fixture
def interruptible():
    """SIGINT as a terminal sends it: a job that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_finished_and_ends_the_worker(bench, planted, tmp_path):
    results = tmp_path / "results"

    def interrupt():
        wait_for(lambda: planted.calls() == ["compress"])
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, _, err = bench("run", *FAST, "--methods", planted(fault="hang"), "--results", results)
    assert code == 130
    assert err == "stopped; 1 of 2 jobs are finished: run again to go on\n"
    assert [record["job"]["method"] for record in store.load_all(results)] == ["none"]
    assert planted.ended()
    assert [file.name for file in (tmp_path / "cache" / "boxes").iterdir()] == [".lock"]


def test_kill_9_loses_nothing_and_measures_nothing_twice(bench, planted, tmp_path):
    """Killed while the second job is being measured: its artefact is finished, its record not."""
    results = tmp_path / "results"
    methods = planted(fault="hang", step="load")
    arguments = ["run", *FAST, "--methods", methods, "--results", str(results)]
    program = (
        "import sys; from bench import cli, run\n"
        "run.METHOD_PACKAGES = ('compress.methods', 'planted_methods')\n"
        "cli.main(sys.argv[1:])"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{planted.home}"}
    killed = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=environ, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: planted.calls() == ["compress", "load"])
    finally:
        killed.kill()
        killed.wait()
    wait_for(planted.ended, 10)  # our child could do nothing: its children did
    before = files(results)
    assert [file.name.split("-")[0] for file in before] == ["none"]
    stamps = {file: file.stat().st_mtime_ns for file in before}
    left = list((tmp_path / "cache" / "boxes").glob("box-*"))
    assert len(left) == 1

    planted.heal()
    code, out, _ = bench(*arguments)
    assert code == 0
    assert [line.split("  ")[1] for line in out.splitlines()[:2]] == ["cached", "ok"]
    assert planted.calls() == ["compress", "load", "load"]  # not compressed again
    after = files(results)
    for file, data in before.items():
        assert after[file] == data and file.stat().st_mtime_ns == stamps[file]
    assert sorted(file.name.split("-")[0] for file in after) == [
        "LEADERBOARD.md",
        "none",
        "planted",
    ]
    assert not list((tmp_path / "cache" / "boxes").glob("box-*"))
    assert bench(*arguments)[1].count("cached") == 2


def test_list_names_everything(bench):
    code, out, _ = bench("list")
    assert code == 0
    for part in (
        "rtn: Round",
        "bits=4",
        "tiny-llama: random weights",
        "wikitext2: ",
        "perplexity: ",
        "gguf: Llama and GPT-2",
        "file: What others have made",
    ):
        assert part in out


def test_doctor_says_what_is_here(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    (tmp_path / "artefacts").mkdir()
    (tmp_path / "artefacts" / "x").write_bytes(b"0" * 3_000_000)
    code, out, _ = bench("doctor")
    assert code == 0
    for part in (
        "torch        2.",
        "artefacts  3 MB",
        "tiny-llama: random",
        "GB free",
        "93 MB will be",
    ):
        assert part in out
    assert [file.name for file in tmp_path.iterdir()] == ["artefacts"]  # looks, touches nothing


@pytest.mark.parametrize("command", ["run", "export", "list", "leaderboard", "show", "doctor"])
def test_help_teaches(bench, command):
    code, out, _ = bench(command, "--help")
    assert code == 0 and "--debug" in out
    if command == "run":
        assert "rtn(bits=4,group_size=32)" in out and "file:theirs/model.Q4_0.gguf" in out
    if command == "export":
        assert "--format gguf --out small-gguf" in out and "export.json" in out
