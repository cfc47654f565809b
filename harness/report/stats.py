"""Statistics of paired, right-censored times to target.

A time is a number, ``inf`` where the run used its budget up without reaching the target (censored), or NaN where it is
not known. Pairs share a seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

EXACT_UP_TO = 200  # pairs; the exact signed-rank distribution takes milliseconds there, the normal limit is good beyond


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


@dataclass(frozen=True)
class Effect:
    """The median over pairs of 1 - T_variant / T_off, known to lie in [low, high] (equal where it is identified).

    ci: bootstrap interval (low end, high end) that holds for every value in [low, high]; NaN for fewer than two pairs.
    """

    n: int
    low: float
    high: float
    ci: tuple[float, float]

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
    rng: np.random.Generator,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Effect:
    """Effect of the variant on the time to target over pairs; times (n,) as in ``reductions``.

    The median is monotone in every pair, so the medians of the pairs' lower and upper bounds are its sharp bounds. The
    interval is the percentile bootstrap over pairs: from the lower quantile of the resampled lower medians to the
    upper quantile of the upper ones, hence conservative where censoring leaves the median open.
    """
    bounds = reductions(variant, off, budget)
    n = len(bounds)
    if n == 0:
        return Effect(0, math.nan, math.nan, (math.nan, math.nan))
    low, high = (_median(side) for side in bounds.T)
    if n == 1:
        return Effect(1, float(low), float(high), (math.nan, math.nan))
    draws = rng.integers(0, n, size=(resamples, n))
    tail = (1.0 - level) / 2
    lows, highs = (np.sort(_median(side[draws])) for side in bounds.T)
    cut = int(tail * resamples)
    return Effect(n, float(low), float(high), (float(lows[cut]), float(highs[resamples - 1 - cut])))


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
