import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.report.stats import (
    kaplan_meier,
    median_of,
    paired_effect,
    reductions,
    signed_differences,
    wilcoxon_signed_rank,
)
from harness.seeds import rng

INF = math.inf
times = st.one_of(st.just(INF), st.integers(1, 60).map(float))
pairs = st.lists(st.tuples(times, times), min_size=1, max_size=12)


def effect(variant, off, budget=100.0):
    return paired_effect(variant, off, budget, rng(0, "test"), resamples=2000)


def test_kaplan_meier_of_the_textbook_leukaemia_data():
    """6-MP arm of Freireich et al. (1963); survival and median as in R: survfit(Surv(t, d) ~ 1)."""
    t = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    d = [1] * 9 + [0] * 12
    km = kaplan_meier(t, d)
    assert km.times.tolist() == [6, 7, 10, 13, 16, 22, 23]
    np.testing.assert_allclose(km.survival, [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], atol=5e-4)
    assert km.quantile(0.5) == 23
    assert km.quantile(0.25) == 13
    assert km.quantile(0.75) == INF


def test_kaplan_meier_agrees_with_scipy():
    gen = rng(1, "km")
    t, d = gen.integers(1, 20, 60).astype(float), gen.random(60) < 0.6
    reference = scipy.stats.ecdf(scipy.stats.CensoredData.right_censored(t, ~d)).sf
    ours = kaplan_meier(t, d)
    np.testing.assert_allclose(ours.survival, reference.evaluate(ours.times), atol=1e-12)


def test_median_without_censoring_is_the_usual_one():
    for values in ([3.0], [1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0, 1.0, 2.0]):
        assert kaplan_meier(values, [True] * len(values)).quantile(0.5) == np.median(values)


def test_flat_last_piece_and_no_events():
    assert kaplan_meier([1, 2, 9, 9], [1, 1, 0, 0]).quantile(0.5) == 2
    assert kaplan_meier([9, 9], [0, 0]).quantile(0.5) == INF
    assert kaplan_meier([], []).quantile(0.5) == INF


def test_reductions_by_hand():
    bounds = reductions([50, 20, INF, INF], [100, INF, 80, INF], budget=100)
    np.testing.assert_allclose(bounds, [[0.5, 0.5], [0.8, 1.0], [-INF, -0.25], [0.0, 0.0]])


def test_effect_is_identified_when_the_censored_pairs_are_not_in_the_middle():
    result = effect([50, 20, 40, 90, INF], [100, INF, 100, 100, 80])
    assert (result.low, result.high) == pytest.approx((0.5, 0.5))
    assert result.identified


def test_effect_is_a_bound_when_the_median_pair_is_censored():
    result = effect([20, 30, 40], [INF, INF, INF])
    assert (result.low, result.high) == pytest.approx((0.7, 1.0))
    worse = effect([INF, INF, INF], [20, 50, 80])
    assert worse.low == -INF
    assert worse.high == pytest.approx(1 - 100 / 50)


def test_effect_of_both_censored_everywhere_is_a_tie():
    result = effect([INF] * 6, [INF] * 6)
    assert (result.low, result.high, result.ci) == (0.0, 0.0, (0.0, 0.0))
    assert wilcoxon_signed_rank(signed_differences([INF] * 6, [INF] * 6, 100)) == 1.0


def test_constant_effect_has_a_point_interval():
    off = np.array([10.0, 20, 40, 80])
    result = effect(0.75 * off, off)
    assert (result.low, *result.ci) == pytest.approx((0.25, 0.25, 0.25))


def test_one_pair_and_none():
    single = effect([5], [10])
    assert (single.n, single.low) == (1, 0.5)
    assert all(math.isnan(end) for end in single.ci)
    empty = effect([], [])
    assert empty.n == 0
    assert math.isnan(empty.low)
    assert math.isnan(wilcoxon_signed_rank([]))


def test_bootstrap_is_reproducible_and_covers():
    gen = rng(3, "coverage")
    hits = 0
    for _ in range(300):
        off = gen.uniform(20, 60, 30)
        variant = off * np.exp(0.3 * gen.normal(size=30) - 0.2)
        low, high = paired_effect(variant, off, 1000, gen, resamples=500).ci
        hits += low <= 1 - math.exp(-0.2) <= high
    assert 0.90 <= hits / 300 <= 0.985
    assert effect([5, 6, 7], [10, 9, 8]) == effect([5, 6, 7], [10, 9, 8])


def test_differences_by_hand():
    got = signed_differences([50, 20, INF, INF, 100, INF], [60, INF, 70, INF, INF, 100], budget=100)
    assert got[:4].tolist() == [10, 80, -30, 0]
    assert 0 < got[4] < 1e-300
    assert -1e-300 < got[5] < 0


def test_wilcoxon_equals_scipy_exact_without_ties():
    gen = rng(4, "wilcoxon")
    for n in (1, 3, 8, 20, 50):
        d = gen.normal(0.3, 1, n)
        assert wilcoxon_signed_rank(d) == pytest.approx(scipy.stats.wilcoxon(d, method="exact").pvalue, rel=1e-9)


def enumerated_p(d):
    """All sign flips of the non-zero ranks, by brute force."""
    d = np.asarray(d, dtype=float)
    ranks = scipy.stats.rankdata(np.abs(d))[d != 0]
    seen = ranks[d[d != 0] > 0].sum()
    far = abs(seen - ranks.sum() / 2) - 1e-9
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return np.mean([abs(s - ranks.sum() / 2) >= far for s in sums])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_wilcoxon_with_ties_and_pratt_zeros_equals_enumeration(d):
    assert wilcoxon_signed_rank(d) == pytest.approx(enumerated_p(d), abs=1e-12)


def test_wilcoxon_with_many_pairs_is_scipys_pratt_approximation():
    d = np.round(rng(5, "many").normal(0.1, 1, 300), 1)
    reference = scipy.stats.wilcoxon(d, zero_method="pratt", correction=False, method="approx").pvalue
    assert wilcoxon_signed_rank(d) == pytest.approx(reference, rel=1e-9)


def test_wilcoxon_exact_and_limit_agree_where_they_meet():
    d = np.round(rng(6, "meet").normal(0.15, 1, 200), 1)
    reference = scipy.stats.wilcoxon(d, zero_method="pratt", correction=False, method="approx").pvalue
    assert wilcoxon_signed_rank(d) == pytest.approx(reference, rel=0.02)


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_swapping_the_variants_flips_signs_and_keeps_p(data):
    v, o = np.array(data).T
    forward, back = signed_differences(v, o, 60), signed_differences(o, v, 60)
    assert np.array_equal(forward, -back)
    assert wilcoxon_signed_rank(forward) == pytest.approx(wilcoxon_signed_rank(back), abs=1e-12)
    if len(data) % 2:  # an even n averages the two middle ratios, which the swap inverts one by one
        a, b = effect(v, o, 60), effect(o, v, 60)
        assert np.sign(a.low) == -np.sign(b.high)
        assert np.sign(a.high) == -np.sign(b.low)


@given(pairs, st.sampled_from([0.25, 4.0, 1024.0]))
@settings(max_examples=60, deadline=None)
def test_the_unit_of_time_does_not_matter(data, scale):
    v, o = np.array(data).T
    assert effect(v, o, 60) == effect(v * scale, o * scale, 60 * scale)
    one, other = (wilcoxon_signed_rank(signed_differences(v * s, o * s, 60 * s)) for s in (1.0, scale))
    assert one == pytest.approx(other, abs=1e-12)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_the_interval_holds_the_bounds_in_order(data):
    v, o = np.array(data).T
    result = effect(v, o, 60)
    assert result.low <= result.high <= 1
    if result.n > 1:
        assert result.ci[0] <= result.ci[1]


def test_level_under_the_null_with_censoring():
    gen = rng(7, "null")
    rejected = 0
    for _ in range(400):
        seeds = gen.normal(size=30)
        both = np.exp(3.5 + 0.5 * seeds + 0.5 * gen.normal(size=(2, 30)))
        both[both > 50] = INF  # about 20 % censored
        rejected += wilcoxon_signed_rank(signed_differences(both[0], both[1], 50)) < 0.05
    assert 0.02 <= rejected / 400 <= 0.09


def test_median_of_ignores_what_is_not_known():
    assert median_of([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(median_of([math.nan]))
