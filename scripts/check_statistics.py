"""What the report's test and intervals do in repeated made-up studies: level of the test, coverage of the intervals.

    python scripts/check_statistics.py                      # 2,000 studies for every number: a minute or two
    python scripts/check_statistics.py --studies 200

A study is n pairs of times to target. Both runs of a pair share the log-normal factor of their seed and each has a
log-normal factor of its own, all with standard deviation 0.5 on the log scale; the variant's time is then shortened by
the stated reduction, which is the true median of 1 - T_variant / T_off. The budget is the quantile of off's times that
censors the stated share of off's runs (and fewer of the variant's where it is sooner). At a reduction of 0, the null,
both runs of a pair have one distribution. The truths of the restricted means and the SDs are taken from two million
pairs. After each number: its Monte-Carlo standard error. Studies without an interval (too few informative pairs) are
counted apart, not as misses.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from harness.report.stats import (
    paired_effect,
    restricted_mean_reduction,
    sd_ratio,
    signed_differences,
    wilcoxon_signed_rank,
)
from harness.seeds import rng

PAIRS = (10, 30, 50)
CENSORED = (
    0.0,
    0.1,
    0.25,
    0.5,
)  # share of off's runs beyond the budget; 0.2 to 0.3 is usual, 0.5 the harshest for T@tau
REDUCTIONS = (0.0, 0.15)
SEED_SD = OWN_SD = 0.5  # of log time: between seeds, and of each run around its seed
RESAMPLES = 1000  # of the bootstrap in a study
TRUTH_PAIRS = 2_000_000

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """Times of ``variant`` and ``off`` (n,), inf beyond the ``budget``."""

    variant: Times
    off: Times
    budget: float


def draw_study(pairs: int, censored: float, reduction: float, gen: np.random.Generator) -> Study:
    """One study; ``censored`` and ``reduction`` in [0, 1). Without censoring the budget is the longest time."""
    seeds = SEED_SD * gen.normal(size=pairs)
    variant, off = np.exp(seeds + OWN_SD * gen.normal(size=(2, pairs)))
    variant *= 1 - reduction
    if censored == 0:
        return Study(variant, off, float(max(variant.max(), off.max())))
    budget = math.exp(math.hypot(SEED_SD, OWN_SD) * norm.isf(censored))
    variant, off = (np.where(times > budget, math.inf, times) for times in (variant, off))
    return Study(variant, off, budget)


def draw_studies(studies: int, pairs: int, censored: float, reduction: float, seed: int = 0) -> Iterator[Study]:
    """``studies`` of them, the same for the same arguments."""
    for study in range(studies):
        yield draw_study(pairs, censored, reduction, rng(seed, "study", pairs, str(censored), str(reduction), study))


@dataclass(frozen=True)
class Share:
    """Of ``n`` studies the share that rejects or covers, in [0, 1]; ``absent`` is the share left out of these."""

    value: float
    n: int
    absent: float = 0.0

    def __str__(self) -> str:
        error = math.sqrt(self.value * (1 - self.value) / self.n) if self.n else math.nan
        absent = f", {100 * self.absent:.1f} none" if self.absent else ""
        return f"{100 * self.value:.1f} ({100 * error:.1f}{absent})"


def rejections(studies: Iterator[Study], alpha: float = 0.05) -> Share:
    """How often the signed-rank test has p < alpha."""
    rejected = [wilcoxon_signed_rank(signed_differences(s.variant, s.off, s.budget)) < alpha for s in studies]
    return Share(float(np.mean(rejected)), len(rejected))


def coverage(studies: Iterator[Study], interval: Callable[[Study], tuple[float, float]], truth: float) -> Share:
    """How often the interval holds the truth, among studies that have one."""
    ends = np.array([interval(study) for study in studies])
    known = ~np.isnan(ends).any(axis=1)
    held = (ends[known, 0] <= truth) & (truth <= ends[known, 1])
    return Share(float(held.mean()) if len(held) else math.nan, len(held), 1 - len(held) / len(ends))


def effect_interval(study: Study) -> tuple[float, float]:
    return paired_effect(study.variant, study.off, study.budget).ci


def restricted_mean_interval(study: Study) -> tuple[float, float]:
    gen = rng(0, "restricted mean")
    return restricted_mean_reduction(study.variant, study.off, study.budget, gen, RESAMPLES).ci


def sd_interval(study: Study) -> tuple[float, float]:
    return sd_ratio(study.variant, study.off, study.budget, rng(0, "sd"), RESAMPLES).ci


def cut_truths(censored: float, reduction: float) -> tuple[float, float]:
    """Reduction of the restricted mean and ratio of SDs in the population."""
    study = draw_study(TRUTH_PAIRS, censored, reduction, rng(0, "truth"))
    variant, off = (np.minimum(times, study.budget) for times in (study.variant, study.off))
    return float(1 - variant.mean() / off.mean()), float(variant.std() / off.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="studies for every number (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up studies (default 0)")
    options = parser.parse_args()
    if options.studies < 1:
        parser.error("--studies must be at least 1")

    def drawn(pairs: int, censored: float, reduction: float) -> Iterator[Study]:
        return draw_studies(options.studies, pairs, censored, reduction, options.seed)

    print(f"{options.studies} studies for every number; Monte-Carlo standard error in brackets; all in %.")
    _table(
        "Rejected by the two-sided signed-rank test at 5 % under the null (nominal 5.0)",
        lambda pairs, censored, _: rejections(drawn(pairs, censored, 0.0)),
        REDUCTIONS[:1],
    )
    _table(
        "Rejected at a true reduction of 15 % (the power)",
        lambda pairs, censored, reduction: rejections(drawn(pairs, censored, reduction)),
        REDUCTIONS[1:],
    )
    _table(
        "Coverage of the interval of the median reduction (nominal 95.0)",
        lambda pairs, censored, reduction: coverage(drawn(pairs, censored, reduction), effect_interval, reduction),
    )
    for which, (name, interval) in enumerate(
        [("reduction of the restricted mean", restricted_mean_interval), ("ratio of the SDs", sd_interval)]
    ):
        truths = {(c, r): cut_truths(c, r)[which] for c in CENSORED[1:] for r in REDUCTIONS}

        def covered(pairs: int, censored: float, reduction: float, truths=truths, interval=interval) -> Share:
            return coverage(drawn(pairs, censored, reduction), interval, truths[censored, reduction])

        title = f"Coverage of the interval of the {name}, both cut at the budget (nominal 95.0)"
        _table(title, covered, censored=CENSORED[1:])


def _table(
    title: str,
    cell: Callable[[int, float, float], Share],
    reductions: tuple[float, ...] = REDUCTIONS,
    censored: tuple[float, ...] = CENSORED,
) -> None:
    print(f"\n{title}")
    print(f"{'reduction':>9}  {'censored':>8}" + "".join(f"{f'n = {pairs}':>24}" for pairs in PAIRS))
    for reduction in reductions:
        for share in censored:
            cells = "".join(f"{cell(pairs, share, reduction)!s:>24}" for pairs in PAIRS)
            print(f"{reduction:>9.0%}  {share:>8.0%}{cells}", flush=True)


if __name__ == "__main__":
    main()
