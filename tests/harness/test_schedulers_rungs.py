"""Properties of the successive-halving arithmetic."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.schedulers.base import worst
from harness.schedulers.hyperband import bracket_rungs
from harness.schedulers.pasha import Crossings, Curve, crossing_distance, same_ranking
from harness.schedulers.rungs import Entry, Rung, RungSystem, bracket_probabilities, cutoff, rung_levels

MODES = st.sampled_from(["min", "max"])
# Multiples of 1/64 below 1024: sums and products are exact, so that ties are exact as well.
VALUES = st.integers(0, 2**16).map(lambda k: k / 64)


def best_first(values, mode):
    return sorted(values, reverse=mode == "max")


def rung_of(values, mode="min", quantile=1 / 3, level=1):
    rung = Rung(level, quantile, mode)
    for trial_id, value in enumerate(values):
        rung.insert(Entry(trial_id, value))
    return rung


@pytest.mark.parametrize(
    ("grace", "eta", "max_t", "levels"),
    [
        (1, 3, 27, [1, 3, 9]),
        (1, 3, 28, [1, 3, 9, 27]),
        (2, 2, 50, [2, 4, 8, 16, 32]),
        (1, 2.5, 40, [1, 2, 6, 16, 39]),
        (1, 2.5, 16, [1, 2, 6]),  # 2.5^3 rounds to max_t
        (1, 3, 2, [1]),
        (5, 3, 5, []),
    ],
)
def test_rung_levels(grace, eta, max_t, levels):
    assert rung_levels(grace, eta, max_t) == levels


@given(grace=st.integers(1, 20), eta=st.floats(2, 8), factor=st.integers(1, 300))
def test_levels_ascend_strictly_from_grace_period_to_below_max_t(grace, eta, factor):
    levels = rung_levels(grace, eta, grace * factor)
    assert all(a < b for a, b in pairwise([*levels, grace * factor]))
    assert levels[:1] == ([grace] if factor > 1 else [])


def test_bracket_probabilities_of_the_usual_case():
    assert bracket_probabilities([1, 3, 9], 27, 3) == pytest.approx([0.6, 4 / 15, 2 / 15])


@given(max_t=st.integers(1, 300), eta=st.integers(2, 5), brackets=st.none() | st.integers(1, 9))
def test_bracket_probabilities_are_a_distribution(max_t, eta, brackets):
    levels = rung_levels(1, eta, max_t)
    probabilities = bracket_probabilities(levels, max_t, brackets)
    assert len(probabilities) == min(brackets or len(levels) + 1, len(levels) + 1)
    assert math.isclose(sum(probabilities), 1)
    assert min(probabilities) > 0


@given(values=st.lists(VALUES, min_size=2, unique=True), q=st.floats(0.01, 0.99), mode=MODES)
def test_cutoff_is_the_interpolated_quantile(values, q, mode):
    expected = np.quantile(values, q if mode == "min" else 1 - q)
    assert cutoff(best_first(values, mode), q, mode) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(values=st.lists(VALUES, min_size=2, unique=True), eta=st.integers(2, 5), mode=MODES)
def test_passing_fraction_is_about_one_over_eta(values, eta, mode):
    rung = rung_of(values, mode, 1 / eta)
    passing = sum(rung.passes(value) for value in values)
    assert passing >= 1
    assert abs(passing - ((len(values) - 1) / eta + 1)) <= 1 + 1e-9
    assert [rung.passes(value) for value in best_first(values, mode)] == [k < passing for k in range(len(values))]


@given(values=st.lists(VALUES | st.just(math.inf), max_size=30), q=st.floats(0.01, 0.99), mode=MODES)
def test_worst_values_never_pass_and_leave_no_nan_cutoff(values, q, mode):
    values = [worst(mode) if math.isinf(value) else value for value in values]
    limit = cutoff(best_first(values, mode), q, mode)
    assert limit is None or not math.isnan(limit)
    rung = rung_of(values, mode, q)
    assert not rung.passes(worst(mode))
    assert not rung.lets_continue(worst(mode))
    if len(values) > 1 and math.isfinite(best_first(values, mode)[0]):
        assert rung.passes(best_first(values, mode)[0])


@given(values=st.lists(st.integers(0, 3), max_size=30), mode=MODES)
def test_rung_is_sorted_and_ties_keep_their_order(values, mode):
    sign = 1 if mode == "min" else -1
    entries = rung_of(values, mode).entries
    assert [e.trial_id for e in entries] == sorted(range(len(values)), key=lambda k: sign * values[k])


def test_promotion_moves_an_entry_behind_its_ties_and_counts_on():
    rung = rung_of([1.0, 1.0, 1.0, 2.0, 3.0, 4.0])
    rung.promote(rung.entries[0])
    assert [e.trial_id for e in rung.entries] == [1, 2, 0, 3, 4, 5]
    assert rung.promotable() is rung.entries[0]


def test_rung_system_without_levels_promotes_nothing():
    system = RungSystem([], 5, "min")
    assert system.promote(below=5) is None
    assert system.next_level(0) == 5


@given(values=st.lists(VALUES, max_size=40), mode=MODES)
def test_rung_system_promotes_each_trial_once_per_level_and_in_order(values, mode):
    system = RungSystem([1, 3, 9], 27, mode)
    for trial_id, value in enumerate(values):
        system[1].insert(Entry(trial_id, value))
    promoted = []
    while (promotion := system.promote(below=27)) is not None:
        promoted.append(promotion)
        trial_id, milestone = promotion
        if milestone < 27:
            system[milestone].insert(Entry(trial_id, values[trial_id]))
    assert len(promoted) == len(set(promoted))
    for trial_id, milestone in promoted:
        lower = {m for t, m in promoted if t == trial_id and m < milestone}
        assert lower == {m for m in (3, 9) if m < milestone}


def test_withdrawn_trial_leaves_unless_it_was_promoted():
    system = RungSystem([1, 3], 9, "min")
    for trial_id in range(4):
        system[1].insert(Entry(trial_id, float(trial_id)))
    assert system.promote(below=9) == (0, 3)
    system.withdraw(0)
    system.withdraw(1)
    assert [e.trial_id for e in system[1].entries] == [0, 2, 3]


def test_hyperband_brackets_of_the_usual_case():
    assert bracket_rungs(1, 3, 27) == [
        [(27, 1), (9, 3), (3, 9), (1, 27)],
        [(12, 3), (4, 9), (2, 27)],
        [(6, 9), (2, 27)],
        [(4, 27)],
    ]
    assert bracket_rungs(1, 3, 27, 2) == bracket_rungs(1, 3, 27)[:2]


@given(grace=st.integers(1, 5), eta=st.floats(2, 6), factor=st.integers(1, 200))
def test_hyperband_rungs_shrink_while_levels_grow_to_max_t(grace, eta, factor):
    for rungs in bracket_rungs(grace, eta, grace * factor):
        sizes, levels = zip(*rungs, strict=True)
        assert levels[-1] == grace * factor
        assert all(a < b for a, b in pairwise(levels))
        assert sizes[-1] >= 1
        assert all(a >= b for a, b in pairwise(sizes))


def naive_distances(curves, low, high):
    """Every pair afresh, epoch by epoch from the top, as PASHA is written down."""
    seen, distances = set(), []
    for epoch in range(high, low, -1):
        present = [k for k in sorted(curves) if epoch in curves[k]]
        for i, a in enumerate(present):
            for b in present[i + 1 :]:
                if (a, b) in seen:
                    continue
                seen.add((a, b))
                current, opposite = curves[a][epoch] > curves[b][epoch], False
                for p in range(epoch - 1, 0, -1):
                    if p not in curves[a] or p not in curves[b]:
                        continue
                    order = curves[a][p] > curves[b][p]
                    opposite = opposite or order != current
                    if opposite and order == current:
                        distances.append(abs(curves[a][epoch] - curves[b][epoch]))
                        break
    return distances


REPORTS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12), st.integers(0, 4)), max_size=90)


@given(reports=REPORTS, growth=st.integers(0, 90))
def test_cached_epsilon_equals_that_of_all_pairs(reports, growth):
    """Epochs in any order, missing and repeated ones included; the range moves up in the middle."""
    curves: dict[int, Curve] = {}
    crossings, low, high = Crossings(), 3, 6
    crossings.set_range(low, high)
    for count, (trial_id, epoch, value) in enumerate(reports):
        if count == growth:
            low, high = 6, 12
            crossings.set_range(low, high)
        crossings.record(trial_id, epoch, float(value))
        curves.setdefault(trial_id, {})[epoch] = float(value)
        distances = naive_distances(curves, low, high)
        expected = float(np.percentile(distances, 90)) if distances else -1.0
        assert crossings.percentile(90, default=-1.0) == expected


def test_cached_epsilon_on_long_noisy_curves():
    noise = np.random.default_rng(0)
    curves: dict[int, Curve] = {}
    crossings = Crossings()
    crossings.set_range(9, 27)
    for epoch in range(1, 28):
        for trial_id in range(12):
            value = float(noise.normal())
            crossings.record(trial_id, epoch, value)
            curves.setdefault(trial_id, {})[epoch] = value
    distances = naive_distances(curves, 9, 27)
    assert len(distances) > 50
    assert crossings.percentile(90, default=0.0) == float(np.percentile(distances, 90))


def test_crossing_needs_a_change_of_order_and_back():
    flat = dict.fromkeys(range(1, 5), 2.0)
    assert crossing_distance(flat, {1: 1.0, 2: 3.0, 3: 1.0}, 2, 4) == 1.0
    assert crossing_distance(flat, {1: 3.0, 2: 3.0, 3: 1.0}, 2, 4) is None
    assert crossing_distance(flat, {1: 1.0, 2: 3.0}, 2, 4) is None


def naive_same_ranking(previous, top, eps):
    """Groups grown outward from each position, as PASHA is written down."""
    in_top = {e.trial_id for e in top}
    common = [e for e in previous if e.trial_id in in_top]
    for k, entry in enumerate(top):
        group = {common[k].trial_id}
        for side in (range(k + 1, len(common)), range(k - 1, -1, -1)):
            for other in side:
                if abs(common[other].value - common[k].value) > eps:
                    break
                group.add(common[other].trial_id)
        if entry.trial_id not in group:
            return False
    return True


@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
    extra=st.lists(st.integers(0, 9), max_size=4),
    eps=st.integers(0, 4),
    mode=MODES,
)
def test_ranking_check_equals_groups_grown_outward(pairs, extra, eps, mode):
    previous = rung_of([float(a) for a, _ in pairs] + [float(v) for v in extra], mode)
    top = rung_of([float(b) for _, b in pairs], mode, level=3)
    assert same_ranking(previous, top, eps) == naive_same_ranking(previous.entries, top.entries, eps)
