"""paired_delta: by hand, against scipy's bootstrap, and at its edges."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from bench.stats import paired_delta


def test_change_by_hand():
    # Per token 2.0 nats against 1.9: perplexity is exp(0.1) - 1 = 10.517 % higher.
    change, low, high = paired_delta([200.0] * 8, [190.0] * 8, 100)
    assert change == pytest.approx(0.1051709)
    assert low == pytest.approx(change) and high == pytest.approx(change)  # no spread at all


def test_blocks_weigh_by_their_tokens():
    change, _, _ = paired_delta([10.0, 90.0], [0.0, 0.0], [10, 990])
    assert change == pytest.approx(math.expm1(100 / 1000))


def test_a_model_against_itself_differs_by_nothing():
    nll = np.random.default_rng(0).normal(3000, 200, size=50)
    assert paired_delta(nll, nll, 1023) == (0.0, 0.0, 0.0)


def test_agrees_with_scipy():
    generator = np.random.default_rng(1)
    base = generator.normal(3000, 300, size=40)
    tokens = generator.integers(500, 1000, size=40)
    nll = base * 1.002 + generator.normal(0, 20, size=40)

    def statistic(a, b, t, axis):
        return np.expm1((a - b).sum(axis=axis) / t.sum(axis=axis))

    reference = bootstrap(
        (nll, base, tokens),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        # 40 blocks: the percentiles of a normal at +-t(39) * sqrt(40 / 39) = 2.0485 standard errors
        confidence_level=0.95949,
        method="percentile",
        random_state=2,
    ).confidence_interval
    _, low, high = paired_delta(nll, base, tokens)
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.05 * width)
    assert high == pytest.approx(reference.high, abs=0.05 * width)


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(3)
    base = generator.normal(3000, 300, size=60)
    _, low, high = paired_delta(base + 10, base, 1000)
    _, wide_low, wide_high = paired_delta(base + 10, generator.permutation(base), 1000)
    assert high - low < 0.01 * (wide_high - wide_low)


def test_equal_input_gives_equal_intervals_and_many_blocks_fit():
    nll = np.random.default_rng(4).normal(3000, 300, size=3000)
    first = paired_delta(nll, nll - 1, 1000)
    assert first == paired_delta(nll, nll - 1, 1000)
    assert first[0] == pytest.approx(math.expm1(0.001))


@pytest.mark.parametrize("blocks, known", [(1, False), (7, False), (8, True)])
def test_few_blocks_have_no_interval(blocks, known):
    change, low, high = paired_delta([101.0] * blocks, [100.0] * blocks, 100)
    assert change == pytest.approx(math.expm1(0.01))
    assert (math.isfinite(low) and math.isfinite(high)) == known


def test_coverage_with_the_fewest_blocks_is_near_its_name():
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        difference = generator.normal(1.0, 1.0, size=8)
        _, low, high = paired_delta(difference, np.zeros(8), 1000, seed)
        covered += low <= math.expm1(0.001) <= high
    assert 0.92 <= covered / 400 <= 0.98  # plain percentiles reach 0.88
