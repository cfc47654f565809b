import itertools
import math

import lifelines
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lifelines.utils import restricted_mean_survival_time
from statsmodels.stats.multitest import multipletests

from harness.report.stats import (
    PAIRS_TRIED,
    holm,
    kaplan_meier,
    median_interval,
    median_of,
    paired_bootstrap,
    paired_effect,
    pairs_needed,
    percentile_interval,
    rank_biserial,
    reductions,
    relative_drop,
    restricted_mean,
    restricted_mean_reduction,
    sd_ratio,
    signed_differences,
    wilcoxon_signed_rank,
)
from harness.seeds import rng

INF = math.inf
times = st.one_of(st.just(INF), st.integers(1, 60).map(float))
pairs = st.lists(st.tuples(times, times), min_size=1, max_size=12)


def effect(variant, off, budget=100.0):
    return paired_effect(variant, off, budget)


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
    assert (result.n, result.informative, result.low, result.high) == (6, 0, 0.0, 0.0)
    assert all(math.isnan(end) for end in result.ci)  # they say nothing about the size of the ratio
    assert wilcoxon_signed_rank(signed_differences([INF] * 6, [INF] * 6, 100)) == 1.0


def test_constant_effect_has_a_point_interval():
    off = np.array([10.0, 20, 40, 80, 15, 30])
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


def test_the_median_interval_of_ten_by_hand():
    """Hettmansperger and Sheather (1986): between the 2nd and the 3rd of ten (97.85 % and 89.06 %)."""
    wide, narrow = 1 - 2 * 11 / 1024, 1 - 2 * 56 / 1024
    excess = (wide - 0.95) / (wide - narrow)
    share = 8 * excess / (2 + 6 * excess)
    assert median_interval(range(1, 11), range(1, 11)) == pytest.approx((2 + share, 9 - share))
    assert share == pytest.approx(0.658, abs=5e-4)


def test_the_median_interval_at_an_order_statistics_own_level_needs_no_interpolation():
    level = 1 - 2 * scipy.stats.binom.cdf(3, 15, 0.5)
    values = rng(2, "order").normal(size=15)
    assert median_interval(values, values, level) == pytest.approx((np.sort(values)[3], np.sort(values)[11]))


def test_fewer_than_six_informative_pairs_have_no_interval():
    assert all(math.isnan(end) for end in median_interval(range(5), range(5)))
    assert median_interval(range(5), range(5), level=0.9) == pytest.approx((0, 4), abs=0.5)
    assert median_interval([], [])[0] is math.nan
    six = effect([5.0, 6, 7, 8, 9, 11], [10.0] * 6)
    assert six.ci[0] >= -0.1
    assert six.ci[1] <= 0.5
    assert all(math.isnan(end) for end in effect([5.0, 6, 7, 8, 9, INF], [10.0] * 5 + [INF]).ci)


def test_both_censored_pairs_neither_narrow_the_interval_nor_leave_it():
    gen = rng(3, "ties")
    off = gen.uniform(20, 60, 30)
    variant = off * np.exp(0.3 * gen.normal(size=30) - 0.2)
    alone = effect(variant, off)
    few = effect([*variant, *[INF] * 5], [*off, *[INF] * 5])
    assert few.ci == alone.ci
    assert (few.n, few.informative) == (35, 30)
    many = effect([*variant, *[INF] * 31], [*off, *[INF] * 31])
    assert (many.low, many.high) == (0, 0)  # most pairs are ties
    assert many.ci == (min(0, alone.ci[0]), alone.ci[1])


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
    if result.informative >= 6:
        assert result.ci[0] <= result.low
        assert result.high <= result.ci[1] <= 1
    else:
        assert math.isnan(result.ci[0])


def test_median_of_ignores_what_is_not_known():
    assert median_of([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(median_of([math.nan]))


def test_holm_by_hand_and_as_r_adjusts():
    """R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03, 0.04, 0.05]), [0.05, 0.08, 0.09, 0.09, 0.09])
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]).tolist() == [0.8, 0.9]
    assert holm([]).tolist() == []


def test_holm_agrees_with_statsmodels_among_the_known():
    gen = rng(13, "holm")
    for size in (1, 2, 5, 12, 40):
        raw = np.round(gen.random(size) ** 3, 2)  # with equal values
        family = np.insert(raw, size // 2, math.nan)
        adjusted = holm(family)
        assert np.flatnonzero(np.isnan(adjusted)) == [size // 2]
        np.testing.assert_allclose(np.delete(adjusted, size // 2), multipletests(raw, method="holm")[1], atol=1e-15)


@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 1)), max_size=12))
@settings(deadline=None)
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    raw = np.array(p, dtype=float)
    known = ~np.isnan(raw)
    adjusted = holm(raw)
    assert np.isnan(adjusted[~known]).all()
    assert np.all(raw[known] <= adjusted[known])
    assert np.all(adjusted[known] <= 1)
    assert np.all(np.diff(adjusted[known][np.argsort(raw[known])]) >= 0)


def test_rank_biserial_by_hand():
    """Ranks 1, 2, 3, 4 of 10 in all; Kerby (2014): favourable minus unfavourable share."""
    assert rank_biserial([-1, 2, 3, 4]) == pytest.approx((9 - 1) / 10)
    assert rank_biserial([1, -2.5, 2.5]) == pytest.approx(1 / 6)
    assert rank_biserial([0, 0, 3]) == pytest.approx(3 / 6)  # two zeros take the ranks 1 and 2
    assert rank_biserial([5, 6, 7]) == 1
    assert rank_biserial([-5, -6, -7]) == -1
    assert rank_biserial([0, 0]) == 0
    assert math.isnan(rank_biserial([]))


def test_rank_biserial_is_scipys_statistic_rescaled():
    d = rng(8, "kerby").normal(0.4, 1, 25)
    positive = scipy.stats.wilcoxon(d, alternative="greater").statistic
    assert rank_biserial(d) == pytest.approx(2 * positive / (25 * 26 / 2) - 1)


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_rank_biserial_is_in_range_and_flips_with_the_pair(data):
    v, o = np.array(data).T
    size = rank_biserial(signed_differences(v, o, 60))
    assert -1 <= size <= 1
    assert rank_biserial(signed_differences(o, v, 60)) == pytest.approx(-size)


def test_restricted_mean_by_hand():
    assert restricted_mean([2, 4, 6, 6], [1, 1, 0, 0], 6) == pytest.approx((2 + 4 + 6 + 6) / 4)
    assert restricted_mean([2, 4, 6, 6], [1, 1, 0, 0], 3) == pytest.approx((2 + 3 + 3 + 3) / 4)
    assert restricted_mean([1, 2, 4], [1, 0, 1], 4) == pytest.approx(1 + 2 / 3 * 3)  # at 4 alone: the curve stays
    assert restricted_mean([9, 9], [0, 0], 9) == 9
    assert restricted_mean([1, 2], [0, 0], 9) == 9  # nothing is known beyond 2; the curve stays at 1
    assert math.isnan(restricted_mean([], [], 5))


def test_restricted_mean_agrees_with_lifelines():
    gen = rng(9, "rmst")
    for n in (3, 20, 60):
        t, d = gen.integers(1, 30, n).astype(float), gen.random(n) < 0.6
        for horizon in (5.0, 12.5, 40.0):
            reference = restricted_mean_survival_time(lifelines.KaplanMeierFitter().fit(t, d), t=horizon)
            assert restricted_mean(t, d, horizon) == pytest.approx(reference, rel=1e-9)


def test_reduction_of_the_restricted_mean_by_hand():
    got = restricted_mean_reduction([10, 20, INF, INF], [20, 50, INF, 80], 100, rng(0, "rm"))
    assert got.n == 4
    assert got.value == pytest.approx(1 - 230 / 250)
    assert got.ci[0] < got.value < got.ci[1] <= 1
    same = restricted_mean_reduction([INF] * 4, [INF] * 4, 100, rng(0, "rm"))
    assert (same.value, *same.ci) == (0, 0, 0)
    assert math.isnan(restricted_mean_reduction([], [], 100, rng(0, "rm")).value)


def test_sd_ratio_by_hand():
    got = sd_ratio([10, 20, 30, INF], [20, 40, 60, 80], 100, rng(0, "sd"))
    assert got.value == pytest.approx(np.std([10, 20, 30, 100], ddof=1) / np.std([20, 40, 60, 80], ddof=1))
    assert got.ci[0] < got.value < got.ci[1]


def test_sd_ratio_without_spread():
    alike = sd_ratio([INF] * 3, [INF] * 3, 0.1, rng(0, "sd"))  # 0.1 has a rounding residue in a plain SD
    assert math.isnan(alike.value)
    assert all(math.isnan(end) for end in alike.ci)
    assert sd_ratio([1, 2, 3], [INF] * 3, 10, rng(0, "sd")).value == INF
    assert sd_ratio([INF] * 3, [1, 2, 3], 10, rng(0, "sd")).value == 0
    assert math.isnan(sd_ratio([1], [2], 10, rng(0, "sd")).value)


def test_paired_bootstrap_is_reproducible_and_near_students_interval_for_a_mean():
    gen = rng(10, "student")
    x, y = gen.normal(1, 1, 12), gen.normal(0, 1, 12)

    def shift(a, b):
        return (a - b).mean(axis=-1)

    one, again = (paired_bootstrap(shift, x, y, rng(1, "boot")) for _ in range(2))
    assert one == again
    student = scipy.stats.ttest_rel(x, y).confidence_interval(0.95)
    width = student.high - student.low
    assert one.ci == pytest.approx((student.low, student.high), abs=0.08 * width)


def test_percentile_interval_leaves_out_what_is_not_defined():
    resampled = np.array([[1.0, math.nan], [3, math.nan], [math.nan, math.nan], [2, math.nan], [INF, math.nan]])
    low, high = percentile_interval(resampled, 0.5)
    assert (low[0], high[0]) == (2, 3)
    assert np.isnan([low[1], high[1]]).all()


def test_relative_drop_by_hand():
    drop = relative_drop([0.8, 0.9, 0.99], [0.8, 1.0, 1.0], "max")
    assert (drop.n, drop.value) == (3, pytest.approx(0.01))
    assert relative_drop([2.2, 1.0, 4.0], [2.0, 1.0, 4.4], "min").value == 0
    assert relative_drop([-2.2], [-2.0], "max").value == pytest.approx(0.1)
    assert relative_drop([0.0, -1.0, -1.0], [0.0, 0.0, 0.0], "max").value == INF
    assert relative_drop([0.5, math.nan], [1.0, 1.0], "max").n == 1
    assert math.isnan(relative_drop([], [], "max").value)
    with pytest.raises(ValueError, match="mode must be"):
        relative_drop([1], [1], "higher")


def test_relative_drop_has_the_median_interval():
    gen = rng(11, "drop")
    off = gen.uniform(0.8, 0.9, 20)
    variant = off * (1 - 0.01 * gen.normal(0.1, 1, 20))
    drops = (off - variant) / off
    assert relative_drop(variant, off, "max").ci == pytest.approx(median_interval(drops, drops))


@given(st.lists(st.tuples(st.integers(-90, 90), st.integers(1, 90)), min_size=6, max_size=30))
@example([(0, 0)] * 6)
@settings(max_examples=60, deadline=None)
def test_relative_drop_flips_with_the_mode(data):
    v, o = np.array(data).T
    worse, better = relative_drop(v, o, "max"), relative_drop(v, o, "min")
    assert worse.value == pytest.approx(-better.value)
    assert worse.ci == pytest.approx((-better.ci[1], -better.ci[0]))
    assert worse.ci[0] <= worse.value <= worse.ci[1]


def log_normal_pairs(n, own_sd, reduction, budget, *name):
    gen = rng(12, *name)
    seeds = 0.5 * gen.normal(size=n)
    v, o = np.exp(3 + seeds + own_sd * gen.normal(size=(2, n)))
    v *= 1 - reduction
    return np.where(v > budget, INF, v), np.where(o > budget, INF, o)


@pytest.mark.parametrize("reduction", [0.0, 0.5])
def test_the_pairs_needed_do_have_that_power(reduction):
    """Whatever the observed median: what counts is the spread. 400 pairs, so that it is known well."""
    v, o = log_normal_pairs(400, 0.35, reduction, 45, "pilot", str(reduction))
    needed = int(pairs_needed(v, o, 45, rng(0, "power")))
    rejected = []
    for study in range(500):
        v, o = log_normal_pairs(needed, 0.35, 0.15, 45, "study", study)
        rejected.append(wilcoxon_signed_rank(signed_differences(v, o, 45)) < 0.05)
    assert np.mean(rejected) == pytest.approx(0.8, abs=0.08)


def test_more_spread_needs_more_pairs():
    needed = []
    for own_sd in (0.02, 0.2, 0.5, 20):
        v, o = log_normal_pairs(30, own_sd, 0.1, 100, "spread")
        needed.append(pairs_needed(v, o, 100, rng(0, "power")))
    assert needed == sorted(needed)
    assert needed[0] == 6  # the fewest with which the test can reject at 5 %
    assert all(n in PAIRS_TRIED for n in needed[:3])
    assert needed[3] == INF


def test_pairs_needed_of_few_of_equal_and_of_censored_pairs():
    gen = rng(0, "power")
    assert math.isnan(pairs_needed([5, 6, 7, 8], [9, 9, 9, 9], 100, gen))
    assert math.isnan(pairs_needed([5, 6, 7, 8, *[INF] * 20], [9, 9, 9, 9, *[INF] * 20], 100, gen))
    assert math.isnan(pairs_needed([], [], 100, gen))
    assert pairs_needed([8.0] * 5, [10.0] * 5, 100, gen) == 6
    v, o = log_normal_pairs(40, 0.2, 0.1, 1000, "ties")
    more = pairs_needed([*v, *[INF] * 40], [*o, *[INF] * 40], 1000, rng(0, "power"))
    assert more > 1.3 * pairs_needed(v, o, 1000, rng(0, "power"))  # half of the new pairs would be ties too


def test_pairs_needed_is_reproducible():
    v, o = log_normal_pairs(20, 0.3, 0.1, 40, "again")
    assert pairs_needed(v, o, 40, rng(5, "power")) == pairs_needed(v, o, 40, rng(5, "power"))


@given(st.lists(st.tuples(times, times), min_size=0, max_size=30))
@settings(max_examples=15, deadline=None)
def test_pairs_needed_always_answers(data):
    v, o = np.array(data).reshape(-1, 2).T
    needed = pairs_needed(v, o, 60, rng(0, "power"))
    assert math.isnan(needed) == (np.count_nonzero(np.isfinite(v) | np.isfinite(o)) < 5)
    assert math.isnan(needed) or needed >= 6
