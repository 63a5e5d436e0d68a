"""Damage exported files at random and read them, as many times as you like.

    python tests/benchmarks/fuzz_readers.py gptq --count 20000

Raises at the first damage that is neither read nor refused with a ValueError of one line.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import compress
from bench import models
from compress import checkpoint
from compress.export import formats

sys.path.insert(0, str(Path(__file__).parent.parent / "compress"))
from fuzzing import fuzz, mutate
from fuzzing_gguf import mutated

METHOD = "rtn(group_size=32)"


def main() -> None:
    """Export a tiny Llama in the format named, then damage it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=formats())
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default=METHOD, help="how the model is compressed")
    chosen = parser.parse_args()
    source = models.resolve("tiny-llama").folder
    model = checkpoint.load(source)
    with tempfile.TemporaryDirectory() as box:
        path = Path(box) / "model"
        compress.export(compress.apply(chosen.method, model), path, chosen.format, source)
        damage = mutated if chosen.format == "gguf" else mutate  # headers of its own
        start = time.perf_counter()
        seen, grown = fuzz(path, formats()[chosen.format].read, chosen.count, chosen.seed, damage)
        took = time.perf_counter() - start
    print(f"{chosen.format}: {dict(seen)} in {took:.0f} s, peak memory grew {grown / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
