"""Perplexity of artefacts, and of their exports read back: the same codes, the same number.

    python tests/benchmarks/import_perplexity.py --data wikitext2 --windows 8 --file theirs.gguf

Compresses the model by each method, exports, reads the export again, and scores both on the same
windows, in float32: an artefact computes in the type it was saved in, its export in that of the
format. --file: a GGUF of the model itself, scored beside the model in the types that they are read
in. Prints one row each.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import compress
from bench import data, models
from bench.metrics.perplexity import block_nll
from compress import checkpoint, registry
from compress.export import read

CASES = (  # method, format
    ("rtn(bits=8,group_size=32,symmetric=true,dtype=float16)", "gguf"),
    ("gptq(group_size=32)", "gptq"),
    ("gptq(group_size=32,static_groups=false)", "gptq"),
    ("gptq(group_size=32)", "awq"),
    ("gptq(group_size=32)", "compressed-tensors"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16, help="for calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, help="a GGUF of the model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parent = models.resolve(options.model)
    tokenizer = models.tokenizer(parent)
    ids = data.evaluation_blocks(options.data, tokenizer, options.window, options.windows).ids
    print("| method | format | perplexity | read back | relative difference |", flush=True)
    print("|---|---|---|---|---|", flush=True)

    def show(method: str, format: str, one: Any, other: Any) -> None:
        sums = [sum(block_nll(compress.TorchRunner(each), ids)) for each in (one, other)]
        scored = ids.shape[0] * (ids.shape[1] - 1)
        first, second = (math.exp(nll / scored) for nll in sums)
        apart = abs(second / first - 1)
        print(f"| {method} | {format} | {first:.8f} | {second:.8f} | {apart:.1e} |", flush=True)

    if options.file:
        show(parent.alias, options.file.name, checkpoint.load(parent.folder), read(options.file))
    calibration = data.calibration_blocks(options.data, tokenizer, options.samples, 512, 0).ids
    for method, format in CASES:
        made = compress.apply(method, checkpoint.load(parent.folder), calibration)
        with tempfile.TemporaryDirectory() as box:
            compress.export(made, Path(box) / "model", format, tokenizer=parent.folder)
            show(method, format, made.float(), read(Path(box) / "model").float())


if __name__ == "__main__":
    from bench.run import METHOD_PACKAGES

    registry.discover(*METHOD_PACKAGES)
    main()
