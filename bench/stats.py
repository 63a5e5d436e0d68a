"""Intervals: a difference without one is not reported."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 10_000
FEWEST_BLOCKS = 8  # below it the resamples are too few different ones for an interval
CHUNK = 2_000_000  # indices drawn at once: 16 MB


def paired_delta(
    nll_nats: ArrayLike, base_nats: ArrayLike, tokens: ArrayLike, seed: int = 0
) -> tuple[float, float, float]:
    """Relative change of perplexity against a base on the same blocks: (change, low, high).

    nll_nats, base_nats: (blocks,) summed -ln p of each block. tokens: (blocks,) or a scalar,
    tokens scored in each. 0.01 means that perplexity is 1 % higher. [low, high] is the 95 %
    bootstrap interval over blocks, both values of a block drawn together: percentiles, expanded
    for the spread that few blocks hide. NaN with fewer than 8 blocks. Equal arguments give equal
    intervals.

    Source: T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.3
    (expanded percentiles), https://arxiv.org/abs/1411.5279
    """
    difference = np.asarray(nll_nats, dtype=np.float64) - np.asarray(base_nats, dtype=np.float64)
    weights = np.broadcast_to(np.asarray(tokens, dtype=np.float64), difference.shape)
    change = math.expm1(difference.sum() / weights.sum())
    count = len(difference)
    if count < FEWEST_BLOCKS:
        return change, math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = []
    rows = max(1, CHUNK // count)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        means.append(difference[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    low, high = np.expm1(np.quantile(np.concatenate(means), [tail, 1 - tail]))
    return change, float(low), float(high)
