"""The test's level and the interval's coverage in 2,000 made-up studies: the functions of scripts/check_statistics.py.

A quarter of off's runs is censored. 8,000 and more studies (standard error 0.2 %) gave levels of 4.2 % (n = 10) to
4.9 % and coverages of 95.7, 95.6 and 95.2 % under the null, 96.0, 96.7 and 97.0 % at a reduction of 15 %: conservative,
as a censored pair counts at its bounds.
"""

import pytest

from scripts.check_statistics import Study, coverage, draw_studies, effect_interval, rejections

pytestmark = pytest.mark.slow

STUDIES = 2000
CENSORED = 0.25


@pytest.mark.parametrize("pairs", [10, 30, 50])
def test_the_signed_rank_test_rejects_a_true_null_in_about_5_percent(pairs):
    found = rejections(draw_studies(STUDIES, pairs, CENSORED, reduction=0.0))
    assert found.n == STUDIES
    assert 0.03 <= found.value <= 0.07


@pytest.mark.parametrize("pairs", [10, 30, 50])
def test_the_95_percent_interval_covers_a_reduction_of_zero_in_about_95_percent(pairs):
    found = coverage(draw_studies(STUDIES, pairs, CENSORED, reduction=0.0), effect_interval, truth=0.0)
    assert found.absent < 0.02  # fewer than six informative pairs of ten
    assert 0.93 <= found.value <= 0.97


@pytest.mark.parametrize("pairs", [10, 30, 50])
def test_the_95_percent_interval_covers_a_true_reduction_at_least_as_often(pairs):
    found = coverage(draw_studies(STUDIES, pairs, CENSORED, reduction=0.15), effect_interval, truth=0.15)
    assert 0.93 <= found.value <= 0.98


@pytest.mark.parametrize("pairs", [10, 30, 50])
def test_without_censoring_both_are_at_their_nominal_level(pairs):
    found = coverage(draw_studies(STUDIES, pairs, 0.0, 0.15), effect_interval, 0.15)
    assert found.value == pytest.approx(0.95, abs=0.015)
    assert rejections(draw_studies(STUDIES, pairs, 0.0, 0.0)).value == pytest.approx(0.05, abs=0.015)


def test_the_counting_itself():
    studies = list(draw_studies(3, 8, 0.25, 0.0))
    assert all(isinstance(study, Study) for study in studies)
    ends = iter([(0.0, 1.0), (2.0, 3.0), (float("nan"), float("nan"))])
    found = coverage(iter(studies), lambda _: next(ends), truth=0.5)
    assert (found.value, found.n) == (0.5, 2)
    assert found.absent == pytest.approx(1 / 3)
    assert str(found) == "50.0 (35.4, 33.3 none)"
