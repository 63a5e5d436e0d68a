"""Intervals: a difference without one is not reported."""

import math

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
CHUNK = 2_000_000  # indices drawn at once: 16 MB


def paired_delta(
    nll_nats: ArrayLike, base_nats: ArrayLike, tokens: ArrayLike, seed: int = 0
) -> tuple[float, float, float]:
    """Relative change of perplexity against a base on the same blocks: (change, low, high).

    nll_nats, base_nats: (blocks,) summed -ln p of each block. tokens: (blocks,) or a scalar,
    tokens scored in each. 0.01 means that perplexity is 1 % higher. [low, high] is the 95 %
    percentile bootstrap interval over blocks, both values of a block drawn together; NaN with
    fewer than two blocks. Equal arguments give equal intervals.

    Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13
    """
    difference = np.asarray(nll_nats, dtype=np.float64) - np.asarray(base_nats, dtype=np.float64)
    weights = np.broadcast_to(np.asarray(tokens, dtype=np.float64), difference.shape)
    change = math.expm1(difference.sum() / weights.sum())
    count = len(difference)
    if count < 2:
        return change, math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = []
    rows = max(1, CHUNK // count)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        means.append(difference[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    low, high = np.expm1(np.quantile(np.concatenate(means), [0.025, 0.975]))
    return change, float(low), float(high)
