import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.report.divergence import BINS, KL_ESTIMATOR, kl_divergence, kl_null, mean_shift
from harness.seeds import rng

units = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_kl_by_hand():
    """Two bins: counts 3, 1 and 1, 1, with 1/2 added 3.5, 1.5 of 5 and 1.5, 1.5 of 3."""
    expected = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert kl_divergence([0.1, 0.2, 0.3, 0.9], [0.2, 0.8], bins=2) == pytest.approx(expected)


def test_kl_of_categories_by_hand():
    expected = 3.5 / 5 * math.log(3.5 / 5 / 0.5) + 1.5 / 5 * math.log(1.5 / 5 / 0.5)
    assert kl_divergence(["a", "a", "a", "b"], ["a", "b"], categories=["a", "b"]) == pytest.approx(expected)
    assert kl_divergence([16, 16, 16, 64], [16, 64], categories=[16, 64]) == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [(2.0, 1.0), (2.0, 3.0)])
def test_kl_comes_near_the_closed_form_in_large_samples(a, b):
    """Of Beta(a, b) against the uniform: minus the entropy of the Beta. 50 bins, as binning only lowers it."""
    gen = rng(0, "beta")
    got = kl_divergence(gen.beta(a, b, 200_000), gen.random(200_000), bins=50)
    assert got == pytest.approx(-scipy.stats.beta(a, b).entropy(), abs=0.01)


def test_kl_of_large_samples_is_that_of_the_binned_distributions():
    gen = rng(1, "binned")
    edges = np.linspace(0, 1, BINS + 1)
    p = np.diff(scipy.stats.beta(2, 5).cdf(edges))
    got = kl_divergence(gen.beta(2, 5, 300_000), gen.random(300_000))
    assert got == pytest.approx(scipy.stats.entropy(p, np.full(BINS, 1 / BINS)), abs=0.01)


@given(units, units)
@settings(max_examples=100, deadline=None)
def test_kl_is_finite_and_never_negative_whatever_the_ties(p, q):
    got = kl_divergence(p, q)
    assert -1e-12 <= got < math.inf
    assert kl_divergence(p, p) == pytest.approx(0)


def test_both_ends_of_the_unit_interval_belong_to_it():
    assert kl_divergence([0.0] * 5, [1.0] * 5) > 1
    assert kl_divergence([1.0] * 5, [0.95] * 5) == pytest.approx(0)


def test_kl_of_no_values_is_not_known_and_of_wrong_ones_is_refused():
    assert math.isnan(kl_divergence([], [0.5]))
    assert math.isnan(kl_divergence([0.5], []))
    assert math.isnan(kl_null([], [0.5], rng(0, "null")))
    for wrong in ([1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            kl_divergence(wrong, [0.5])
    with pytest.raises(ValueError, match="not among the categories"):
        kl_divergence(["a"], ["c"], categories=["a", "b"])


def test_the_null_quantile_equals_permuting_one_by_one():
    gen = rng(2, "permute")
    p, q = gen.random(25) ** 2, gen.random(40)
    pooled = np.concatenate([p, q])
    plain = []
    for _ in range(3000):
        dealt = gen.permutation(pooled)
        plain.append(kl_divergence(dealt[:25], dealt[25:]))
    assert kl_null(p, q, rng(3, "null"), permutations=5000) == pytest.approx(np.quantile(plain, 0.95), rel=0.06)


def test_the_null_quantile_is_passed_by_5_percent_of_equal_samples():
    passed = []
    for study in range(600):
        gen = rng(4, "equal", study)
        p, q = gen.random(40), gen.random(40)
        passed.append(kl_divergence(p, q) > kl_null(p, q, gen, permutations=300))
    assert np.mean(passed) == pytest.approx(0.05, abs=0.027)  # three standard errors


def test_the_null_quantile_is_small_in_large_samples_and_reproducible():
    gen = rng(5, "large")
    p, q = gen.random(20_000), gen.random(20_000)
    assert kl_null(p, q, rng(6, "null")) == kl_null(p, q, rng(6, "null"))
    assert kl_null(p, q, rng(6, "null")) < 0.002
    assert kl_null(p[:20], q[:20], rng(6, "null")) > 0.2
    assert kl_null(["a"] * 9 + ["b"], ["a"] * 10, rng(6, "null"), categories=["a", "b"]) > 0


def test_the_estimators_name_says_what_it_does():
    assert f"{BINS} equal bins" in KL_ESTIMATOR
    assert "Krichevsky-Trofimov" in KL_ESTIMATOR
    assert "nats" in KL_ESTIMATOR


def test_mean_shift_by_hand():
    got = mean_shift([0.1, 0.2, 0.3], [0.2, 0.2, 0.6], rng(7, "shift"))
    assert (got.n, got.value) == (3, pytest.approx(0.4 / 3))
    assert got.ci[0] <= got.value <= got.ci[1]
    assert math.isnan(mean_shift([], [], rng(7, "shift")).value)
    assert math.isnan(mean_shift([0.1], [0.3], rng(7, "shift")).ci[0])


def test_mean_shift_has_students_interval_in_large_samples():
    gen = rng(8, "student")
    x = gen.random(400)
    x_prime = np.clip(x + gen.normal(0.05, 0.1, 400), 0, 1)
    reference = scipy.stats.ttest_rel(x_prime, x).confidence_interval(0.95)
    width = reference.high - reference.low
    got = mean_shift(x, x_prime, rng(9, "shift"))
    assert got.ci == pytest.approx((reference.low, reference.high), abs=0.05 * width)
