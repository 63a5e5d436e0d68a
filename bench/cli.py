"""`python -m bench`: run, compress, export, list, leaderboard, show, doctor.

Exit codes: 0 fine; 1 something found is unusable, or a method failed; 2 the command line names
or sets something that cannot be. Errors are one line; `--debug` adds the traceback.
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.command_line import Debug, new_app, run_app
from bench.errors import UsageError
from bench.terminal import draw, err, line_of, out, watching
from results import store

app = new_app("Make language models smaller, measure what was saved, and rank the results.")
Results = Annotated[Path, typer.Option("--results", help="Folder of records.", metavar="DIR")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens in a calibration sample.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random draw.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with.", show_default="all cores")
]
Timeout = Annotated[
    float, typer.Option("--timeout-s", min=0, help="Seconds that one job may take.")
]
DEFAULT_RESULTS = Path("results")
MODEL = "smollm2-135m"

RUN_EXAMPLES = """
[bold]Examples[/bold]

python -m bench run --methods gptq,awq

python -m bench run --methods 'gptq,gptq(bits=3),rtn(bits=4,group_size=32)'

python -m bench run --methods 'prune_structured(ratio=0.2)+recover(steps=200)+gptq(bits=4)'

python -m bench run --model gpt2 --data wikitext2 --methods gptq --set gptq.bits=3

python -m bench run --model tiny-llama --data my.txt --window 256 --limit 8 --threads 1

python -m bench run --methods 'rtn,file:theirs/model.Q4_0.gguf,file:theirs-awq/'
"""
EXPORT_EXAMPLES = """
[bold]Examples[/bold]

python -m bench run --methods 'gptq(group_size=32)'

python -m bench export 3f2a --format gguf --out small-gguf

Exit code 1: a check failed; the folder stays, and export.json says which.
"""


@app.command(epilog=RUN_EXAMPLES)
def run(
    model: Annotated[
        str,
        typer.Option(
            "--model", "--models", help="Alias, hub id, folder or GGUF file; several with commas."
        ),
    ] = MODEL,
    methods: Annotated[
        str, typer.Option(help="name or name(setting=value,...), parted by commas; see `list`.")
    ] = "gptq,awq",
    data: Annotated[
        str, typer.Option(help="Text to measure on: an alias or a .txt, .jsonl, .jsonl.gz file.")
    ] = "sample",
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on.", show_default="same as --data")
    ] = None,
    samples: Samples = 64,
    length: Length = 512,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens in an evaluation window.",
            show_default="1024, or what the model reads",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N windows.", show_default="all")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.SETTING=VALUE", help="A setting; may be repeated."),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="Pipelines in every order of stages that makes sense.")
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics, parted by commas.", show_default="all")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    timeout_s: Timeout = 3600.0,
    results: Results = DEFAULT_RESULTS,
    debug: Debug = False,
) -> None:
    """Compress a model with each method, measure what was saved, keep a record of each.

    Each job runs in processes of its own. A failing method becomes a failed record and the others
    go on. Ctrl-C leaves what is finished, and running again does only what is missing.
    """
    from bench import run as bench_run
    from bench.leaderboard import groups, row, table

    request = bench_run.Request(
        data=data,
        methods=methods,
        overrides=tuple(overrides or ()),
        calibration=calibration,
        samples=samples,
        length=length,
        window=window,
        limit=limit,
        metrics=metrics,
        seed=seed,
        threads=threads,
        timeout_s=timeout_s,
        permute=permute,
    )
    names = [name.strip() for name in model.split(",") if name.strip()]
    if not names:
        raise UsageError("--model names no model; see: python -m bench list")
    plans = [bench_run.plan(replace(request, model=name)) for name in names]
    for reason in bench_run.left_out(request):
        err.print(f"left out: {reason}", markup=False)
    done: list[store.Record] = []
    try:
        with watching() as (watch, say):
            for tasks in plans:
                if len(plans) > 1:
                    say(tasks[0].job.model)
                for record, was_cached in bench_run.run(tasks, results, watch):
                    done.append(record)
                    say(line_of(row(record), was_cached))
    except KeyboardInterrupt:
        write_leaderboard(results)
        total = sum(map(len, plans))
        err.print(f"stopped; {len(done)} of {total} jobs are finished: run again to go on")
        raise typer.Exit(130) from None
    for group in groups(done):
        if len(plans) > 1:
            out.print(f"\n{group[0]['job']['model']}", markup=False, end="")
        draw(table(group))
    write_leaderboard(results)
    if any(record["status"] != "ok" for record in done):
        raise typer.Exit(1)


@app.command()
def compress(
    method: Annotated[str, typer.Argument(help="name or name(setting=value,...); see `list`.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")],
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF file.")] = MODEL,
    calibration: Annotated[str, typer.Option(help="Text to calibrate on.")] = "sample",
    samples: Samples = 64,
    length: Length = 512,
    seed: Seed = 0,
    threads: Threads = None,
    timeout_s: Timeout = 3600.0,
    debug: Debug = False,
) -> None:
    """Compress a model with one method into a folder, its tokenizer and its lineage included.

    The weights are those that `run` makes and measures with the same settings and threads, and come
    from the cache if they are there. What holds plain matrices in blocks of one shape (`none`,
    `cast`, `rotate`, `prune_depth`, `recover`, ...) transformers reads too; the rest is read by
    `compress.load`, `bench` and `finetune`.
    """
    from bench.compress_folder import compress_folder
    from bench.run import Request

    request = Request(
        model=model,
        methods=method,
        data=calibration,
        samples=samples,
        length=length,
        seed=seed,
        threads=threads,
        timeout_s=timeout_s,
    )
    with watching() as (watch, _):
        size = compress_folder(request, folder, watch(method))
    out.print(f"{folder}: {size / 1e6:.1f} MB", markup=False)


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    key: Annotated[str, typer.Argument(help="Key of a record, or its first digits.")],
    form: Annotated[str, typer.Option("--format", help="A format; see `list`.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to make.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option(help="The record's model, where its name is that of a folder.")
    ] = None,
    timeout_s: Timeout = 600.0,
    results: Results = DEFAULT_RESULTS,
    debug: Debug = False,
) -> None:
    """Write what a record measured in another runtime's format, and check what was written.

    It is read again in a fresh process, weights and logits compared, and once more in the runtime
    itself where its environment is set up. DIR/export.json keeps checksums, figures and verdicts.
    """
    from bench.export import export as write
    from bench.export import lines

    report = write(store.find(existing(results), key), form, folder, model, timeout_s)
    for line in lines(report, folder):
        out.print(line, markup=False)
    if not report["verified"]:
        raise typer.Exit(1)


@app.command("list")
def list_all(debug: Debug = False) -> None:
    """Methods with their settings, models, data, metrics and formats, each in a line."""
    from bench.catalogue import lines

    for line in lines():
        out.print(line, markup=False)


@app.command()
def leaderboard(
    form: Annotated[str, typer.Option("--format", help="md, csv or json.")] = "md",
    results: Results = DEFAULT_RESULTS,
    debug: Debug = False,
) -> None:
    """Print one row a record; md is also written to LEADERBOARD.md in the folder of records."""
    from bench import leaderboard as board
    from bench.run import METHOD_PACKAGES
    from compress import registry

    if form not in ("md", "csv", "json"):
        raise UsageError(f"no format {form!r}; known: md, csv, json")
    registry.discover(*METHOD_PACKAGES)
    if form == "md":
        sys.stdout.write(write_leaderboard(results))
        return
    records = store.load_all(existing(results))
    sys.stdout.write(board.to_csv(records) if form == "csv" else board.to_json(records))


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="Key of a record, or its first digits.")],
    results: Results = DEFAULT_RESULTS,
    debug: Debug = False,
) -> None:
    """Print one record whole: raw values, protocol, versions, machine, commit."""
    record = store.find(existing(results), key)
    sys.stdout.write(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@app.command()
def doctor(debug: Debug = False) -> None:
    """What is installed, what the machine has, which models are here, what a run would need."""
    from bench.doctor import report

    for line in report():
        out.print(line, markup=False)


def write_leaderboard(results: Path) -> str:
    """Render LEADERBOARD.md in `results` and return its text."""
    from bench.leaderboard import to_markdown

    text = to_markdown(store.load_all(existing(results)))
    file = results / "LEADERBOARD.md"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        store.write_atomically(file, text)
    return text


def existing(results: Path) -> Path:
    """`results` if it is a folder. Raises UsageError."""
    if not results.is_dir():
        raise UsageError(f"no folder of records at {results}; `run` makes one, --results names one")
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run one command; ends the process with the exit code said above."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bench").setLevel(logging.INFO)
    run_app(app, "python -m bench", arguments)
