"""Every format in its own runtime: which exports of which models load there and answer alike.

    python tests/benchmarks/export_table.py --models tiny-gpt2,tiny-llama,smollm2-135m

Compresses each model by each method, exports by `bench export`, and prints one row an export: what
our own reader and what the other runtime found. Numbers of a cell are the largest difference of
logits, in standard deviations of the artefact's, and how many of the greedy tokens are equal
before the first that is not. A runtime needs its environment: `python -m baselines setup`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compress import registry
from results import store

ROOT = Path(__file__).parent.parent.parent
METHODS = {  # what each format can hold
    "gptq": (
        "rtn(group_size=32)",
        "rtn(group_size=32,symmetric=true)",
        "gptq(group_size=32,static_groups=false)",
    ),
    "awq": ("rtn(group_size=32)", "awq(group_size=32)"),
    "compressed-tensors": (
        "rtn(group_size=32)",
        "rtn(group_size=32,symmetric=true)",
        "int8_sym",
        "dynamic",
    ),
    "gguf": (
        "cast(dtype=float16)",
        "rtn(bits=8,group_size=32,symmetric=true)",
        "rtn(group_size=32,symmetric=true)",
        "rtn(group_size=32)",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="tiny-gpt2,tiny-llama,smollm2-135m")
    parser.add_argument("--formats", default=",".join(METHODS))
    options = parser.parse_args()
    print("| model | method | format | bits/weight | our reader | runtime | there |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models.split(","):
            for format in options.formats.split(","):
                for method in METHODS[format]:
                    results = Path(scratch) / store.slug(f"{model} {method}")
                    key = record_of(results, model, method)["key"]
                    out = Path(scratch) / f"{model} {method} {format}"
                    error = bench("export", key, "--format", format, "--out", str(out),
                                  "--results", str(results))  # fmt: skip
                    print(row(model, method, format, out / "export.json", error), flush=True)


def bench(*arguments: str) -> str:
    """Run a command of the bench; the last line that it says on stderr."""
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or [""])[-1]


def record_of(results: Path, model: str, method: str) -> store.Record:
    """Compress, and measure no more than the size; into a folder of its own."""
    if not results.exists():
        bench("run", "--model", model, "--methods", method, "--metrics", "size",
              "--results", str(results))  # fmt: skip
    name = registry.parse(method)[0]
    found = [each for each in store.load_all(results) if each["job"]["method"] == name]
    if not found:
        raise SystemExit(f"no record of {method} on {model}")
    return found[0]


def row(model: str, method: str, format: str, report: Path, error: str) -> str:
    """One line of the table."""
    if not report.is_file():
        return f"| {model} | {method} | {format} | | refused: {error} | | |"
    found = json.loads(report.read_text())
    checks = found["checks"] + [{"runtime": "", "verdict": ""}]
    bits = f"{found['bits_per_weight']:.2f}"
    cells = [cell(checks[0]), str(checks[1]["runtime"]), cell(checks[1])]
    return f"| {model} | {method} | {format} | {bits} | {' | '.join(cells)} |"


def cell(check: dict[str, Any]) -> str:
    """yes, no or the verdict, with numbers or the reason."""
    verdict = {"passed": "yes", "differs": "no", "failed": "no"}
    words = verdict.get(check["verdict"], check["verdict"])
    if "logits" in check:
        greedy = check["greedy"]
        equal = greedy["tokens"] if greedy["part_at"] is None else greedy["part_at"]
        words += f", {check['logits']['apart']:.2g}, {equal} of {greedy['tokens']}"
    return f"{words}: {check['reason']}" if "reason" in check else words


if __name__ == "__main__":
    from bench.run import METHOD_PACKAGES

    registry.discover(*METHOD_PACKAGES)
    main()
