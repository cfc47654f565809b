"""How the hyperparameters of two groups of trials differ, one coordinate of the unit cube at a time."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.report.stats import Estimate, paired_bootstrap

BINS = 10
KL_ESTIMATOR = (
    f"plug-in estimate over {BINS} equal bins of [0, 1] (categorical: the categories) with 1/2 added to every count "
    "(Krichevsky-Trofimov), in nats"
)

Categories = Sequence[float | str | bool]


def kl_divergence(p: ArrayLike, q: ArrayLike, bins: int = BINS, categories: Categories | None = None) -> float:
    """KL(P || Q) in nats from samples ``p`` (n,) and ``q`` (m,), as KL_ESTIMATOR says; NaN if one is empty.

    Values are in [0, 1] or, where ``categories`` are passed, among these; ValueError otherwise. Adding 1/2 to every
    count (Krichevsky and Trofimov, 1981) keeps it finite. It is of the binned distributions, so at most the divergence
    of the densities as samples grow, and not 0 for two samples of one distribution: ``kl_null`` says how far off.
    """
    counts = [_counts(sample, bins, categories) for sample in (p, q)]
    if any(count.sum() == 0 for count in counts):
        return math.nan
    return float(_kl(counts[0], counts[1]))


def kl_null(
    p: ArrayLike,
    q: ArrayLike,
    rng: np.random.Generator,
    permutations: int = 2000,
    bins: int = BINS,
    categories: Categories | None = None,
    level: float = 0.95,
) -> float:
    """What sampling noise alone gives: the ``level`` quantile of ``kl_divergence`` when labels are permuted.

    The values of both samples are dealt out again at random to groups of the same sizes. An estimate below it is no
    evidence of a difference. It takes the values as independent; trials of one model-based search are not, so their
    noise is larger than this.
    """
    first, second = (_counts(sample, bins, categories) for sample in (p, q))
    if first.sum() == 0 or second.sum() == 0:
        return math.nan
    pooled = first + second
    dealt = rng.multivariate_hypergeometric(pooled, int(first.sum()), size=permutations)  # counts of permuted labels
    return float(np.quantile(_kl(dealt, pooled - dealt), level))


def _kl(p: NDArray[np.int64], q: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of smoothed counts along the last axis."""
    share_p, share_q = ((counts + 0.5) / (counts + 0.5).sum(axis=-1, keepdims=True) for counts in (p, q))
    return np.asarray((share_p * np.log(share_p / share_q)).sum(axis=-1))


def _counts(sample: ArrayLike, bins: int, categories: Categories | None) -> NDArray[np.int64]:
    values = np.asarray(sample)
    if categories is not None:
        counts = np.array([np.count_nonzero(values == category) for category in categories], dtype=np.int64)
        if counts.sum() != values.size:
            raise ValueError(f"A sample has values that are not among the categories {list(categories)}.")
        return counts
    values = values.astype(float)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError("The values of a unit coordinate must be in [0, 1].")
    return np.histogram(values, bins=bins, range=(0, 1))[0].astype(np.int64)


def mean_shift(
    x: ArrayLike, x_prime: ArrayLike, rng: np.random.Generator, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """Mean of x' - x over trials, values (n,) of one unit coordinate, in [-1, 1]; interval: ``paired_bootstrap``.

    Takes the trials as independent. NaN for none, no interval for one.
    """

    def shift(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((after - before).mean(axis=-1))

    return paired_bootstrap(shift, x, x_prime, rng, resamples, level)
