import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.report.aggregate import (
    above,
    area_under_curve,
    iqm,
    paired_probability_of_improvement,
    performance_profile,
    probability_of_improvement,
    ranks,
    step_values,
    stratified_bootstrap,
)
from harness.seeds import rng

NAN = math.nan
reports = st.lists(st.tuples(st.integers(0, 20), st.one_of(st.just(NAN), st.integers(-9, 9))), max_size=12).map(sorted)


def curve(data):
    times, values = np.array(data, dtype=float).reshape(-1, 2).T
    return times, values


def test_step_values_by_hand():
    got = step_values([1, 3, 3, 5], [0.2, 0.4, 0.5, 0.9], [0.5, 1, 2.9, 3, 4, 5, 99])
    np.testing.assert_array_equal(got, [NAN, 0.2, 0.2, 0.5, 0.5, 0.9, 0.9])


def test_a_report_without_a_value_changes_nothing():
    np.testing.assert_array_equal(step_values([1, 2, 3], [NAN, 0.4, NAN], [1, 2, 3]), [NAN, 0.4, 0.4])
    assert np.isnan(step_values([], [], [1, 2])).all()
    assert np.isnan(step_values([1], [NAN], [1, 2])).all()


def test_times_out_of_order_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        step_values([2, 1], [0.1, 0.2], [3])


@given(reports, st.integers(0, 22))
@settings(max_examples=100, deadline=None)
def test_step_values_never_look_ahead_and_equal_a_loop(data, at):
    times, values = curve(data)
    seen = [value for time, value in zip(times, values, strict=True) if time <= at and not math.isnan(value)]
    np.testing.assert_array_equal(step_values(times, values, [at]), [seen[-1] if seen else NAN])


def test_area_under_curve_by_hand():
    times, values = [2, 4, 5], [1.0, 3.0, 5.0]
    assert area_under_curve(times, values, 10) == pytest.approx((2 * 1 + 1 * 3 + 5 * 5) / 8)
    assert area_under_curve(times, values, 10, start=4) == pytest.approx((1 * 3 + 5 * 5) / 6)
    assert area_under_curve(times, values, 10, start=3) == pytest.approx((1 * 1 + 1 * 3 + 5 * 5) / 7)
    assert area_under_curve(times, values, 4.5) == pytest.approx((2 * 1 + 0.5 * 3) / 2.5)
    assert area_under_curve(times, values, 2) == 1.0
    assert area_under_curve([2, 3, 4], [1.0, NAN, 3.0], 6) == pytest.approx(2.0)


def test_area_under_curve_without_a_report_in_time_is_not_known():
    assert math.isnan(area_under_curve([5], [1.0], 4))
    assert math.isnan(area_under_curve([], [], 4))
    assert math.isnan(area_under_curve([2], [1.0], 4, start=1))
    assert math.isnan(area_under_curve([2], [1.0], 4, start=5))


@given(reports, st.integers(1, 22))
@settings(max_examples=100, deadline=None)
def test_area_under_curve_is_the_mean_of_the_steps(data, horizon):
    """Times are integers here, so the curve's value is one number on every interval between two."""
    times, values = curve(data)
    known = times[~np.isnan(values)]
    got = area_under_curve(times, values, horizon)
    if not len(known) or known[0] > horizon:
        assert math.isnan(got)
    elif known[0] < horizon:
        assert got == pytest.approx(step_values(times, values, np.arange(known[0], horizon)).mean())


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_iqm_equals_scipys_trimmed_mean(values):
    assert iqm(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25))


def test_iqm_by_hand_along_axes_and_around_missing_values():
    assert iqm([100, 1, 2, 3, -100]) == pytest.approx(2.0)
    table = rng(0, "iqm").random((9, 4, 3))
    for axis in range(3):
        np.testing.assert_allclose(iqm(table, axis), scipy.stats.trim_mean(table, 0.25, axis=axis))
    table[2:7, 1, 1] = NAN
    table[:, 2, 2] = NAN
    got = iqm(table, 0)
    assert got[1, 1] == pytest.approx(scipy.stats.trim_mean(table[[0, 1, 7, 8], 1, 1], 0.25))
    assert math.isnan(got[2, 2])
    assert got[0, 0] == pytest.approx(scipy.stats.trim_mean(table[:, 0, 0], 0.25))


def test_stratified_bootstrap_of_a_mean_has_the_standard_error_of_the_strata():
    """Between tasks there is no sampling: only the spread within each counts, (1/N) sqrt(sum of n s^2)."""
    gen = rng(1, "strata")
    strata = [gen.normal(10 * task, 1 + task, 40 + 10 * task) for task in range(3)]
    n = sum(len(task) for task in strata)
    error = math.sqrt(sum(len(task) * task.var() for task in strata)) / n
    low, high = stratified_bootstrap(strata, np.mean, rng(2, "boot"), resamples=8000)
    middle = np.concatenate(strata).mean()
    assert [low, high] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.1 * error)


def test_stratified_bootstrap_equals_resampling_one_by_one():
    gen = rng(3, "plain")
    strata = [gen.random((6, 2)), gen.random((9, 2)) + 1]
    low, high = stratified_bootstrap(strata, iqm, rng(4, "boot"), resamples=4000)
    plain = []
    for _ in range(4000):
        drawn = [task[gen.integers(0, len(task), len(task))] for task in strata]
        plain.append(scipy.stats.trim_mean(np.concatenate(drawn), 0.25, axis=0))
    reference = np.quantile(plain, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([low, high], reference, atol=0.02)


def test_a_band_has_the_grids_shape_is_reproducible_and_says_where_nothing_is_known():
    strata = [rng(5, "grid", task).random((8, 30)) for task in range(3)]
    for task in strata:
        task[:, 0] = NAN  # before the first report
        task[:4, 1] = NAN
    low, high = stratified_bootstrap(strata, iqm, rng(6, "boot"), resamples=500)
    again = stratified_bootstrap(strata, iqm, rng(6, "boot"), resamples=500)
    assert low.shape == high.shape == (30,)
    assert np.isnan([low[0], high[0]]).all()
    middle = iqm(np.concatenate(strata))
    assert np.all((low <= middle)[1:] & (middle <= high)[1:])
    np.testing.assert_array_equal([low, high], again)


def test_the_chunks_of_a_large_bootstrap_do_not_show(monkeypatch):
    strata = [rng(7, "chunk", task).random((5, 4)) for task in range(2)]
    whole = stratified_bootstrap(strata, np.mean, rng(8, "boot"), resamples=4000)
    monkeypatch.setattr("harness.report.aggregate.CHUNK", 1000)
    np.testing.assert_allclose(stratified_bootstrap(strata, np.mean, rng(8, "boot"), resamples=4000), whole, atol=0.03)


def test_a_task_without_runs_is_refused():
    for strata in ([], [[1.0, 2.0], []]):
        with pytest.raises(ValueError, match="at least one run of every task"):
            stratified_bootstrap(strata, np.mean, rng(0, "boot"))


def test_performance_profile_by_hand():
    got = performance_profile([0.2, 0.5, NAN, 0.9], [0.0, 0.2, 0.6, 0.9])
    np.testing.assert_allclose(got, [0.75, 0.5, 0.25, 0.0])
    assert np.isnan(performance_profile([], [0.1, 0.2])).all()


def test_a_profiles_band_holds_the_profile():
    gen, thresholds = rng(9, "profile"), np.linspace(0, 1, 11)
    strata = [gen.random(30), gen.random(20) ** 2]
    low, high = stratified_bootstrap([above(task, thresholds) for task in strata], np.mean, rng(10, "boot"))
    profile = performance_profile(np.concatenate(strata), thresholds)
    assert np.all((low <= profile) & (profile <= high))
    assert np.all(np.diff(profile) <= 0)


def test_probability_of_improvement_by_hand():
    got = probability_of_improvement([[1, 3], [5]], [[2, 3], [4]], rng(11, "poi"))
    assert got.value == pytest.approx(((0 + 0 + 1 + 0.5) / 4 + 1) / 2)
    assert got.n == 2
    assert got.ci[0] <= got.value <= got.ci[1]
    assert probability_of_improvement([[1, NAN]], [[0, NAN]], rng(11, "poi")).value == 1
    with pytest.raises(ValueError, match="at least one score of every task"):
        probability_of_improvement([[NAN]], [[1.0]], rng(11, "poi"))


def test_probability_of_improvement_is_the_mann_whitney_statistic():
    gen = rng(12, "mann")
    x, y = np.round(gen.normal(0.3, 1, 20), 1), np.round(gen.normal(0, 1, 25), 1)
    reference = scipy.stats.mannwhitneyu(x, y).statistic / (20 * 25)
    assert probability_of_improvement([x], [y], rng(13, "poi")).value == pytest.approx(reference)


def test_the_interval_of_the_probability_of_improvement_equals_resampling_one_by_one():
    gen = rng(14, "one by one")
    x, y = [gen.normal(0.5, 1, n) for n in (8, 12)], [gen.normal(0, 1, n) for n in (10, 9)]
    got = probability_of_improvement(x, y, rng(15, "poi"), resamples=4000)
    plain = []
    for _ in range(3000):
        values = []
        for xs, ys in zip(x, y, strict=True):
            a, b = gen.choice(xs, len(xs)), gen.choice(ys, len(ys))
            values.append(scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b)))
        plain.append(np.mean(values))
    assert got.ci == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_two_probabilities_of_improvement_add_up_to_one(x, y):
    one = probability_of_improvement([x], [y], rng(0, "poi"), resamples=50).value
    other = probability_of_improvement([y], [x], rng(0, "poi"), resamples=50).value
    assert one + other == pytest.approx(1)


def test_paired_probability_of_improvement_by_hand_and_by_scipys_wilson_interval():
    got = paired_probability_of_improvement([2, 3, 4, NAN, 1], [1, 3, 3, 5, 2])
    assert (got.n, got.value) == (4, pytest.approx(2.5 / 4))
    for wins, n in ((0, 5), (3, 3), (7, 12), (30, 40)):
        reference = scipy.stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
        x = np.where(np.arange(n) < wins, 1.0, -1.0)
        assert paired_probability_of_improvement(x, np.zeros(n)).ci == pytest.approx((reference.low, reference.high))
    assert math.isnan(paired_probability_of_improvement([], []).value)


def test_ranks_of_demsars_example():
    """Demsar (2006), table 6 and section 3.2: four variants of C4.5 on 14 data sets, AUC."""
    auc = [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
    got = ranks(np.array(auc))
    assert got.blocks == 14
    np.testing.assert_allclose(got.average, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    assert got.friedman_p == pytest.approx(scipy.stats.friedmanchisquare(*np.transpose(auc)).pvalue)
    # its critical difference at 5 % is 1.25 and at 10 % 1.12: C4.5 (3.143) against C4.5+m+cf (1.964) is between
    assert 0.05 < got.nemenyi_p[0, 3] < 0.10
    assert got.nemenyi_p == pytest.approx(got.nemenyi_p.T)


def test_ranks_with_the_lower_better_are_reversed():
    scores = rng(16, "ranks").random((6, 4))
    assert ranks(scores).average == pytest.approx(5 - ranks(scores, higher_is_better=False).average)
    assert ranks(scores).friedman_p == pytest.approx(ranks(-scores).friedman_p)


def test_two_methods_are_friedmans_formula_too():
    """With ties (Conover, 1999): (k - 1) sum (R_j - n (k + 1) / 2)^2 / (sum of squared ranks - n k (k + 1)^2 / 4)."""
    scores = np.array([[1, 2], [2, 2], [5, 3], [1, 4], [2, 6], [1, 7.0]])
    placed = scipy.stats.rankdata(-scores, axis=1)
    n, k = placed.shape
    statistic = (k - 1) * ((placed.sum(axis=0) - n * (k + 1) / 2) ** 2).sum()
    statistic /= (placed**2).sum() - n * k * (k + 1) ** 2 / 4
    assert ranks(scores).friedman_p == pytest.approx(scipy.stats.chi2.sf(statistic, k - 1))


def test_nemenyi_is_the_studentized_range():
    scores = rng(17, "nemenyi").random((12, 5))
    got = ranks(scores)
    for i, j in itertools.combinations(range(5), 2):
        q = abs(got.average[i] - got.average[j]) / math.sqrt(5 * 6 / (6 * 12)) * math.sqrt(2)
        assert got.nemenyi_p[i, j] == pytest.approx(scipy.stats.studentized_range.sf(q, 5, math.inf), abs=1e-3)


def test_incomplete_blocks_are_left_out_and_counted():
    scores = rng(18, "missing").random((7, 3))
    scores[2, 1] = NAN
    got = ranks(scores)
    assert got.blocks == 6
    assert got.average == pytest.approx(ranks(np.delete(scores, 2, axis=0)).average)


def test_methods_that_are_all_alike_have_p_one():
    got = ranks(np.ones((5, 3)))
    assert (got.average.tolist(), got.friedman_p) == ([2, 2, 2], 1.0)
    assert got.nemenyi_p == pytest.approx(np.ones((3, 3)))
    assert ranks(np.ones((5, 2))).friedman_p == 1.0


def test_too_little_to_rank_is_said():
    with pytest.raises(ValueError, match="at least two methods"):
        ranks([[1.0], [2.0], [3.0]])
    with pytest.raises(ValueError, match="at least 3 tasks in which every method has a score; there are 2"):
        ranks([[1.0, 2.0], [3.0, 4.0], [NAN, 5.0]])
