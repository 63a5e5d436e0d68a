"""Prefill and decoding of compressed models, in turns: one round of each row, then the next round.

    python tests/benchmarks/decode_speed.py --model smollm2-135m --rounds 7 \\
        --methods 'none,cast,int8_sym,dynamic,smoothquant,gptq,gptq(head_bits=4)'

Every row is a process of its own, which waits while another one works, so that a slow minute of the
machine falls on all of them and peak memory is each one's own. The artefacts are made first, by
`bench compress`. The first row, `transformers`, is the bfloat16 parent in transformers' own eager
loop: ratios are to it, taken within rounds; brackets hold a 95 % bootstrap interval of the median.
Prompt and generated tokens are those of the bench's latency metric, batch 1.

Rows of other libraries (`llama_cpp:q4_0`) need their environment: `python -m baselines setup`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy
import torch

PARENT = "transformers"
ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="cast,int8_sym,dynamic,gptq,gptq(head_bits=4)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--artefacts", type=Path, help="keep the compressed models; reuse them")
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(*options.worker, options)
    from bench import models
    from compress.registry import split_outside_brackets

    parent = models.resolve(options.model).folder
    with tempfile.TemporaryDirectory() as scratch:
        rows = {PARENT: start(PARENT, parent, options)}
        for method in split_outside_brackets(options.methods):
            name = quote(f"{options.model} {method}", safe="")
            folder = (options.artefacts or Path(scratch)) / name
            if not folder.exists():
                command = [sys.executable, "-m", "bench", "compress", method, str(folder)]
                subprocess.run([*command, "--model", options.model], check=True, cwd=ROOT)
            rows[method] = start(method, folder, options)
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
        for turn in range(options.rounds + 1):  # the first warms up
            for name, process in rows.items():
                found = ask(process)
                if turn:
                    samples[name].append(found)
            print(f"round {turn} of {options.rounds}", file=sys.stderr)
            if turn:
                show(samples)  # after every round: nothing is lost if it is stopped
        for process in rows.values():
            process.stdin.close()
            process.wait()


def start(method: str, folder: Path, options: argparse.Namespace) -> Any:
    """The process of one row, loaded and waiting."""
    from bench import environments
    from bench.run import METHOD_PACKAGES
    from compress import registry

    registry.discover(*METHOD_PACKAGES)
    env = None if method == PARENT else registry.get(registry.parse(method)[0]).env
    python = environments.Environment(env).python if env else sys.executable
    arguments = [f"--{name}={getattr(options, name)}" for name in ("prompt", "new", "threads")]
    process = subprocess.Popen(
        [str(python), __file__, *arguments, "--worker", method, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    ask(process)
    return process


def ask(process: Any) -> dict[str, Any]:
    """Have a row work once."""
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a row's process has ended; its error is above")
    return json.loads(line)


def work(method: str, folder: str, options: argparse.Namespace) -> None:
    """The other side: load at the first line, then measure once a line."""
    from bench import memory
    from bench.run import METHOD_PACKAGES
    from compress import registry

    torch.set_num_threads(options.threads)
    registry.discover(*METHOD_PACKAGES)
    name, settings = ("none", {}) if method == PARENT else registry.parse(method)
    ids = torch.randint(0, 200, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    runner: Any = None
    baseline = memory.reset_peak()
    for _ in sys.stdin:
        found: dict[str, Any] = {}
        if runner is None:
            model = Path(folder)
            runner = (
                Eager(model) if method == PARENT else registry.get(name, **settings).load(model)
            )
        else:
            begin = time.perf_counter()
            logits, cache = runner.prefill(ids)
            middle = time.perf_counter()
            for _ in range(options.new):
                logits = runner.decode(logits.argmax(-1, keepdim=True), cache)
            found = {
                "prefill_ms": (middle - begin) * 1000,
                "decode_tokens_per_s": options.new / (time.perf_counter() - middle),
                "peak_mb": (memory.peak_bytes() - baseline) / 1e6,
                "few": runner.kernels(1),
                "many": runner.kernels(options.prompt),
            }
        print(json.dumps(found), flush=True)


class Eager:
    """The bfloat16 parent as transformers runs it."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = model.eval()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

    def kernels(self, rows: int) -> list[str]:
        return ["transformers eager bfloat16"]


def show(samples: dict[str, list[dict[str, Any]]]) -> None:
    """The table."""
    print("| row | prefill ms | x | decode tok/s | x | peak MB | few rows | many rows |")
    print("|---|---|---|---|---|---|---|---|")
    base = samples[PARENT]
    for name, found in samples.items():
        prefill = [each["prefill_ms"] for each in found]
        decode = [each["decode_tokens_per_s"] for each in found]
        faster = [b["prefill_ms"] / ms for b, ms in zip(base, prefill, strict=True)]
        more = [rate / b["decode_tokens_per_s"] for b, rate in zip(base, decode, strict=True)]
        last = found[-1]
        print(
            f"| {name} | {numpy.median(prefill):.0f} | {interval(faster)} "
            f"| {numpy.median(decode):.1f} | {interval(more)} | {last['peak_mb']:.0f} "
            f"| {', '.join(last['few'])} | {', '.join(last['many'])} |"
        )


def interval(values: list[float]) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = numpy.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = numpy.percentile(numpy.median(draws, axis=1), [2.5, 97.5])
    return f"{numpy.median(values):.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
