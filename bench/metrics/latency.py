"""Latency on this machine: prefill of a prompt, then decoding token by token, batch 1.

Prefill computes the last token's logits only, as serving does. Each measurement is repeated at
least REPEATS times and for at least SECONDS after one warm-up, with the garbage collector off;
all samples are kept. Greedy tokens are fed back as in real use, through the runner's own cache.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from bench.metrics.subject import Progress, Subject

REPEATS = 5
SECONDS = 2.0
MOST = 100  # repeats, however fast


def latency(
    subject: Subject, progress: Progress, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Times in milliseconds with their samples, and the kernels that they were taken on.

    Returns prefill_ms and decode_tokens_per_s (medians), their p95 and interquartile range,
    prefill_samples_ms, decode_samples_ms (one generated token, mean of each repeat), threads,
    prompt_tokens, new_tokens, prefill_kernels and decode_kernels.

    clock: seconds; tests inject one. Raises ValueError if the blocks hold less than one prompt.
    """
    length, new_tokens = subject.prompt_tokens, subject.new_tokens
    text = subject.blocks.ids.flatten()
    if len(text) < length:
        raise ValueError(f"the data hold {len(text)} tokens, fewer than a prompt of {length}")
    prompt = text[:length][None]
    prefill: list[float] = []
    decode: list[float] = []
    collected = gc.isenabled()
    gc.disable()
    try:
        once(subject, prompt, clock)  # warm-up: packs weights, fills caches
        start = clock()
        while len(prefill) < MOST and (len(prefill) < REPEATS or clock() - start < SECONDS):
            first, rest = once(subject, prompt, clock)
            prefill.append(first * 1000)
            decode.append(rest * 1000 / new_tokens)
            progress(min(len(prefill), REPEATS), REPEATS)
    finally:
        if collected:
            gc.enable()
    return {
        **summary("prefill", prefill),
        **summary("decode", decode),
        "decode_tokens_per_s": 1000 / float(numpy.median(decode)),
        "threads": torch.get_num_threads(),
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "prefill_kernels": subject.runner.kernels(length),
        "decode_kernels": subject.runner.kernels(1),
    }


def once(subject: Subject, prompt: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one prefill, and of decoding new_tokens on top of it."""
    start = clock()
    logits, cache = subject.runner.prefill(prompt)
    middle = clock()
    for _ in range(subject.new_tokens):
        logits = subject.runner.decode(logits.argmax(-1, keepdim=True), cache)
    return middle - start, clock() - middle


def summary(name: str, samples_ms: list[float]) -> dict[str, Any]:
    """Median, p95 and interquartile range of `samples_ms`, beside the samples."""
    low, middle, high, p95 = numpy.percentile(samples_ms, [25, 50, 75, 95])
    return {
        f"{name}_ms": float(middle),
        f"{name}_p95_ms": float(p95),
        f"{name}_iqr_ms": float(high - low),
        f"{name}_samples_ms": samples_ms,
    }
