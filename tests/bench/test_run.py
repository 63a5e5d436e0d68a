"""plan: what is refused before any process starts. run: what is done, cached, retried."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

import compress
from bench import data, run
from bench.data import UnknownData
from bench.errors import UsageError
from bench.machine import machine
from bench.models import UnknownModel
from compress import registry
from compress.registry import UnknownName
from results import store

FAST = run.Request(
    model="tiny-llama", window=64, limit=2, threads=1, metrics="size,perplexity", methods="cast"
)


def quiet(title):
    return lambda unit, done, total: None


def go(request, results):
    return list(run.run(run.plan(request), results, quiet))


def test_the_parent_comes_first_and_nothing_twice():
    request = replace(FAST, methods="rtn(bits=4),rtn,none,cast")
    assert [task.job.method for task in run.plan(request)] == ["none", "rtn", "cast"]


def test_brackets_win_over_set_which_wins_over_the_default():
    request = replace(
        FAST, methods="rtn,rtn(bits=8)", overrides=("rtn.bits=3", "rtn.symmetric=true")
    )
    _, first, second = run.plan(request)
    assert (first.job.settings["bits"], first.job.settings["symmetric"]) == (3, True)
    assert (second.job.settings["bits"], second.job.settings["symmetric"]) == (8, True)


def test_a_job_says_everything_that_counts():
    job = run.plan(replace(FAST, methods="gptq", samples=8, length=32, seed=5))[-1].job
    assert job.calibration == {
        "data": "sample", "sha": job.data_sha, "samples": 8, "length": 32, "seed": 5
    }  # fmt: skip
    assert job.protocol == {
        "window": 64, "stride": 64, "bos": False, "limit": 2, "prompt_tokens": 128, "new_tokens": 64
    }  # fmt: skip
    assert (job.metrics, job.threads, job.seed) == (("size", "perplexity"), 1, 5)
    assert job.environment.startswith("torch-2.")
    assert len(job.code["compress"]) == len(job.code["measure"]) == 12
    assert run.plan(FAST)[0].job.calibration is None


def test_the_window_is_what_the_model_reads_but_not_more_than_1024(tiny_gpt2, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(tiny_gpt2, short)
    config = json.loads((short / "config.json").read_text()) | {"n_positions": 640}
    (short / "config.json").write_text(json.dumps(config))
    windows = []
    for model in ("tiny-llama", str(short)):  # which reads 2048 tokens
        request = replace(FAST, model=model, window=None, length=8)
        windows.append(run.plan(request)[0].job.protocol["window"])
    assert windows == [1024, 640]


def test_methods_in_different_files_have_different_code():
    jobs = {task.job.method: task.job for task in run.plan(replace(FAST, methods="cast,rtn,gptq"))}
    assert jobs["none"].code == jobs["cast"].code  # one file
    assert len({job.code["compress"] for job in jobs.values()}) == 3


REFUSED = {
    "unknown method": ({"methods": "gptqq"}, UnknownName, "no method 'gptqq'; did you mean gptq"),
    "unknown setting": ({"methods": "rtn(bit=3)"}, UnknownName, "no setting 'bit'; did you mean"),
    "wrong type": ({"methods": "rtn(bits=x)"}, UsageError, "rtn.bits must be int, not 'x'"),
    "refused value": ({"methods": "rtn(bits=5)"}, UsageError, "bits"),
    "bad grammar": ({"methods": "rtn(bits=3"}, UsageError, "do not close"),
    "no method": ({"methods": " , "}, UsageError, "no method in"),
    "bad set": ({"overrides": ("cast=3",)}, UsageError, "write method.setting=value"),
    "set without value": ({"overrides": ("cast.dtype= ",)}, UsageError, "method.setting=value"),
    "set elsewhere": ({"overrides": ("rtn.bits=3",)}, UsageError, "no method 'rtn' in this run"),
    "set unknown": ({"overrides": ("cast.bits=3",)}, UnknownName, "has no setting 'bits'"),
    "unknown metric": ({"metrics": "siz"}, UsageError, "no metric 'siz'; did you mean size"),
    "no metric": ({"metrics": ","}, UsageError, "no metric in ','"),
    "unknown model": ({"model": "tiny-lama"}, UnknownModel, "did you mean tiny-llama"),
    "unknown data": ({"data": "sampel"}, UnknownData, "did you mean sample"),
    "no such file": ({"calibration": "./no.txt"}, UnknownData, "'./no.txt' does not exist"),
    "no path": ({"methods": "file"}, UsageError, "file needs a path: file:PATH"),
    "nothing there": ({"methods": "file:no/x.gguf"}, UsageError, "no/x.gguf: no such file or fold"),
    "not a model": ({"methods": f"file:{__file__}"}, UsageError, "is in none of the formats"),
    "long window": ({"window": 4096}, UsageError, "--window 4096: tiny-llama reads at most 2048"),
    "long samples": (
        {"methods": "gptq", "length": 4096},
        UsageError,
        "--length 4096: tiny-llama reads at most 2048",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_before_any_process_starts(case, monkeypatch):
    monkeypatch.setattr(run, "launch", None)
    change, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message.replace("(", r"\(")) as caught:
        run.plan(replace(FAST, **change))
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_is_another_job(tiny_llama, tmp_path):
    """And so is the code that reads formats, which no import statement of the method names."""
    path = tmp_path / "theirs" / "model.gguf"
    compress.export(compress.load(tiny_llama), path.parent, format="gguf", tokenizer=tiny_llama)
    request = replace(FAST, methods=f"file:{path},cast")
    _, first, cast = (task.job for task in run.plan(request))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first.settings == {"path": str(path), "sha256": sha256, "format": "gguf"}
    with path.open("ab") as file:
        file.write(bytes(32))
    second = run.plan(request)[1].job
    assert second.settings["sha256"] != sha256
    assert second.key() != first.key() and second.compress_key() != first.compress_key()
    assert first.code["measure"] != cast.code["measure"]
    formats = [file.name for file in run.sources(registry.get("file"))]
    assert "gguf.py" in formats and "file.py" in formats
    assert [file.name for file in run.sources(registry.get("cast"))] == ["cast.py"]


def test_ours_are_methods_that_need_no_path():
    named = [task.job.method for task in run.plan(replace(FAST, methods="ours", length=32))]
    assert sorted(named) == compress.names() and "file" not in named


def test_samples_are_nobodys_business_where_nothing_is_calibrated():
    assert len(run.plan(replace(FAST, methods="cast,rtn", length=4096))) == 3


def test_data_that_is_too_short_fails_once_and_leaves_no_record(tmp_path, monkeypatch):
    text = tmp_path / "short.txt"
    text.write_text("One paragraph.\n\nAnother one.\n")
    monkeypatch.setattr(run, "launch", None)
    with pytest.raises(ValueError, match="less than one window of 64"):
        go(replace(FAST, data=str(text)), tmp_path / "results")
    assert store.load_all(tmp_path / "results") == []


def test_data_shorter_than_the_prompt_of_latency_fails_once(tmp_path, monkeypatch):
    text = tmp_path / "short.txt"
    text.write_text("One paragraph.\n\n" + 50 * "word ")
    monkeypatch.setattr(run, "launch", None)
    request = replace(FAST, data=str(text), limit=None, metrics="latency")
    with pytest.raises(
        ValueError, match="192 tokens in whole windows, fewer than the prompt of 512"
    ):
        go(request, tmp_path / "results")
    assert run.plan(replace(request, limit=2))[0].job.protocol["prompt_tokens"] == 128


def test_calibration_on_the_evaluation_text_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "mine.txt"
    copy.write_text(data.texts("sample")[0].text)
    monkeypatch.setattr(run, "launch", None)
    request = replace(FAST, methods="gptq", calibration=str(copy), samples=4, length=32)
    with pytest.raises(ValueError, match="of the evaluation text"):
        go(request, tmp_path / "results")


def test_data_that_change_during_a_run_fail_the_job(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"Paragraph {number}." for number in range(100)))
    request = replace(FAST, data=str(text), metrics="perplexity")
    tasks = run.plan(request)
    text.write_text(text.read_text().replace("Paragraph", "Chapter"))
    record, _ = next(run.run(tasks, tmp_path / "results", quiet))
    assert record["status"] == "failed" and "changed during the run" in record["error"]


def test_one_failure_does_not_stop_the_others_and_is_tried_again(planted, tmp_path, monkeypatch):
    results = tmp_path / "results"
    request = replace(FAST, methods=planted(fault="raise") + ",cast")
    first = go(request, results)
    states = [(record["job"]["method"], record["status"], cached) for record, cached in first]
    assert states == [("none", "ok", False), ("planted", "failed", False), ("cast", "ok", False)]
    assert len(store.load_all(results)) == 3

    planted.heal()
    second = go(request, results)
    states = [(record["job"]["method"], record["status"], cached) for record, cached in second]
    assert states == [("none", "ok", True), ("planted", "ok", False), ("cast", "ok", True)]
    assert planted.calls() == ["compress", "compress", "load"]

    for name in ("launch", "start_server", "check_blocks"):
        monkeypatch.setattr(run, name, None)  # nothing is started, nothing cut
    assert [cached for _, cached in go(request, results)] == [True, True, True]


def test_a_cached_record_belongs_to_this_machine(planted, tmp_path, monkeypatch):
    task = run.plan(replace(FAST, methods=planted()))[-1]
    record = {"key": task.job.key(), "status": "ok", "started": "", "values": {}}
    record |= {"job": {"model": "tiny-llama", "method": "planted"}, "machine": machine()}
    store.save(record, tmp_path)
    assert run.cached(task, tmp_path) == record
    other = run.plan(replace(FAST, methods=planted(), threads=2))[-1]
    assert run.cached(other, tmp_path) is None
    monkeypatch.setattr(run, "machine", lambda: {"name": "another"})
    assert run.cached(task, tmp_path) is None


def test_an_unusable_results_folder_is_found_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    monkeypatch.setattr(run, "launch", None)
    with pytest.raises(OSError):
        go(FAST, tmp_path / "results")
