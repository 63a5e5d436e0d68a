"""A figure with its 95 % interval: Wilson's for shares, the bootstrap for everything else.

The bootstrap draws whole groups (questions, meanings) with replacement and takes percentiles of
what the figure becomes. It works on sums over the items of a group, so that it also serves
figures that are no means: corpus BLEU is a function of summed counts.

Source: E. Wilson, "Probable Inference", 1927, https://doi.org/10.1080/01621459.1927.10502953;
percentile bootstrap: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
FEWEST = 8  # groups; with fewer, the resamples are too few different ones for an interval
LEVEL = 0.95
CHUNK = 2_000_000  # numbers drawn at once: 16 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A figure. low, high: the interval, or None; method: how it was found, or why there is none.

    A value of None means that the figure could not be had; `method` says why.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str = ""


def share(hits: int, items: int) -> Measure:
    """hits / items with Wilson's score interval."""
    from scipy.stats import binomtest

    found = binomtest(hits, items).proportion_ci(LEVEL, method="wilson")
    return Measure(hits / items, float(found.low), float(found.high), "Wilson")


def bootstrap(
    sums: ArrayLike,
    statistic: Callable[[Floats], ArrayLike],
    groups: Sequence[str] | None = None,
    seed: int = 0,
    note: str = "",
) -> Measure:
    """statistic of the summed items, with a percentile interval over groups.

    sums: (items, k). statistic: (m, k) sums over items -> (m,) figures. groups: (items,), items of
    one group are drawn together; None: each item by itself. Equal arguments give equal intervals.
    """
    table = np.asarray(sums, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if groups is not None:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        by_group = np.zeros((int(index.max()) + 1, table.shape[1]))
        np.add.at(by_group, index, table)
        table = by_group
    value = float(np.asarray(statistic(table.sum(0, keepdims=True)))[0])
    count = len(table)
    if count < FEWEST:
        return Measure(value, method=f"none: fewer than {FEWEST} groups")
    generator = np.random.default_rng(seed)
    found = []
    rows = max(1, CHUNK // (count * table.shape[1]))
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        found.append(np.asarray(statistic(table[drawn].sum(1)), dtype=np.float64))
    method = f"bootstrap over {count} groups" + (f"; {note}" if note else "")
    figures = np.concatenate(found)
    if not np.isfinite(figures).all():
        return Measure(value, method=f"none: the {method} is not finite")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return Measure(value, float(low), float(high), method)


def mean(values: ArrayLike, groups: Sequence[str] | None = None, seed: int = 0) -> Measure:
    """The mean of one value an item, with a bootstrap interval."""
    column = np.asarray(values, dtype=np.float64)
    return bootstrap(np.stack([column, np.ones_like(column)], 1), ratio, groups, seed)


def ratio(sums: Floats) -> Floats:
    """First column over second: the statistic of a mean."""
    return sums[:, 0] / sums[:, 1]
