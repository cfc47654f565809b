"""Scores over tasks and seeds: step curves, interquartile means, profiles, probability of improvement, ranks.

After Agarwal et al. (2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice") and Demsar (2006,
"Statistical Comparisons of Classifiers over Multiple Data Sets"). ``strata`` are one array (runs, ...) for each task.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, friedmanchisquare, norm, rankdata

from harness.report.stats import Estimate, percentile_interval

FEWEST_BLOCKS = 3  # of a rank test: with two, even three methods in the same order twice have an exact p of 1/6
CHUNK = 1_000_000  # resampled numbers in memory at once

Array = NDArray[np.float64]


def step_values(times: ArrayLike, values: ArrayLike, grid: ArrayLike) -> Array:
    """The right-continuous step curve through reports ``values`` (n,) at ascending ``times`` (n,), at ``grid`` (g,).

    A report counts from its own time on, the later of two at one time; NaN before the first. Reports without a value
    (NaN) change nothing. Nothing later than a grid point is looked at.
    """
    at, height = _reports(times, values)
    if not len(at):
        return np.full(np.shape(grid), math.nan)
    index = np.searchsorted(at, np.asarray(grid, dtype=float), side="right") - 1
    return np.where(index >= 0, height[np.maximum(index, 0)], math.nan)


def area_under_curve(times: ArrayLike, values: ArrayLike, horizon: float, start: float | None = None) -> float:
    """Mean height of the step curve (see ``step_values``) over [start, horizon], in the unit of ``values``.

    ``start`` is by default the first report: the time without a score is no part of the mean. Runs that are compared
    should have one start, the latest first report among them. NaN if there is no report by ``start`` or by ``horizon``;
    the height there if both are the same time.
    """
    at, height = _reports(times, values)
    begin = (at[0] if len(at) else math.nan) if start is None else start
    if not len(at) or not at[0] <= begin <= horizon:
        return math.nan
    inside = (at > begin) & (at < horizon)
    heights = np.concatenate([step_values(at, height, [begin]), height[inside]])
    if begin == horizon:
        return float(heights[0])
    return float(heights @ np.diff(np.concatenate([[begin], at[inside], [horizon]])) / (horizon - begin))


def _reports(times: ArrayLike, values: ArrayLike) -> tuple[Array, Array]:
    """Times and values of the reports that have a value; ValueError if the times are not ascending."""
    at, height = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    if np.any(np.diff(at) < 0):
        raise ValueError("The times of a step curve must be in ascending order.")
    known = ~np.isnan(height)
    return at[known], height[known]


def iqm(values: ArrayLike, axis: int = 0) -> Array:
    """Interquartile mean along ``axis``: the mean without the lowest and the highest quarter (each n // 4 values).

    NaN are left out before the quarters are cut; NaN where all are. ``scipy.stats.trim_mean(values, 0.25)`` otherwise.
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=float), axis, -1), axis=-1)  # NaN last
    known = ordered.shape[-1] - np.isnan(ordered).sum(axis=-1, keepdims=True)
    if known.size and known.min() == known.max() > 0:
        n = int(known.flat[0])
        return np.asarray(ordered[..., n // 4 : n - n // 4].mean(axis=-1))
    place = np.arange(ordered.shape[-1])
    kept = (place >= known // 4) & (place < known - known // 4)
    with np.errstate(invalid="ignore"):
        return np.asarray(ordered.sum(axis=-1, where=kept) / kept.sum(axis=-1))


def stratified_bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Callable[..., Array],
    rng: np.random.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[Array, Array]:
    """Percentile interval (low, high) of ``statistic`` over the pooled runs, resampled within each task.

    strata: (runs of the task, ...) each, runs of tasks may differ in number, the other axes (a grid, say) may not.
    ``statistic(values, axis)`` takes the runs' axis away, as ``iqm`` and ``numpy.mean`` do; low and high have the shape
    it leaves, NaN where no resample gives a number. ValueError if a task has no runs. Agarwal et al. (2021, section
    4.1).
    """
    runs = [np.moveaxis(np.asarray(stratum, dtype=float), 0, -1) for stratum in strata]
    if not runs or any(task.shape[-1] == 0 for task in runs):
        raise ValueError("A stratified bootstrap needs at least one run of every task.")
    pooled = np.ascontiguousarray(np.concatenate(runs, axis=-1))
    chunk = max(1, CHUNK // pooled.size)
    results = []
    for begin in range(0, resamples, chunk):
        draws = _stratified_draws([task.shape[-1] for task in runs], min(chunk, resamples - begin), rng)
        results.append(statistic(np.take(pooled, draws, axis=-1), axis=-1))  # (..., chunk)
    return percentile_interval(np.moveaxis(np.concatenate(results, axis=-1), -1, 0), level)


def _stratified_draws(sizes: Sequence[int], resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (resamples, sum of sizes) into pooled strata, each stratum drawn from itself with replacement."""
    begins = np.cumsum([0, *sizes[:-1]])
    return np.concatenate(
        [begin + rng.integers(0, size, (resamples, size)) for begin, size in zip(begins, sizes, strict=True)], axis=1
    )


def above(scores: ArrayLike, thresholds: ArrayLike) -> Array:
    """1.0 where a run's score (runs,) is above a threshold (t,), else 0.0: (runs, t). A run without a score is never.

    ``stratified_bootstrap([above(task, thresholds) for task in strata], numpy.mean, rng)`` is a profile's band.
    """
    return (np.asarray(scores, dtype=float)[:, None] > np.asarray(thresholds, dtype=float)).astype(float)


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Array:
    """Share of runs (runs,) with a score above each of ``thresholds`` (t,), in [0, 1]; NaN for no runs.

    The run-score distribution of Agarwal et al. (2021, section 4.2). For scores to minimize pass both with the sign
    changed.
    """
    shares = above(scores, thresholds)
    return shares.mean(axis=0) if len(shares) else np.full(shares.shape[1], math.nan)


def probability_of_improvement(
    x_strata: Sequence[ArrayLike],
    y_strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2 for runs of one task, with a stratified bootstrap interval.

    x_strata, y_strata: scores (runs,) of each task, higher is better; 0.5 is no difference. For one task it is the
    Mann-Whitney U / (n m). Runs without a score (NaN) are left out; ``n`` counts the tasks. Runs of both sides are
    resampled independently within each task. ValueError if a task has none on one side. Agarwal et al. (2021,
    section 4.3).
    """
    tasks = [(_known(x), _known(y)) for x, y in zip(x_strata, y_strata, strict=True)]
    if not tasks or any(not len(x) or not len(y) for x, y in tasks):
        raise ValueError("The probability of improvement needs at least one score of every task on both sides.")
    values, resampled = [], np.zeros(resamples)
    for x, y in tasks:
        wins = (np.sign(x[:, None] - y) + 1) / 2
        values.append(wins.mean())
        x_drawn, y_drawn = (rng.multinomial(len(side), np.full(len(side), 1 / len(side)), resamples) for side in (x, y))
        resampled += (x_drawn @ wins * y_drawn).sum(axis=1) / wins.size
    low, high = percentile_interval(resampled / len(tasks), level)
    return Estimate(len(tasks), float(np.mean(values)), (float(low), float(high)))


def _known(scores: ArrayLike) -> Array:
    values = np.asarray(scores, dtype=float)
    return values[~np.isnan(values)]


def paired_probability_of_improvement(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Estimate:
    """Share of pairs (n,) with x above y, ties counted half, with the score interval of Wilson (1927).

    That interval and no bootstrap, which would give [1, 1] where x wins all of three pairs. With ties it is wider than
    it needs to be. Pairs without both scores (NaN) are left out. NaN for no pairs.
    """
    difference = np.asarray(x, dtype=float) - np.asarray(y, dtype=float)
    difference = difference[~np.isnan(difference)]
    n = len(difference)
    if n == 0:
        return Estimate(0, math.nan, (math.nan, math.nan))
    share = float((np.sign(difference).mean() + 1) / 2)
    z = norm.isf((1 - level) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Estimate(n, share, (max(0.0, middle - half), min(1.0, middle + half)))


@dataclass(frozen=True)
class Ranks:
    """Ranks of methods over blocks (tasks): 1 is best, ties share the mean rank.

    blocks: how many were complete and counted; average: (methods,); friedman_p: that all methods are alike; nemenyi_p:
    (methods, methods), of every two, adjusted for their number.
    """

    blocks: int
    average: Array
    friedman_p: float
    nemenyi_p: Array


def ranks(scores: ArrayLike, higher_is_better: bool = True) -> Ranks:
    """Average ranks, Friedman's test and Nemenyi's pairwise p-values of ``scores`` (blocks, methods).

    A block is an independent data set or task, its entry a summary over seeds; seeds of one task are not blocks. Blocks
    with a missing score (NaN) are left out. With two methods Friedman's test is the sign test (normal limit). All p are
    1 if every block is a tie. ValueError for fewer than two methods or three complete blocks. Demsar (2006, section
    3.2.2).
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError("Ranks need the scores of at least two methods.")
    table = table[~np.isnan(table).any(axis=1)]
    blocks = len(table)
    if blocks < FEWEST_BLOCKS:
        raise ValueError(
            f"Ranks need at least {FEWEST_BLOCKS} tasks in which every method has a score; there are {blocks}."
        )
    placed = rankdata(-table if higher_is_better else table, axis=1)
    import scikit_posthocs  # a second that only this needs

    nemenyi = scikit_posthocs.posthoc_nemenyi_friedman(placed).to_numpy(dtype=float)
    return Ranks(blocks, placed.mean(axis=0), _friedman(placed), nemenyi)


def _friedman(placed: Array) -> float:
    if np.ptp(placed) == 0:
        return 1.0
    if placed.shape[1] == 2:
        signs = np.sign(placed[:, 1] - placed[:, 0])
        return float(chi2.sf(signs.sum() ** 2 / np.count_nonzero(signs), 1))
    return float(friedmanchisquare(*placed.T).pvalue)
