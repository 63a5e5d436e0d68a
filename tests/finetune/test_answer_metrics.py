"""answer_metrics and intervals: cases by hand, outside references, coverage, refusals."""

import numpy as np
import pytest

from finetune.judging.answer_metrics import (
    accuracy,
    answer_measures,
    binary_f1,
    exact_match,
    normalised,
    token_f1,
)
from finetune.judging.intervals import bootstrap, mean, ratio, share


def test_normalisation_by_hand():
    assert normalised("  The Dog's  bowl, an apple!") == "dogs bowl apple"
    assert normalised("another theory") == "another theory"  # articles are whole words only
    assert normalised("The") == ""


def test_exact_match_by_hand():
    assert exact_match("The food sources.", ["habitat", "food sources"])
    assert not exact_match("food source", ["food sources"])


def test_token_f1_by_hand():
    # 2 shared words of 3 and 4: 2 * 2 / 7. The article does not count.
    assert token_f1("a big red house", ["red house on hill"]) == pytest.approx(4 / 7)
    assert token_f1("red red", ["red blue red red"]) == pytest.approx(2 * 2 / 6)
    assert token_f1("red", ["blue", "a red one"]) == pytest.approx(2 * 1 / 3)  # the best counts
    assert token_f1("", ["red"]) == 0 and token_f1("the", ["an"]) == 1


def test_answer_measures_by_hand():
    measures, items = answer_measures(["red", "no idea"], [["Red!"], ["no", "blue"]])
    assert items == [
        {"exact_match": 1.0, "f1": 1.0},
        {"exact_match": 0.0, "f1": pytest.approx(2 / 3)},
    ]
    assert measures["exact_match"].value == 0.5
    assert measures["f1"].value == pytest.approx(5 / 6)
    assert measures["f1"].low is None and "fewer than 8" in measures["f1"].method


def test_wilson_by_hand():
    found = share(8, 10)  # Wilson's formula with z = 1.959964
    z, p, n = 1.959963984540054, 0.8, 10
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (found.value, found.method) == (0.8, "Wilson")
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half))
    assert share(5, 5).high == pytest.approx(1) and share(0, 5).low == pytest.approx(0)


def test_accuracy_and_f1_by_hand():
    right = [" yes", " yes", " yes", " no", " no"]
    chosen = [" yes", " yes", " no", " yes", " no"]
    assert accuracy(chosen, right).value == 0.6
    # 2 hits, 1 false alarm, 1 missed: 4 / (4 + 1 + 1)
    assert binary_f1(chosen, right, " yes").value == pytest.approx(2 / 3)
    assert binary_f1(chosen, right, " no").value == pytest.approx(2 / 4)
    assert binary_f1([" no"], [" no"], " yes").value == 0  # neither chosen nor right
    always = [" yes"] * 3
    assert binary_f1(always, [" yes", " yes", " no"], " yes").value == pytest.approx(4 / 5)


def test_mean_has_the_interval_of_scipys_bootstrap():
    from scipy import stats

    values = np.random.default_rng(1).exponential(size=60)
    found = mean(values)
    assert found.value == pytest.approx(values.mean())
    outside = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(outside), abs=0.04)
    assert found == mean(values), "equal arguments give equal intervals"
    assert mean(values, seed=1) != found


def test_groups_are_drawn_whole():
    values = np.repeat(np.random.default_rng(3).normal(size=40), 10)
    groups = [f"g{n // 10:02}" for n in range(400)]
    whole, alone = mean(values, groups), mean(values)
    assert whole.value == pytest.approx(alone.value)
    assert whole.high - whole.low > 2.5 * (alone.high - alone.low)  # sqrt(10) in the limit
    one_each = mean(values[::10])
    assert (whole.low, whole.high) == pytest.approx((one_each.low, one_each.high))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random, covered = np.random.default_rng(4), 0
    for trial in range(200):
        found = mean(random.normal(size=50), seed=trial)
        covered += found.low <= 0 <= found.high
    assert 180 <= covered <= 199  # 95 % of 200, and percentiles are a little short


def test_bootstrap_of_a_ratio_and_its_refusals():
    table = np.array([[2.0, 4.0]] * 10)
    found = bootstrap(table, ratio, note="fixed")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.method == "bootstrap over 10 groups; fixed"
    infinite = bootstrap(np.ones((9, 1)), lambda sums: sums[:, 0] * np.inf)
    assert infinite.low is None and "not finite" in infinite.method
