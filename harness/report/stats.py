"""Statistics of paired, right-censored times to target.

A time is a number, ``inf`` where the run used its budget up without reaching the target (censored), or NaN where it is
not known. Pairs share a seed. What the intervals and the test do in repeated studies: ``scripts/check_statistics.py``.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr
from scipy.stats import norm, rankdata, t

EXACT_UP_TO = 200  # pairs; the exact signed-rank distribution takes milliseconds there, the normal limit is good beyond
BOOTSTRAP_CHUNK = 500_000  # resampled numbers in memory at once
FEWEST_FOR_POWER = 5  # informative pairs; a spread estimated from fewer says nothing about the seeds needed
# numbers of pairs tried by pairs_needed; the two-sided signed-rank test cannot reject at 5 % with fewer than six
PAIRS_TRIED = (*range(6, 30), *range(30, 100, 5), *range(100, 300, 20), *range(300, 1000, 50), *range(1000, 2001, 100))
POWER_STUDIES = 1000  # simulated per number of pairs: standard error of a power of 80 % is 1.3 %
POWER_ATOMS = 200  # points that the smoothed distribution of the pairs is cut into


@dataclass(frozen=True)
class Survival:
    """A Kaplan-Meier estimate: ``survival[i]`` is the share still without the event right after ``times[i]``."""

    times: NDArray[np.float64]
    survival: NDArray[np.float64]

    def quantile(self, share: float) -> float:
        """The time by which ``share`` of the runs had the event; inf if the curve never gets there.

        Where the curve is flat at exactly 1 - share, the middle of the flat piece (so that without censoring the median
        is the usual one), or its start if the curve ends there: the convention of R's survival package.
        """
        level = 1.0 - share
        reached = np.flatnonzero(self.survival <= level + 1e-12)
        if not len(reached):
            return math.inf
        first = reached[0]
        flat = abs(self.survival[first] - level) < 1e-12 and first + 1 < len(self.times)
        return float((self.times[first] + self.times[first + 1]) / 2 if flat else self.times[first])


def kaplan_meier(times: ArrayLike, observed: ArrayLike) -> Survival:
    """The product-limit estimate (Kaplan and Meier, 1958) from event or censoring ``times`` (n,) and ``observed`` (n,).

    Runs censored at the time of an event count as at risk there.
    """
    at = np.asarray(times, dtype=float)
    event = np.asarray(observed, dtype=bool)
    steps = np.unique(at[event])
    at_risk = len(at) - np.searchsorted(np.sort(at), steps, side="left")
    events = np.searchsorted(np.sort(at[event]), steps, side="right")
    deaths = np.diff(events, prepend=0)
    return Survival(steps, np.cumprod(1.0 - deaths / at_risk, dtype=np.float64))


def restricted_mean(times: ArrayLike, observed: ArrayLike, horizon: float) -> float:
    """Mean time to the event, cut at ``horizon`` (> 0): the area under the Kaplan-Meier curve up to there.

    times (n,), observed (n,) as in ``kaplan_meier``. Where all are followed to the horizon or to their event this is
    the mean of min(T, horizon). A curve that ends in a censoring before the horizon stays at its last height. NaN for
    no runs. Royston and Parmar (2013).
    """
    if not np.size(times):
        return math.nan
    curve = kaplan_meier(times, observed)
    inside = curve.times < horizon
    at = np.concatenate([[0.0], curve.times[inside], [horizon]])
    heights = np.concatenate([[1.0], curve.survival[inside]])
    return float(heights @ np.diff(at))


@dataclass(frozen=True)
class Estimate:
    """A number from ``n`` pairs (or runs) with its interval (low end, high end); NaN where there is none."""

    n: int
    value: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class Effect:
    """The median over pairs of 1 - T_variant / T_off, known to lie in [low, high] (equal where it is identified).

    n: pairs; informative: those of them in which at least one side reached the target. ci: interval (low end, high end)
    that holds for every value in [low, high]; NaN where too few are informative for its level (fewer than six at 95 %).
    """

    n: int
    low: float
    high: float
    ci: tuple[float, float]
    informative: int

    @property
    def identified(self) -> bool:
        return self.low == self.high


def reductions(variant: ArrayLike, off: ArrayLike, budget: float) -> NDArray[np.float64]:
    """Bounds (n, 2) of each pair's 1 - T_variant / T_off from times (n,), inf = censored; times are at most ``budget``.

    Both reached: exact. Only the variant reached: T_off is beyond the budget, so between 1 - T_variant / budget and 1.
    Only off reached: below 1 - budget / T_off, without a lower bound. Neither: a tie, 0.
    """
    v, o = np.asarray(variant, dtype=float), np.asarray(off, dtype=float)
    v_late, o_late = np.isinf(v), np.isinf(o)
    low = 1.0 - np.where(v_late, budget, v) / np.where(o_late, budget, o)
    high = low.copy()
    high[~v_late & o_late] = 1.0
    low[v_late & ~o_late] = -np.inf
    low[v_late & o_late] = high[v_late & o_late] = 0.0
    return np.stack([low, high], axis=1)


def paired_effect(
    variant: ArrayLike,
    off: ArrayLike,
    budget: float,
    level: float = 0.95,
) -> Effect:
    """Effect of the variant on the time to target over pairs; times (n,) as in ``reductions``.

    The median is monotone in every pair, so the medians of the pairs' lower and upper bounds are its sharp bounds; a
    pair with both censored counts as no difference, 0.

    The interval is ``median_interval``: its low end from the lower bounds and its high end from the upper ones, hence
    conservative where censoring leaves pairs open. Pairs with both censored say nothing about the size of the ratio and
    are left out of it (as such strata drop out of a stratified Cox model); as exact zeros they would narrow it around
    0. It is widened to contain [low, high].
    """
    bounds = reductions(variant, off, budget)
    if len(bounds) == 0:
        return Effect(0, math.nan, math.nan, (math.nan, math.nan), 0)
    informative = np.isfinite(np.asarray(variant, dtype=float)) | np.isfinite(np.asarray(off, dtype=float))
    low, high = (float(_median(side)) for side in bounds.T)
    ends = median_interval(bounds[informative, 0], bounds[informative, 1], level)
    if not math.isnan(ends[0]):
        ends = min(ends[0], low), max(ends[1], high)
    return Effect(len(bounds), low, high, ends, int(informative.sum()))


def median_interval(lower: ArrayLike, upper: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a median from values known to lie in [lower, upper] (n,), equal where they are exact.

    The interpolated order-statistic interval of Hettmansperger and Sheather (1986), free of the values' distribution.
    The percentile bootstrap of a median picks from the same order statistics but not at the right level: of 20,000
    normal samples it covers 87 % at n = 7 and 92 % at n = 15, this one 94.5 to 95.3 % at every n from 6 to 50. Its low
    end is read from the lower bounds, its high end from the upper ones. (NaN, NaN) if even the range of the values
    holds the median less often than ``level``: fewer than six values at 95 %.
    """
    lows, highs = np.sort(np.asarray(lower, dtype=float)), np.sort(np.asarray(upper, dtype=float))[::-1]
    rank, share = _median_ranks(len(lows), level)
    if rank == 0:
        return math.nan, math.nan
    low, high = (_between(side[rank - 1], side[rank], share) for side in (lows, highs))
    return low, high


@lru_cache(maxsize=1024)
def _median_ranks(n: int, level: float) -> tuple[int, float]:
    """The order statistic k (from 1; 0 if none will do) and how far the interval's end is from it towards the next."""
    ranks = np.arange(1, n // 2 + 2)
    coverage = 1 - 2 * bdtr(ranks - 1, n, 0.5) if n else np.zeros(1)  # of the interval between the k-th from both ends
    k = int(np.count_nonzero(coverage >= level))
    if k == 0:
        return 0, 0.0
    excess = (coverage[k - 1] - level) / (coverage[k - 1] - coverage[k])
    return k, float((n - k) * excess / (k + (n - 2 * k) * excess))


def _between(first: float, second: float, share: float) -> float:
    """``first`` moved by ``share`` (0 <= share < 1) towards ``second``; either may be infinite."""
    return float(first if share == 0 or first == second else (1 - share) * first + share * second)


def relative_drop(variant: ArrayLike, off: ArrayLike, mode: str, level: float = 0.95) -> Estimate:
    """Median over pairs of the relative loss of score against off, with ``median_interval``; scores (n,).

    (off - variant) / abs(off) if higher is better (``mode`` "max"), (variant - off) / abs(off) if lower is ("min"):
    positive where the variant is worse. Pairs with an unknown score (NaN) are left out; ``n`` counts the others. At
    off = 0 a difference is infinite. ValueError for another mode.
    """
    if mode not in ("max", "min"):
        raise ValueError(f'mode must be "max" or "min", not {mode!r}.')
    v, o = np.asarray(variant, dtype=float), np.asarray(off, dtype=float)
    lost = o - v if mode == "max" else v - o
    with np.errstate(divide="ignore", invalid="ignore"):
        drops = np.where(lost == 0, 0.0, lost / np.abs(o))
    drops = drops[~np.isnan(drops)]
    value = float(_median(drops)) if len(drops) else math.nan
    return Estimate(len(drops), value, median_interval(drops, drops, level))


def restricted_mean_reduction(
    variant: ArrayLike,
    off: ArrayLike,
    budget: float,
    rng: np.random.Generator,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """1 - mean(min(T_variant, budget)) / mean(min(T_off, budget)) over pairs; times (n,) as in ``reductions``.

    The fallback effect where fewer than half of the runs reach the target: censored runs count with the budget, so it
    is defined however many there are, and it depends on the budget. Interval: ``paired_bootstrap``.
    """

    def reduction(v: NDArray[np.float64], o: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1.0 - v.mean(axis=-1) / o.mean(axis=-1))

    return paired_bootstrap(reduction, _cut(variant, budget), _cut(off, budget), rng, resamples, level)


def sd_ratio(
    variant: ArrayLike,
    off: ArrayLike,
    budget: float,
    rng: np.random.Generator,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """SD(min(T_variant, budget)) / SD(min(T_off, budget)), sample standard deviations; times (n,) as in ``reductions``.

    NaN for fewer than two pairs and where neither side varies (both all censored, say); inf where only off does not.
    Interval: ``paired_bootstrap``.
    """

    def ratio(v: NDArray[np.float64], o: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(_spread(v) / _spread(o))

    if np.size(variant) < 2:
        return Estimate(np.size(variant), math.nan, (math.nan, math.nan))
    return paired_bootstrap(ratio, _cut(variant, budget), _cut(off, budget), rng, resamples, level)


def _cut(times: ArrayLike, budget: float) -> NDArray[np.float64]:
    return np.minimum(np.asarray(times, dtype=float), budget)


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sample SD along the last axis; exactly 0 where all are equal (rounding of the mean would leave a residue)."""
    return np.asarray(np.where(np.ptp(values, axis=-1) == 0, 0.0, values.std(axis=-1, ddof=1)))


def paired_bootstrap(
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    first: ArrayLike,
    second: ArrayLike,
    rng: np.random.Generator,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """``statistic`` of paired values (n,), (n,), reducing the last axis, with its percentile bootstrap interval.

    Pairs are resampled with replacement. The percentiles are those of the expanded interval of Hesterberg (2015), which
    makes up for the bootstrap's narrowness at small n as Student's t does. Resamples on which the
    statistic is not defined (NaN) are left out. NaN for no pairs, without an interval for one.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    n = len(x)
    if n == 0:
        return Estimate(0, math.nan, (math.nan, math.nan))
    value = float(statistic(x, y))
    if n == 1:
        return Estimate(1, value, (math.nan, math.nan))
    chunk = max(1, BOOTSTRAP_CHUNK // n)
    sizes = [min(chunk, resamples - begin) for begin in range(0, resamples, chunk)]
    draws = (rng.integers(0, n, size=(size, n)) for size in sizes)
    resampled = np.concatenate([statistic(x[drawn], y[drawn]) for drawn in draws])
    tail = float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1)))
    low, high = percentile_interval(resampled, 1 - 2 * tail)
    return Estimate(n, value, (float(low), float(high)))


def percentile_interval(
    resampled: NDArray[np.float64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle ``level`` of the first axis of (resamples, ...): two arrays (...), NaN where no resample is a number.

    NaN are left out; infinite values count as large or small. No interpolation: the ends are resampled values.
    """
    ordered = np.sort(resampled, axis=0)  # NaN last
    known = np.count_nonzero(~np.isnan(ordered), axis=0)
    cut = ((1.0 - level) / 2 * known).astype(int)
    low, high = (
        np.take_along_axis(ordered, np.asarray(index)[None], axis=0)[0]
        for index in (cut, np.maximum(known - 1 - cut, 0))
    )
    return low, high


def signed_differences(variant: ArrayLike, off: ArrayLike, budget: float) -> NDArray[np.float64]:
    """What the signed-rank test ranks, positive where the variant is sooner; times (n,) as in ``reductions``.

    Both reached: T_off - T_variant. One censored: the other wins by budget - T (its own time; at the very budget by the
    least positive amount, as it still wins). Both censored: 0, a tie.
    """
    v, o = np.asarray(variant, dtype=float), np.asarray(off, dtype=float)
    difference = np.minimum(o, budget) - np.minimum(v, budget)
    least = np.nextafter(0.0, 1.0)
    difference = np.where(np.isinf(o) & ~np.isinf(v), np.maximum(difference, least), difference)
    return np.where(np.isinf(v) & ~np.isinf(o), np.minimum(difference, -least), difference)


def wilcoxon_signed_rank(differences: ArrayLike) -> float:
    """Two-sided p-value of the signed-rank test with Pratt's zeros (ranked, then left out; Pratt, 1959).

    Exact given the ranks (ties and zeros included) up to 200 pairs: under the null every non-zero rank has either sign
    with probability 1/2. Normal limit beyond. 1 if all differences are zero, NaN without any.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) == 0:
        return math.nan
    ranks = rankdata(np.abs(d))[d != 0]
    positive = float(ranks[d[d != 0] > 0].sum())
    if len(ranks) == 0:
        return 1.0
    if len(d) > EXACT_UP_TO:
        z = (abs(positive - ranks.sum() / 2)) / math.sqrt((ranks**2).sum() / 4)
        return float(min(1.0, 2 * norm.sf(z)))
    return _exact_p(np.rint(2 * ranks).astype(int), round(2 * positive))


def _exact_p(ranks: NDArray[np.int_], positive: int) -> float:
    """P of a sum of randomly signed ``ranks`` (doubled midranks: integers) as far from its mean as ``positive``."""
    total = int(ranks.sum())
    share = np.zeros(total + 1)  # share[s]: probability that the chosen ranks add up to s
    share[0] = 1.0
    for rank in ranks:
        moved = share[: total + 1 - rank] / 2
        share /= 2
        share[rank:] += moved
    least = min(positive, total - positive)
    return float(min(1.0, 2 * share[: least + 1].sum()))


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation of the signed-rank test: an effect size in [-1, 1].

    The share of rank mass in favour of positive differences (variant sooner) minus that of negative ones (Kerby, 2014).
    Zeros are ranked as in ``wilcoxon_signed_rank`` and favour neither side, so many ties bring it towards 0. NaN for no
    pairs.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) == 0:
        return math.nan
    ranks = rankdata(np.abs(d))
    return float(np.sign(d) @ ranks / ranks.sum())


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjusted p-values of one family ``p`` (m,); NaN stays NaN and is no member of it."""
    raw = np.asarray(p, dtype=float)
    adjusted = np.full(raw.shape, math.nan)
    order = np.argsort(raw)[: np.count_nonzero(~np.isnan(raw))]  # NaN sort last
    steps = raw[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def pairs_needed(
    variant: ArrayLike,
    off: ArrayLike,
    budget: float,
    rng: np.random.Generator,
    reduction: float = 0.15,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """How many pairs the signed-rank test needs to see a median reduction of ``reduction``; times as in ``reductions``.

    The smallest n of PAIRS_TRIED at which the two-sided test at level ``alpha`` rejects in at least a share ``power``
    of simulated studies; inf if none does (more than 2,000); NaN if in fewer than five pairs a side reached the target.

    A study resamples the observed pairs. Their log ratios log(T_variant / T_off) are moved to the median 0, which keeps
    spread and shape; each pair is also taken with its two sides swapped, so that this null is symmetric as the test's
    own is; then the variant's times are multiplied by 1 - ``reduction``, all are cut at the budget, and the test ranks
    the differences as usual. Pairs with both censored remain ties; one censored time is filled in from the other pairs
    (``_ratios``). The number is rough and rather high than low: of made-up pilots of 30 pairs (log-normal, a quarter
    censored) half say 180 to 240 where 165 is right. Power by resampling a pilot: Collings and Hamilton (1988).
    """
    v, o = np.asarray(variant, dtype=float), np.asarray(off, dtype=float)
    decided = np.isfinite(v) | np.isfinite(o)
    if np.count_nonzero(decided) < FEWEST_FOR_POWER:
        return math.nan
    points = max(1, POWER_ATOMS // len(v))
    ratios = _ratios(v[decided], o[decided], budget, points)
    base = np.where(np.isinf(o[decided])[:, None], v[decided, None] / np.exp(ratios), o[decided, None])
    pair = np.stack([base * np.exp(ratios), base])
    differences = _cut(pair[::-1], budget) - _cut(pair * (1 - reduction), budget)
    atoms = np.concatenate([differences.ravel(), np.zeros(2 * points * np.count_nonzero(~decided))])
    enough = bisect_left(PAIRS_TRIED, True, key=lambda n: _power(atoms, n, alpha, rng) >= power)
    return float(PAIRS_TRIED[enough]) if enough < len(PAIRS_TRIED) else math.inf


def _ratios(variant: NDArray[np.float64], off: NDArray[np.float64], budget: float, points: int) -> NDArray[np.float64]:
    """Log ratios of times (m,), at most one of a pair censored, around their median: (m, points), equally likely.

    Both reached: spread over a normal kernel (Silverman, 1986, eq. 3.31), as five pairs are no five-point distribution.
    One censored: the ratio is only known to be beyond the one at the budget, so it is spread over those of the others,
    of either sign, that are (redistribution to the right, Efron, 1967); the one at the budget if none is.
    """
    ratios = np.log(_cut(variant, budget) / _cut(off, budget))
    ratios -= np.median(ratios)
    side = np.isinf(variant).astype(int) - np.isinf(off).astype(int)  # 1: at least so much; -1: at most
    exact = ratios[side == 0]
    width = 0.0
    if len(exact) > 1:
        quartiles = np.subtract(*np.quantile(exact, [0.75, 0.25])) / 1.34
        width = 0.9 * min(exact.std(ddof=1), quartiles or math.inf) * len(exact) ** -0.2
    shares = (np.arange(points) + 0.5) / points
    spread_out = ratios[:, None] + width * norm.ppf(shares)
    pool = np.concatenate([spread_out[side == 0].ravel(), -spread_out[side == 0].ravel()])
    for pair in np.flatnonzero(side):
        beyond = pool[side[pair] * pool >= side[pair] * ratios[pair]]
        spread_out[pair] = np.quantile(beyond, shares) if len(beyond) else ratios[pair]
    return np.asarray(spread_out)


def _power(atoms: NDArray[np.float64], n: int, alpha: float, rng: np.random.Generator) -> float:
    """Share of POWER_STUDIES studies of ``n`` differences drawn from ``atoms`` in which the signed-rank test rejects.

    A study is the number of times that each atom was drawn, so its cost does not grow with n. Pratt's zeros and
    midranks as in ``wilcoxon_signed_rank``; normal limit with continuity correction.
    """
    values, counts = np.unique(atoms, return_counts=True)
    sizes, group = np.unique(np.abs(values), return_inverse=True)
    members = np.equal.outer(group, np.arange(len(sizes))).astype(float)  # (values, groups of equal size)
    drawn = rng.multinomial(n, counts / len(atoms), size=POWER_STUDIES).astype(float)
    tied = drawn @ members
    ranks = np.cumsum(tied, axis=1) - (tied - 1) / 2
    balance = drawn @ (members * np.sign(values)[:, None])  # positive minus negative ones of each size
    nonzero = tied * (sizes > 0)
    away = np.abs((ranks * balance).sum(axis=1)) / 2
    variance = (ranks**2 * nonzero).sum(axis=1) / 4
    return float(np.mean(away - 0.5 >= norm.isf(alpha / 2) * np.sqrt(variance)))


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median along the last axis; values may be -inf, which ``numpy.median`` would turn into NaN with a warning."""
    n = values.shape[-1]
    middle = np.partition(values, [(n - 1) // 2, n // 2], axis=-1)
    return (middle[..., (n - 1) // 2] + middle[..., n // 2]) / 2


def median_of(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The median of the values that are numbers; NaN if none is."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    return float(np.median(known)) if len(known) else math.nan
