"""From what a person asked for to jobs, and from jobs to records: what `bench run` does.

`plan` checks every name and value before any process starts. `run` then does what is missing,
one job after the other; a job that fails leaves a record and the others go on.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import data, environments, models
from bench.chosen import GROUPS, chosen_methods, permuted, staged
from bench.errors import UsageError
from bench.job import Job
from bench.launch import ROOT, Report, Task, launch, start_server
from bench.machine import cores, machine, packages
from bench.metrics import METRICS
from bench.source_hash import source_hash
from compress import checkpoint, model_files, registry
from compress.base import Compressor
from results import store

METHOD_PACKAGES = tuple(GROUPS.values())
KERNEL_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")  # can change a number
PROMPT_TOKENS, NEW_TOKENS = 512, 64  # what latency is measured with
WINDOW = 1024  # tokens


@dataclass(frozen=True)
class Request:
    """What the command line says, before anything is looked up."""

    model: str = "smollm2-135m"
    data: str = "sample"
    methods: str = "gptq,awq"
    overrides: tuple[str, ...] = ()  # "gptq.bits=3"
    calibration: str | None = None  # data; None: the same as `data`
    samples: int = 64
    length: int = 512
    window: int | None = None  # None: WINDOW, or less if the model reads less
    limit: int | None = None  # windows; None: all
    metrics: str | None = None  # comma separated; None: all
    seed: int = 0
    threads: int | None = None  # None: every core
    timeout_s: float = 3600.0
    permute: bool = False  # pipelines in every order that fits


def plan(request: Request) -> list[Task]:
    """The tasks that answer `request`, the parent first, each once; stages before what needs them.

    Raises UnknownName, UnknownModel, UnknownData or UsageError for what the request gets wrong,
    ValueError for a model that is found and unusable.
    """
    registry.discover(*METHOD_PACKAGES)
    compressors = chosen_methods(request.methods, request.overrides)
    if request.permute:
        compressors = permuted(compressors)[0]
    metrics = chosen_metrics(request.metrics)
    calibration = request.calibration or request.data
    shas = {name: data.fingerprint(name) for name in (request.data, calibration)}
    model = models.resolve(request.model)
    context = context_of(model)
    protocol = protocol_for(model.alias, context, request)
    tasks: dict[str, Task] = {}
    compressed = bool(checkpoint.layer_specs(model.folder))
    before: Task | None = None
    for name, method, goes_on in staged(compressors):
        if method.env and compressed:
            raise UsageError(f"{model.alias} is compressed already, in a format {name} cannot read")
        drawn = None
        if method.needs_calibration:
            refuse_beyond(model.alias, context, "--length", request.length)
            drawn = {
                "data": calibration,
                "sha": shas[calibration],
                "samples": request.samples,
                "length": request.length,
                "seed": request.seed,
            }
        job = Job(
            model=model.alias,
            revision=model.revision,
            data=request.data,
            data_sha=shas[request.data],
            calibration=drawn,
            method=name,
            settings=asdict(method),
            protocol=protocol,
            metrics=metrics_of(name, method, metrics),
            seed=request.seed,
            threads=request.threads or cores(),
            device="cpu",
            environment=environment(method.env),
            code=code_of(method),
        )
        before = before if goes_on else None
        before = Task(job, model.folder, method.env, METHOD_PACKAGES, request.timeout_s, before)
        tasks.setdefault(job.key(), before)
    return list(tasks.values())


def left_out(request: Request) -> list[str]:
    """The orders of stages that `--permute` cannot try, each with the reason."""
    if not request.permute:
        return []
    return permuted(chosen_methods(request.methods, request.overrides))[1]


def cached(task: Task, results: Path) -> store.Record | None:
    """The record of `task` on this machine, if it is there and ok."""
    job = task.job
    file = store.path(results, machine()["name"], job.model, job.method, job.key())
    record = store.load(file)
    return record if record and record["status"] == "ok" else None


def run(
    tasks: list[Task], results: Path, watch: Callable[[str], Report]
) -> Iterator[tuple[store.Record, bool]]:
    """Do what is missing; yields (record, whether it was cached) as each job is finished.

    watch: makes the progress function of a job, given its title. Raises ValueError before the
    first job if the data cannot be cut into blocks, OSError if a record cannot be written.
    """
    store.prepare(results)
    missing = [task for task in tasks if cached(task, results) is None]
    if missing:
        start_server()  # it takes seconds to get ready, as check_blocks does
        check_blocks(missing)
    for task in tasks:
        if record := cached(task, results):
            yield record, True
            continue
        title = registry.describe(task.job.method, task.job.settings)
        record = launch(task, watch(title))
        store.save(record, results)
        yield record, False


def check_blocks(tasks: list[Task]) -> None:
    """Cut the blocks once, here: a text that is too short fails once, not once a method."""
    first = tasks[0].job
    tokenizer = models.tokenizer(models.Model(first.model, tasks[0].folder, first.revision))
    protocol = first.protocol
    blocks = data.evaluation_blocks(first.data, tokenizer, protocol["window"], protocol["limit"])
    if "latency" in first.metrics and blocks.ids.numel() < protocol["prompt_tokens"]:
        raise ValueError(
            f"data {first.data!r} holds {blocks.ids.numel()} tokens in whole windows, fewer than "
            f"the prompt of {protocol['prompt_tokens']} of latency; use a longer text or --metrics"
        )
    drawn = next((task.job.calibration for task in tasks if task.job.calibration), None)
    if drawn:
        data.check_disjoint(first.data, drawn["data"])
        data.calibration_blocks(
            drawn["data"], tokenizer, drawn["samples"], drawn["length"], drawn["seed"]
        )


def metrics_of(name: str, method: Compressor, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `metrics` that mean something for `method`. Raises UsageError if none is left."""
    kept = tuple(metric for metric in metrics if method.timed or metric != "latency")
    if not kept:
        raise UsageError(f"{name} runs on rebuilt weights here and is not timed; add a metric")
    return kept


def chosen_metrics(text: str | None) -> tuple[str, ...]:
    """Metric names in the order of the METRICS table; None means all."""
    if text is None:
        return tuple(METRICS)
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in METRICS:
            raise UsageError(f"no metric {name!r}; {registry.did_you_mean(name, METRICS)}")
    if not wanted:
        raise UsageError(f"no metric in {text!r}; known: {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in wanted)


def protocol_for(alias: str, context: int, request: Request) -> dict[str, Any]:
    """How to measure, within the model's context length. Raises UsageError beyond it."""
    window = request.window or min(WINDOW, context)
    refuse_beyond(alias, context, "--window", window)
    read = window * request.limit if request.limit else sys.maxsize
    prompt = min(PROMPT_TOKENS, context - NEW_TOKENS, read)
    if prompt < 1:
        raise UsageError(f"{alias} reads {context} tokens: too few for latency; see --metrics")
    return {
        "window": window,
        "stride": window,
        "bos": False,
        "limit": request.limit,
        "prompt_tokens": prompt,
        "new_tokens": NEW_TOKENS,
    }


def context_of(model: models.Model) -> int:
    """Tokens that the model reads at once."""
    config = model_files.read_json(model.folder / "config.json")
    return config.get("max_position_embeddings") or config.get("n_positions") or sys.maxsize


def refuse_beyond(alias: str, context: int, option: str, tokens: int) -> None:
    """Raises UsageError if the model cannot read so many tokens."""
    if tokens > context:
        raise UsageError(f"{option} {tokens}: {alias} reads at most {context} tokens")


def environment(env: str | None) -> str:
    """The libraries a method runs under, as text that changes when one of them does."""
    if env is None:
        return " ".join(f"{name}-{found}" for name, found in packages(KERNEL_LIBRARIES).items())
    return f"{env}-{environments.Environment(env).identity()}"


def code_of(method: Compressor) -> dict[str, str]:
    """Hashes of the source that makes the artefact of `method`, and that measures it."""
    own = sorted({file for stage in method.in_stages() for file in sources(stage)})
    bench = ROOT / "bench"
    made_by = [*own, bench / "models.py", bench / "data.py"]
    return {
        "compress": source_hash(made_by, alone=[bench / "worker.py", bench / "memory.py"]),
        "measure": source_hash([*own, bench / "worker.py"]),
    }


def sources(method: Compressor) -> list[Path]:
    """The file of `method`; and those of the formats, which no import names, if it reads them."""
    reads = not method.takes
    formats = sorted((ROOT / "compress" / "export").glob("*.py")) if reads else []
    return [Path(str(sys.modules[type(method).__module__].__file__)), *formats]
