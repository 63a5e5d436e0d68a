"""An artefact in the format of another runtime, verified on what was written: `bench export`.

The export is loaded in fresh processes: by our reader, beside the artefact itself, and in a second
runtime, in its own environment, where that is set up. Weights have to be equal. Logits are compared
on the first tokens of the record's evaluation text with the artefact's in float32; how far apart
they may be is said in units of the standard deviation of the artefact's logits. Greedy tokens are
told and decide nothing: two runtimes may part where two tokens are about as likely.
"""

import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench import data, environments, models, run
from bench.box import new_box
from bench.embedded import sha256_of
from bench.errors import UsageError
from bench.launch import ROOT, artefact_folder, cost_of, impersonal
from bench.metrics.size import foreign
from compress import registry
from compress.export import export as write_format
from compress.export import formats
from results import store

log = logging.getLogger(__name__)
TOKENS = 64  # that are read, and as many that are generated
OURS = "slimbench"
OUR_TOLERANCE = 1e-4  # the same float32 sums, perhaps in another order
REPORT = "export.json"
FAILED = ("differs", "failed")  # verdicts; what could not be asked is no failure, but it is said
UNSUPPORTED = re.compile(r"not (yet )?(supported|implemented)|unsupported|NotImplemented", re.I)


@dataclass(frozen=True)
class Runtime:
    """Another program that runs a format.

    adapter: the peer's method whose `load` opens it. tolerance: of the logits; why: what it allows.
    """

    adapter: str
    tolerance: float
    why: str


# Of 4-bit gpt2-mini, smollm2-135m and the random tiny-llama. Rounding: bfloat16 0.03, 0.13
# and 0.16, llama.cpp 0.03, 0.18 and 0.23. Mistakes: rows of one layer off by one 0.8, 1.5 and 1.9;
# zeros one too high everywhere 0.28, which would pass in llama.cpp, 7.2 and 5.6. Where inputs of
# products become int8, a bfloat16 that rounds the other way moves a code: in our own layers too,
# which are up to 0.27 from themselves in float32 on tiny-llama.
INT8_INPUTS = 0.4, "inputs of products with codes are rounded to int8"
RUNTIMES = {
    "compressed-tensors": Runtime("llmcompressor:gptq", 0.25, "it computes in 16 bits"),
    "gptq": Runtime("gptqmodel:gptq", 0.25, "it computes in 16 bits"),
    "awq": Runtime("gptqmodel:awq", 0.25, "it computes in 16 bits"),
    "gguf": Runtime("llama_cpp:f16", *INT8_INPUTS),
}


class NoAnswer(Exception):
    """A process ended without answers; the message is its reason, in one line."""


def export(
    record: store.Record, format: str, out: Path, name: str | None, timeout_s: float
) -> dict[str, Any]:
    """Write the artefact of `record` to the new folder `out` in `format`, check it, report.

    name: the record's model, where its alias is not enough. timeout_s: of each of the two checks.
    The report is in out/export.json too; its `verified` is False if a check failed, and the folder
    stays. Raises UnknownName or UsageError for what was typed wrong, ValueError for an artefact,
    model or text that is not there any more, or that the format cannot hold.
    """
    job = record["job"]
    registry.discover(*run.METHOD_PACKAGES)
    if format not in formats():
        raise registry.UnknownName(
            f"no format {format!r}; {registry.did_you_mean(format, formats())}"
        )
    if out.exists():
        raise UsageError(f"{out} is there already; choose a new folder")
    method = registry.get(job["method"], **job["settings"])
    if method.env:
        raise UsageError(f"{job['method']} writes its own library's format, which stays as it is")
    if method.leaves == "graph":
        raise UsageError(f"{job['method']} is a graph already; name a record of what came before")
    title = registry.describe(job["method"], asdict(method))
    artefact = artefact_folder(record["machine"]["name"], record["compress_key"])
    if record["status"] != "ok" or cost_of(artefact) is None:
        raise ValueError(
            f"the artefact of {record['key']} is not in the cache; make it again, and name the new "
            f"record: python -m bench run --model {job['model']} --methods '{title}'"
        )
    parent = parent_of(job, name)
    ids = first_tokens(job, parent)
    loaded: Any = method.load(artefact / "model")
    write_format(loaded.model, out, format, tokenizer=parent.folder)
    task = {
        "packages": run.METHOD_PACKAGES,
        "threads": job["threads"],
        "method": job["method"],
        "settings": job["settings"],
        "artefact": str(artefact / "model"),
        "folder": str(out.resolve()),
        "ids": ids,
    }
    checks = verify(format, task, timeout_s)
    files = sorted(file for file in out.rglob("*") if file.is_file())
    size = foreign(out, parent.folder)
    report = {
        "key": record["key"],
        "model": {"alias": parent.alias, "revision": parent.revision},
        "method": title,
        "format": format,
        "files": {
            file.relative_to(out).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
            }
            for file in files
        },
        **{part: size[part] for part in ("tensor_bytes", "weights", "bits_per_weight")},
        "text": {"data": job["data"], "sha": job["data_sha"], "tokens": len(ids)},
        "verified": all(check["verdict"] not in FAILED for check in checks),
        "checks": checks,
    }
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    store.write_atomically(out / REPORT, text + "\n")
    return report


def parent_of(job: dict[str, Any], name: str | None) -> models.Model:
    """The model of a record. Raises ValueError if there is another one under its name by now."""
    try:
        model = models.resolve(name or job["model"])
    except models.UnknownModel:
        if name:
            raise
        raise UsageError(f"the record's model is {job['model']!r}: name it by --model") from None
    if model.revision != job["revision"]:
        raise ValueError(
            f"{model.folder} is not the model of the record (revision {model.revision}, not "
            f"{job['revision']}); give it with --model"
        )
    return model


def first_tokens(job: dict[str, Any], model: models.Model) -> list[int]:
    """The first tokens of a record's evaluation text, as many as leave room for answers."""
    if data.fingerprint(job["data"]) != job["data_sha"]:
        raise ValueError(f"data {job['data']!r} is not the text of the record any more; run again")
    length = min(TOKENS, run.context_of(model) // 2)
    return data.evaluation_blocks(job["data"], models.tokenizer(model), length, 1).ids[0].tolist()


def verify(format: str, task: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """The checks of an export, ours first; see `judged` for what each says."""
    with new_box() as box:
        log.info("%s: read again in a fresh process", format)
        try:
            told = asked(None, box / "ours", task | {"adapter": None}, timeout_s)
        except NoAnswer as error:
            return [{"runtime": OURS, "verdict": "failed", "reason": str(error)}]
        found = load_file(box / "ours" / "answers.safetensors")
        original = {name: found[f"original.{name}"] for name in ("logits", "tokens")}
        ours = {"runtime": OURS, **told} | judged(original, found, OUR_TOLERANCE)
        if different := told["layers"]["different"]:
            ours |= {"verdict": "differs", "reason": f"the weights of {different[0]} differ"}
        theirs = second(
            format, task, original, box / "second", timeout_s, int8_inputs=told["int8_inputs"]
        )
        return [ours, theirs]


def second(
    format: str,
    task: dict[str, Any],
    original: dict[str, Tensor],
    box: Path,
    timeout_s: float,
    int8_inputs: bool = False,
) -> dict[str, Any]:
    """The check in another runtime. int8_inputs: the artefact's layers round theirs to int8.

    verdict: as in `judged`, or "not set up" (reason: how to), "not supported" (the runtime says so
    itself) or "failed" (any other error).
    """
    if format not in RUNTIMES:
        return {"runtime": None, "verdict": "not set up", "reason": f"none is known for {format}"}
    runtime = RUNTIMES[format]
    if int8_inputs:
        runtime = Runtime(runtime.adapter, *INT8_INPUTS)
    environment = str(registry.get(runtime.adapter).env)
    about = {"runtime": environment}
    try:
        python = environments.python_of(environment)
    except FileNotFoundError as missing:
        return about | {"verdict": "not set up", "reason": str(missing)}
    log.info("%s: loaded by %s", format, environment)
    try:
        told = asked(python, box, task | {"adapter": runtime.adapter}, timeout_s)
    except NoAnswer as error:
        verdict = "not supported" if UNSUPPORTED.search(str(error)) else "failed"
        return about | {"verdict": verdict, "reason": str(error)}
    found = load_file(box / "answers.safetensors")
    return about | told | judged(original, found, runtime.tolerance) | {"allows": runtime.why}


def asked(python: Path | None, box: Path, task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """What bench.answers tells of `task` in an environment; None: ours. Raises NoAnswer."""
    box.mkdir()
    (box / "task.json").write_text(json.dumps(task), encoding="utf-8")
    command = [str(python or sys.executable), "-m", "bench.answers", str(box)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}  # our packages and no others
    with (box / "log.txt").open("wb") as said:
        try:
            subprocess.run(
                command,
                cwd=box,  # some libraries leave logs where they run
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer after {timeout_s:g} s; see --timeout-s") from None
    if (box / "answers.json").is_file():
        return json.loads((box / "answers.json").read_text(encoding="utf-8"))
    if (box / "error.json").is_file():
        raise NoAnswer(impersonal(json.loads((box / "error.json").read_text(encoding="utf-8"))))
    lines = (box / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    raise NoAnswer(impersonal(next((line for line in reversed(lines) if line.strip()), "died")))


def judged(
    original: dict[str, Tensor], found: dict[str, Tensor], tolerance: float
) -> dict[str, Any]:
    """verdict: "passed" or "differs", by the logits; their distance; where greedy tokens part."""
    expected, logits = original["logits"], found["logits"]
    if logits.shape != expected.shape:
        shapes = f"{tuple(logits.shape)}, not {tuple(expected.shape)}"
        return {"verdict": "differs", "reason": f"logits of shape {shapes}"}
    deviation = expected.std().item()
    apart = (logits - expected).abs().max().item() / deviation
    if not math.isfinite(apart):
        return {"verdict": "differs", "reason": "logits hold NaN or infinity"}
    parted = torch.nonzero(original["tokens"] != found["tokens"]).flatten().tolist()
    verdict: dict[str, Any] = {"verdict": "passed" if apart <= tolerance else "differs"}
    if apart > tolerance:
        verdict["reason"] = f"logits are {apart:.2g} apart, more than {tolerance:g}"
    return verdict | {
        "logits": {"apart": apart, "tolerance": tolerance, "deviation": deviation},
        "greedy": {"tokens": len(original["tokens"]), "part_at": parted[0] if parted else None},
    }


def lines(report: dict[str, Any], out: Path) -> list[str]:
    """The report in a few lines for people."""
    total = sum(file["bytes"] for file in report["files"].values())
    made = f"{report['method']} of {report['model']['alias']} as {report['format']}"
    found = [f"{out}: {made}, {report['bits_per_weight']:.2f} bits/weight, {total / 1e6:.1f} MB"]
    for check in report["checks"]:
        parts = [f"{check['runtime']}: {check['verdict']}"]
        if "reason" in check:
            parts.append(check["reason"])
        if layers := check.get("layers"):
            equal = layers["count"] - len(layers["different"])
            codes = f"{layers['of_codes']} of them codes"
            parts.append(f"{equal} of {layers['count']} layers equal, {codes}")
        if "logits" in check:
            apart, tolerance = check["logits"]["apart"], check["logits"]["tolerance"]
            parts.append(f"logits {apart:.2g} deviations apart (tolerance {tolerance:g})")
            step = check["greedy"]["part_at"]
            tokens = f"{check['greedy']['tokens']} greedy tokens"
            parts.append(f"{tokens} equal" if step is None else f"{tokens} part at step {step}")
        found.append("; ".join(parts))
    return found
