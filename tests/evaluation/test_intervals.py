"""Intervals match exact formulas and SciPy, and have their nominal coverage."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxdiff.evaluation import intervals


def one_category(prompts: int) -> np.ndarray:
    return np.zeros(prompts, int)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_matches_scipy(confidence):
    counts = [(0, 7), (3, 7), (7, 7), (399, 400), (1, 1)]
    low, high = intervals.wilson(*map(np.array, zip(*counts, strict=True)), confidence)
    for index, (successes, n) in enumerate(counts):
        exact = stats.binomtest(successes, n).proportion_ci(confidence, "wilson")
        assert (low[index], high[index]) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_without_trials_the_interval_is_0_to_1():
    assert intervals.wilson(0, 0) == (0.0, 1.0)


def test_sums_leave_out_unknown_values():
    values, owners = np.array([1.0, np.nan, 3.0, np.nan]), np.array([0, 0, 2, 1])
    sums, counts = intervals.by_prompt(values, owners, 4)
    assert sums.tolist() == [1, 0, 3, 0]
    assert counts.tolist() == [1, 0, 1, 0]


def test_the_bootstrap_matches_scipy():
    values = np.random.default_rng(1).gamma(2, size=60)
    overall, (category,) = intervals.bootstrap(
        values, np.ones(60), one_category(60), resamples=20_000
    )
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert overall == category
    assert overall.value == pytest.approx(values.mean(), abs=1e-12)
    # With 20,000 draws, the error of a 2.5 % quantile is about 1 % of the interval.
    width = theirs.high - theirs.low
    assert overall.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert overall.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_bootstrap_of_three_prompts_matches_enumeration():
    # Three prompts have 27 equally likely draws, so the quantiles are known exactly.
    sums, counts = np.array([0.0, 3.0, 4.0]), np.array([1.0, 4.0, 4.0])
    exact = sorted(
        sums[list(draw)].sum() / counts[list(draw)].sum()
        for draw in itertools.product(range(3), repeat=3)
    )
    estimate, _ = intervals.bootstrap(sums, counts, one_category(3), 0.8, 20_000)
    assert estimate.value == pytest.approx(7 / 9)
    assert (estimate.low, estimate.high) == pytest.approx((exact[2], exact[-3]))


def test_overall_is_the_mean_of_the_categories():
    sums, counts = np.array([4.0, 4, 0, 2]), np.full(4, 4.0)
    overall, each = intervals.bootstrap(sums, counts, np.array([1, 1, 1, 0]))
    assert [e.value for e in each] == pytest.approx([0.5, 8 / 12])
    assert overall.value == pytest.approx((0.5 + 8 / 12) / 2)


def test_prompts_are_drawn_within_their_category():
    # Categories differ but the prompts within them do not, so nothing is uncertain.
    sums, counts = np.array([4.0, 4, 0, 0]), np.full(4, 4.0)
    overall, each = intervals.bootstrap(sums, counts, np.array([0, 0, 1, 1]))
    assert (overall.low, overall.high) == (0.5, 0.5)
    assert [(e.low, e.high) for e in each] == [(1, 1), (0, 0)]


def test_one_prompt_has_no_interval():
    overall, (one,) = intervals.bootstrap(np.array([2.0]), np.array([4.0]), one_category(1))
    assert one.value == overall.value == 0.5
    assert np.isnan([one.low, one.high, overall.low, overall.high]).all()


def test_categories_of_one_prompt_still_give_an_overall_interval():
    overall, each = intervals.bootstrap(np.arange(6.0), np.ones(6), np.arange(6))
    assert all(np.isnan(estimate.low) for estimate in each)
    assert overall.value == 2.5
    assert overall.low < 1.5 < 3.5 < overall.high


def test_prompts_without_a_value_are_left_out():
    sums, counts = np.array([2.0, 0, 1, 0]), np.array([2.0, 0, 2, 0])
    overall, each = intervals.bootstrap(sums, counts, np.array([0, 0, 0, 1]))
    assert overall.value == each[0].value == 0.75
    assert np.isnan(each[1].value)
    nothing, _ = intervals.bootstrap(np.zeros(3), np.zeros(3), one_category(3))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert intervals.bootstrap(np.zeros(0), np.zeros(0), np.zeros(0, int))[1] == []


def test_blocks_do_not_change_the_interval(monkeypatch):
    sums, counts = np.random.default_rng(0).random((2, 50))
    whole = intervals.bootstrap(sums, counts, one_category(50))
    monkeypatch.setattr(intervals, "BLOCK_ELEMENTS", 300)
    assert intervals.bootstrap(sums, counts, one_category(50)) == whole


def test_the_interval_has_its_nominal_coverage():
    # 40 prompts with 4 images each, as unequal as a benchmark's; the true mean is 0.6.
    random, hits, naive_hits = np.random.default_rng(3), 0, 0
    for seed in range(400):
        ability = random.beta(0.6, 0.4, size=40)  # with mean 0.6
        sums = random.binomial(4, ability).astype(float)
        estimate, _ = intervals.bootstrap(
            sums, np.full(40, 4.0), one_category(40), resamples=500, seed=seed
        )
        hits += estimate.low <= 0.6 <= estimate.high
        low, high = intervals.wilson(sums.sum(), 160)
        naive_hits += low <= 0.6 <= high
    assert 0.91 < hits / 400 < 0.98
    assert naive_hits / 400 < 0.85  # if images are resampled instead of prompts


def test_pairing_detects_a_small_difference():
    random = np.random.default_rng(4)
    first = np.repeat(random.normal(size=50), 4)
    second = first + 0.1 + 0.01 * random.normal(size=200)
    owners = np.repeat(np.arange(50), 4)
    overall, (each,) = intervals.paired_difference(first, second, owners, one_category(50))
    assert overall.value == pytest.approx((second - first).mean())
    assert 0.09 < overall.low < overall.high < 0.11
    assert overall.p == each.p == 1 / 2001


def test_few_prompts_give_the_exact_p():
    # Of all 2 ** 6 sign flips, only the observed one and its opposite are as far from 0.
    second = np.arange(1.0, 7)
    overall, _ = intervals.paired_difference(
        np.zeros(6), second, np.arange(6), one_category(6), resamples=20_000
    )
    assert overall.p == pytest.approx(2 / 64, abs=0.005)


def test_equal_models_rarely_differ_significantly():
    random = np.random.default_rng(5)
    owners = np.repeat(np.arange(30), 2)
    ps = [
        intervals.paired_difference(
            *random.normal(size=(2, 60)), owners, one_category(30), resamples=200, seed=seed
        )[0].p
        for seed in range(400)
    ]
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.09


def test_equal_runs_do_not_differ():
    values, owners = np.array([0.0, 1, 1, np.nan]), np.array([0, 0, 1, 1])
    overall, _ = intervals.paired_difference(values, values, owners, one_category(2))
    assert overall == intervals.Difference(0, 0, 0, 1)
