"""A pipeline in the bench: a record for every stage, made once, and the same files as in memory."""

import pytest
import torch
from safetensors.torch import load_file

import compress
from bench import data, models, stages
from bench.chosen import chosen_methods
from bench.leaderboard import to_markdown
from bench.run import Request, left_out, plan, run

ASKED = dict(
    model="tiny-llama", samples=8, length=64, window=64, limit=4, metrics="size,perplexity"
)


def records(tmp_path, methods, **more):
    tasks = plan(Request(methods=methods, **ASKED | more))
    return tasks, list(run(tasks, tmp_path / "results", lambda title: lambda *_: None))


def test_every_stage_has_a_record_and_is_made_once(tmp_path):
    short = "prune_structured(ratio=0.3)+recover(steps=3,sequences=5)"
    tasks, done = records(tmp_path, f"{short}+rtn,{short}+gptq")
    names = [record["job"]["method"] for record, _ in done]
    assert names == [
        "none",
        "prune_structured",
        "prune_structured+recover",
        "prune_structured+recover+rtn",
        "prune_structured+recover+gptq",
    ]
    assert all(record["status"] == "ok" for record, _ in done), [r["error"] for r, _ in done]
    last = done[4][0]
    stages = last["values"]["stages"]
    assert len(stages) == 3
    assert last["values"]["compress_s"] == pytest.approx(sum(s["compress_s"] for s in stages))
    peaks = [stage["compress_peak_rss_bytes"] for stage in stages]
    assert last["values"]["compress_peak_rss_bytes"] == max(peaks)
    drawn = [record["blocks"].get("calibration", {}).get("count") for record, _ in done]
    assert drawn == [None, 8, 5, None, 8]
    assert done[2][0]["values"]["stages"][0]["compress_s"] == stages[0]["compress_s"]
    # What stands in the file is what the same stages make in memory.
    model = models.resolve("tiny-llama")
    tokenizer = models.tokenizer(model)
    ids = data.calibration_blocks("sample", tokenizer, 8, 64, 0).ids
    few = data.calibration_blocks("sample", tokenizer, 5, 64, 0).ids
    torch.set_num_threads(tasks[0].job.threads)
    small = compress.apply("prune_structured(ratio=0.3)", compress.load(model.folder), ids)
    small = compress.apply("recover(steps=3)", small, few)
    compress.save(small, tmp_path / "small")
    made = load_file(tasks[2].artefact / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "small" / "model.safetensors").items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)
    assert not tasks[2].artefact.with_suffix(".work").exists()
    _, again = records(tmp_path, f"{short}+rtn,{short}+gptq")
    assert all(was_cached for _, was_cached in again)


def test_a_stage_that_fails_fails_what_needs_it(tmp_path):
    _, done = records(tmp_path, "prune_structured(ratio=0.99)+rtn,rtn")
    status = {record["job"]["method"]: record for record, _ in done}
    assert "leaves a block nothing" in status["prune_structured"]["error"]
    assert status["prune_structured+rtn"]["status"] == "failed"
    assert status["prune_structured+rtn"]["error"].startswith("after prune_structured: compress:")
    assert status["rtn"]["status"] == "ok"


def test_settings_reach_the_stages():
    chosen = dict(chosen_methods("gptq,prune_depth+gptq(bits=8)", ("gptq.group_size=32",)))
    assert chosen["gptq"].group_size == chosen["prune_depth+gptq"].stages[1].group_size == 32
    assert chosen["prune_depth+gptq"].stages[1].bits == 8


def test_permute():
    request = Request(methods="prune_depth+prune_structured+rtn,gptq", permute=True, **ASKED)
    names = [task.job.method for task in plan(request)]
    assert names == [
        "none",
        "prune_depth",
        "prune_depth+prune_structured",
        "prune_depth+prune_structured+rtn",
        "prune_structured",
        "prune_structured+prune_depth",
        "prune_structured+prune_depth+rtn",
        "gptq",
    ]
    assert len(left_out(request)) == 4
    keys = {task.job.compress_key() for task in plan(request)}
    assert len(keys) == len(names)


def test_the_table_of_stages(tmp_path):
    methods = "prune_depth+rtn(bits=3),prune_depth,prune_depth+rtn(bits=3)+cast"
    with pytest.raises(ValueError, match="rtn leaves packed codes"):
        plan(Request(methods=methods, **ASKED))
    _, done = records(tmp_path, "prune_depth+rtn(bits=3),prune_depth+prune_structured+rtn,rtn")
    found = [record for record, _ in done]
    by_name = {record["job"]["method"]: record for record in found}
    lines = stages.table(found, lambda record: record["key"])
    assert [line[0] for line in lines] == [
        "prune_depth",
        "+ rtn(bits=3)",
        "prune_depth",
        "+ prune_structured",
        "+ rtn",
    ]
    first = by_name["prune_depth"]
    assert (
        lines[0][1:4]
        == lines[2][1:4]
        == [
            f"{first['values']['size_bytes'] / 1e6:.1f}",
            f"{first['values']['perplexity']:.3f}",
            first["key"],
        ]
    )
    assert lines[4][3] == by_name["prune_depth+prune_structured+rtn"]["key"]
    last = by_name["prune_depth+prune_structured+rtn"]["values"]["stages"][2]["compress_s"]
    assert lines[4][5] == f"{last:.1f}"
    text = to_markdown(found)
    assert "Stage by stage:" in text and "| + prune_structured |" in text
    assert "Stage by stage:" not in to_markdown([by_name["none"], by_name["rtn"]])
    alone = stages.table([by_name["prune_depth+rtn"]], lambda record: "")
    assert [line[2] for line in alone] == ["", lines[1][2]]  # a stage without a record is blank


def test_a_stage_is_not_taken_from_another_calibration(tmp_path):
    """The same method and settings on fewer samples are not the pipeline's stage."""
    pipeline = "prune_structured(ratio=0.3)+rtn"
    _, done = records(tmp_path, pipeline)
    _, fewer = records(tmp_path, "prune_structured(ratio=0.3)", samples=2)
    mine = next(each for each, _ in done if each["job"]["method"] == "prune_structured")
    other = next(each for each, _ in fewer if each["job"]["method"] == "prune_structured")
    assert mine["key"] != other["key"]
    found = [record for record, _ in (*done, *fewer)]
    for group in (found, found[::-1]):
        assert stages.table(group, lambda record: record["key"])[0][3] == mine["key"]
