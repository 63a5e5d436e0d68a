"""Runs one step of one job, compress or measure, in this process.

The box is a folder: the launcher leaves `task.json` in it, the worker leaves `progress`, then
`measured.json` or `error.json`. The same file runs in the main environment and in a peer's
isolated one, so that every method is measured by the same code.

compress: load the model, compress, save, and put the artefact in its place whole.
measure: load the artefact, as any other program would, and take the metrics from it.
"""

import json
import math
import os
import random
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import numpy
import torch

from bench import data, memory, models
from bench.errors import one_line
from bench.job import Job
from bench.machine import LIBRARIES, packages
from bench.metrics import METRICS
from bench.metrics.subject import Subject
from compress import registry


def main(box: Path, step: str) -> int:
    """Run `step`; returns the exit code. A failure becomes error.json, its traceback stderr."""
    try:
        task = json.loads((box / "task.json").read_text(encoding="utf-8"))
        job = Job(**task["job"])
        registry.discover(*task["packages"])
        random.seed(job.seed)
        numpy.random.seed(job.seed)
        torch.manual_seed(job.seed)
        torch.set_num_threads(job.threads)
        {"compress": compress, "measure": measure}[step](box, job, task)
    except Exception as error:
        traceback.print_exc()
        write(box / "error.json", {"error": one_line(error)})
        return 1
    return 0


def compress(box: Path, job: Job, task: dict[str, Any]) -> None:
    """Make the artefact folder: `model/` as the method saves it, cost.json and job.json beside."""
    method = registry.get(job.method, **job.settings)
    model = models.Model(job.model, Path(task["folder"]), job.revision)
    check_data(job)
    before = Path(task["before"]) if task["before"] else None
    stage = method.in_stages()[-1]
    blocks = None
    if job.calibration and stage.needs_calibration:
        drawn = {name: job.calibration[name] for name in ("length", "seed")}
        samples = stage.drawn(job.calibration["samples"])
        name = job.calibration["data"]
        blocks = data.calibration_blocks(name, models.tokenizer(model), samples, **drawn)
    work = Path(task["artefact"]).with_suffix(".work")
    parent = (lambda: method.read(model.folder)) if before else None
    extras = {"parent": parent, "work": work}
    baseline = memory.reset_peak()
    network = stage.read(before / "model" if before else model.folder)

    wall, cpu = time.perf_counter(), time.process_time()
    ids = blocks.ids if blocks else None
    asked = {name: extras[name] for name in stage.extras}
    compressed = stage.compress(network, ids, reporter(box, "block"), **asked)
    cost: dict[str, Any] = {
        "compress_s": time.perf_counter() - wall,
        "compress_cpu_s": time.process_time() - cpu,
    }
    made = box / "artefact"
    folder = made / "model"
    folder.mkdir(parents=True)
    start = time.perf_counter()
    stage.save(compressed, folder)
    cost |= {
        "save_s": time.perf_counter() - start,
        "compress_peak_rss_bytes": memory.peak_bytes() - baseline,
        "compress_baseline_rss_bytes": baseline,
    }
    if before:
        cost = of_all_stages(json.loads((before / "cost.json").read_text("utf-8")), cost)
    used = {"calibration": facts(blocks)} if blocks else {}
    write(made / "job.json", task["job"])
    write(made / "cost.json", {"values": cost, "blocks": used, "files": sizes(folder)})
    put_in_place(made, Path(task["artefact"]))
    shutil.rmtree(work, ignore_errors=True)


def of_all_stages(before: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """The cost of a pipeline: times add up, the largest peak counts. `stages` has each one's own.

    before: cost.json of what the last stage went on from.
    """
    values = before["values"]
    own = {name: value for name, value in values.items() if name != "stages"}
    stages = [*values.get("stages", [own]), dict(last)]
    stages[-2] = stages[-2] | {"size_bytes": sum(before["files"].values())}
    times = ("compress_s", "compress_cpu_s", "save_s")
    total = {name: values[name] + last[name] for name in times}
    peak = max(values, last, key=lambda each: each["compress_peak_rss_bytes"])
    memory_of = ("compress_peak_rss_bytes", "compress_baseline_rss_bytes")
    return total | {name: peak[name] for name in memory_of} | {"stages": stages}


def measure(box: Path, job: Job, task: dict[str, Any]) -> None:
    """Write measured.json: the values of all metrics, and what they were measured on.

    load_s is the time until the artefact has answered once: files that are mapped into memory
    are read, and weights are packed, by the first tokens only.
    """
    check_data(job)
    method = registry.get(job.method, **job.settings)
    model = models.Model(job.model, Path(task["folder"]), job.revision)
    protocol = job.protocol
    tokenizer = models.tokenizer(model)
    blocks = data.evaluation_blocks(job.data, tokenizer, protocol["window"], protocol["limit"])
    folder = Path(task["artefact"]) / "model"

    baseline = memory.reset_peak()
    start = time.perf_counter()
    runner = method.load(folder)
    logits, cache = runner.prefill(blocks.ids[:1, :1])
    runner.decode(logits.argmax(-1, keepdim=True), cache)
    load_s = time.perf_counter() - start
    subject = Subject(
        runner=runner,
        artefact=folder,
        blocks=blocks,
        prompt_tokens=protocol["prompt_tokens"],
        new_tokens=protocol["new_tokens"],
        made_from=model.folder if method.foreign else None,
    )
    values: dict[str, Any] = {"load_s": load_s}
    for name in job.metrics:
        values |= finite(name, METRICS[name](subject, reporter(box, name)))
    values["measure_peak_rss_bytes"] = memory.peak_bytes() - baseline
    measured = {
        "values": values,
        "blocks": {"evaluation": facts(blocks)},
        "packages": packages((*LIBRARIES, *method.libraries)),
        "lineage": models.lineage(model),
    }
    write(box / "measured.json", measured)


def check_data(job: Job) -> None:
    """Raises ValueError if a text is no longer the one that the job's key speaks of."""
    texts = [(job.data, job.data_sha)]
    if job.calibration:
        texts.append((job.calibration["data"], job.calibration["sha"]))
    for name, sha in texts:
        if data.fingerprint(name) != sha:
            raise ValueError(f"data {name!r} changed during the run; run again")


def finite(metric: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, unless one is NaN or infinite: that is a broken method, not one that ranks last."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{metric}: {name} is NaN or infinite")
    return values


def reporter(box: Path, unit: str) -> Any:
    """A progress function that leaves "unit done total" where the launcher looks for it."""

    def report(done: int, total: int) -> None:
        (box / "progress").write_text(f"{unit} {done} {total}")

    return report


def facts(blocks: data.Blocks) -> dict[str, Any]:
    """What a record keeps about the tokens that were used."""
    count, length = blocks.ids.shape
    return {
        "data": blocks.data,
        "split": blocks.split,
        "sha256": blocks.sha256,
        "tokens": blocks.tokens,
        "count": count,
        "length": length,
    }


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by relative path."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def put_in_place(made: Path, place: Path) -> None:
    """Rename `made` to `place`, both on one file system: whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Something broken may lie there, or the equal result of another run: ours is as good.
    old = made.with_name("replaced")
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(made, place)
    except OSError:
        if not place.exists():  # else another run has just put the equal result there
            raise
    shutil.rmtree(old, ignore_errors=True)


def write(file: Path, value: Any) -> None:
    """JSON without NaN or infinity: those are failures, not results."""
    file.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
