"""Kernel density estimates on the unit cube, for BOHB."""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from harness.schedulers.bo.encoding import Encoder
from harness.space import Categorical

BANDWIDTH_FACTOR = 3.0  # widens the kernels of continuous coordinates when drawing, to explore
MIN_BANDWIDTH = 1e-3  # keeps some diversity when all observations share a value


class Coordinates:
    """One coordinate per hyperparameter: an ``Encoder``'s, but the number of the choice for an unordered categorical.

    ``choices``: shape (hyperparameters,), the number of choices of an unordered categorical, 0 for all others.
    """

    def __init__(self, encoder: Encoder):
        domains = encoder.space.domains.values()
        unordered = [isinstance(d, Categorical) and not d.ordered for d in domains]
        self._widths = encoder.widths
        self.choices = np.array([w if u else 0 for w, u in zip(self._widths, unordered, strict=True)], dtype=int)

    def narrow(self, points: np.ndarray) -> np.ndarray:
        """Points of the cube, shape (n, dims), as rows of shape (hyperparameters,)."""
        blocks = np.split(points, np.cumsum(self._widths)[:-1], axis=1)
        columns = [b.argmax(axis=1) if c else b[:, 0] for b, c in zip(blocks, self.choices, strict=True)]
        return np.stack(columns, axis=1).astype(float)

    def widen(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of ``narrow``."""
        columns = zip(rows.T, self.choices, strict=True)
        return np.concatenate([np.eye(c)[x.astype(int)] if c else x[:, None] for x, c in columns], axis=1)


class KernelDensity:
    """A mean of product kernels: Gaussian, or Aitchison and Aitken's for unordered categoricals.

    As statsmodels' ``KDEMultivariate`` with ``bw="normal_reference"``, which HpBandSter uses, bandwidths clipped from
    below at 1e-3; the kernels are not truncated at the bounds. Differences, both for categoricals: the standard
    deviation is that of an indicator, sqrt((1 - sum p_c^2) / 2), the same for two choices but independent of the order
    of more; the bandwidth is at most (c - 1) / c, a uniform kernel (there it can make weights negative), with c the
    number of choices (there of those observed: a density is nan if there is one).
    """

    def __init__(self, data: np.ndarray, choices: Sequence[int] | np.ndarray):
        """``data``: shape (n, hyperparameters); ``choices`` as in ``Coordinates``."""
        self.data, self.choices = data, np.asarray(choices)
        n, d = data.shape
        scale = 1.06 * n ** (-1 / (4 + d))
        deviations = [_deviation(x, c) for x, c in zip(data.T, self.choices, strict=True)]
        uniform = np.where(self.choices > 0, (self.choices - 1) / np.maximum(self.choices, 1), np.inf)
        self.bandwidths = np.minimum(np.maximum(scale * np.array(deviations), MIN_BANDWIDTH), uniform)

    def density(self, rows: np.ndarray) -> np.ndarray:
        """Shape (m,) at ``rows``, shape (m, hyperparameters)."""
        product = np.ones((len(rows), len(self.data)))
        for j, (bandwidth, choices) in enumerate(zip(self.bandwidths, self.choices, strict=True)):
            x, data = rows[:, j, None], self.data[None, :, j]
            if not choices:
                product *= np.exp(-0.5 * ((x - data) / bandwidth) ** 2) / (bandwidth * np.sqrt(2 * np.pi))
            elif choices > 1:
                product *= np.where(x == data, 1 - bandwidth, bandwidth / (choices - 1))
        return product.mean(axis=1)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Shape (count, hyperparameters): kernels drawn at random, and from each a normal truncated to [0, 1], three
        times as wide, or its choice, with probability ``bandwidth`` replaced by a uniform one."""
        centres = self.data[rng.integers(len(self.data), size=count)]
        drawn = np.empty_like(centres)
        for j, (bandwidth, choices) in enumerate(zip(self.bandwidths, self.choices, strict=True)):
            centre, u = centres[:, j], rng.random(count)
            if choices:
                drawn[:, j] = np.where(u < bandwidth, rng.integers(choices, size=count), centre)
            else:
                wide = BANDWIDTH_FACTOR * bandwidth
                low, high = ndtr(-centre / wide), ndtr((1 - centre) / wide)
                drawn[:, j] = np.clip(centre + wide * ndtri(low + u * (high - low)), 0.0, 1.0)
        return drawn


def _deviation(x: np.ndarray, choices: int) -> float:
    if not choices:
        return float(np.std(x))
    shares = np.bincount(x.astype(int), minlength=choices) / len(x)
    return float(np.sqrt((1 - np.square(shares).sum()) / 2))
