"""Tokens a second of our pretraining loop beside a plain PyTorch loop: same model, same machine.

    python tests/benchmarks/pretrain_speed.py PREPARED [--rounds 5] [--layers 5 --width 256 ...]

The plain loop is what one writes by hand after nanoGPT: memory-mapped tokens, random windows, bf16
autocast, the whole logits, fused AdamW, clipped gradients. The two take turns, `rounds` times, so
that a machine whose speed drifts slows both; medians, and the median of the paired ratios.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from finetune.text.token_file import TokenFile
from finetune.training.batches import Windows
from finetune.training.loop import LoopSettings, fit, prepare_process
from finetune.training.new_model import Architecture, make
from finetune.training.parallel import Place


def plain(file: TokenFile, sizes: Architecture, vocabulary: int, rows: int, micro: int, steps: int):
    """Seconds for `steps` steps of a loop that does nothing clever."""
    torch.manual_seed(0)
    model = make(sizes, vocabulary, 0).train()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens, context = file.tokens, sizes.context
    began = time.perf_counter()
    for _ in range(steps):
        for _ in range(rows // micro):
            starts = torch.randint(len(tokens) - context - 1, (micro,)).tolist()
            window = np.stack([tokens[s : s + context + 1].astype(np.int64) for s in starts])
            ids = torch.from_numpy(window)
            x, y = ids[:, :-1], ids[:, 1:]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            (loss * micro / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def ours(file: TokenFile, sizes: Architecture, vocabulary: int, rows: int, micro: int, steps: int):
    """(seconds of training, share of them spent on reading data) of finetune's loop."""
    place = Place(0, 1, torch.device("cpu"), "none")
    with tempfile.TemporaryDirectory() as folder:
        settings = LoopSettings(
            out=Path(folder), steps=steps, batch=rows, micro_batch=micro,
            evaluate_every=10**6, save_every=10**6, tensorboard=True,
        )  # fmt: skip
        prepare_process(settings, place)
        model = make(sizes, vocabulary, 0)
        data = Windows(file, sizes.context, rows, micro, seed=0)
        figures = fit(model, data, lambda runner: {}, settings, place)
    return steps * rows * sizes.context / figures["tokens_per_s"], figures["read_share"]


def main() -> None:
    """Print one JSON object of raw and derived figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prepared", type=Path)
    for name, default in {"rounds": 5, "steps": 10, "batch": 32, "micro-batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"layers": 5, "width": 256, "heads": 4, "context": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--family", default="gpt2")
    given = parser.parse_args()
    file = TokenFile(given.prepared / "train.tokens")
    sizes = Architecture(
        family=given.family, layers=given.layers, width=given.width, heads=given.heads,
        context=given.context,
    )  # fmt: skip
    arguments = (
        file, sizes, file.header["vocabulary"], given.batch, given.micro_batch, given.steps,
    )  # fmt: skip
    times: dict[str, list[float]] = {"plain": [], "ours": [], "read_share": []}
    plain(*arguments[:-1], 2)  # both loops profit from what the first steps of a process set up
    for _ in range(given.rounds):
        times["plain"].append(plain(*arguments))
        seconds, share = ours(*arguments)
        times["ours"].append(seconds)
        times["read_share"].append(share)
    tokens = given.steps * given.batch * given.context
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    report = {
        "plain_tokens_per_s": tokens / statistics.median(times["plain"]),
        "ours_tokens_per_s": tokens / statistics.median(times["ours"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "read_share": max(times["read_share"]),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
