"""Perplexity on fixed windows of tokens, as in the GPTQ and AWQ papers' tables: `window-N`.

The text is tokenised whole, without special tokens, and cut into windows of N that do not
overlap. Each is scored on its own; its first token is context only. The vocabulary projection
is taken a few rows at a time, so the full logits never exist.

Source: E. Frantar et al., "GPTQ", 2022, section 4, https://arxiv.org/abs/2210.17323
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.metrics.subject import Progress, Subject
from compress.base import Runner

BATCH_TOKENS = 4096  # in one forward pass; rebuilt weights are shared by that many tokens
CHUNK_TOKENS = 64  # rows of logits at a time: 13 MB in float32 for 49k words, near the cache


def perplexity(subject: Subject, progress: Progress) -> dict[str, Any]:
    """How surprised the model is by the subject's blocks; lower is better, 1 is perfect.

    Returns perplexity = exp(nll_nats / scored_tokens); nll_nats, the summed -ln p over the scored
    tokens; scored_tokens = count * (block_tokens - 1); block_nll_nats, the sum of each block.

    Raises ValueError on blocks with nothing to score, FloatingPointError if the model returns NaN
    or infinity (a broken method must fail, not rank last).
    """
    ids = subject.blocks.ids
    count, length = ids.shape
    if count == 0 or length < 2:
        raise ValueError(f"nothing to score in blocks of shape {tuple(ids.shape)}")
    sums: list[float] = []
    for batch in ids.split(max(1, BATCH_TOKENS // length)):
        sums += block_nll(subject.runner, batch)
        progress(len(sums), count)
    nll_nats, scored = math.fsum(sums), count * (length - 1)
    mean = nll_nats / scored
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,  # which the worker refuses
        "nll_nats": nll_nats,
        "scored_tokens": scored,
        "block_nll_nats": sums,
        "block_tokens": length,
    }


def block_nll(runner: Runner, ids: Tensor) -> list[float]:
    """Summed -ln p of the tokens of each block but its first. ids: (blocks, tokens) int64."""
    return block_sums(runner, ids, token_nll)[0]


def block_sums(
    runner: Runner, ids: Tensor, *scores: Callable[[Tensor, Tensor], Tensor]
) -> list[list[float]]:
    """Of each score, its sum over the tokens of each block but its first.

    ids: (blocks, tokens) int64. A score takes logits (n, vocab) and targets (n,), and gives (n,).
    """
    blocks, length = ids.shape
    targets = ids.flatten().roll(-1)  # the last of each block has no target: dropped below
    found = torch.full((len(scores), blocks * length), math.nan, dtype=torch.float64)
    for piece, logits in runner.logit_chunks(ids, CHUNK_TOKENS):  # a gap between them must show
        for row, score in zip(found, scores, strict=True):
            row[piece] = score(logits, targets[piece]).double().cpu()
    kept = found.view(len(scores), blocks, length)[:, :, :-1]
    if not kept.isfinite().all():
        raise FloatingPointError("the model's logits hold NaN or infinity")
    return kept.sum(-1).tolist()


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln softmax(logits)[target] in float32. logits: (n, vocab), any float type; targets: (n,).

    Written out so that one float32 copy is enough: log_softmax needs two.
    """
    highest = logits.amax(-1, keepdim=True).float()
    wanted = logits.gather(1, targets[:, None]).float()
    total = torch.sub(logits, highest).exp_().sum(-1, keepdim=True)  # float32: highest is
    return (total.log() + highest - wanted)[:, 0]
