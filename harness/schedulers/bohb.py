"""BOHB (Falkner, Klein, Hutter, ICML 2018): Hyperband with configurations from kernel density estimates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.schedulers.base import Mode, Origin
from harness.schedulers.bo.density import Coordinates, KernelDensity
from harness.schedulers.bo.rung_values import rung_levels, rung_values
from harness.schedulers.bo.supply import supply
from harness.schedulers.hyperband import Hyperband
from harness.seeds import rng

# The published defaults.
TOP_PERCENT = 15  # of the observations at a level are good
SAMPLES = 64  # draws from the good density; the best is suggested
RANDOM_FRACTION = 1 / 3  # of the suggestions
MIN_DENSITY = 1e-32  # the ratio of densities is taken above it


class BOHB(Hyperband):
    """Hyperband whose new configurations maximise a ratio of densities: that of the good observations, the best 15 % at
    the largest level with enough of them, over that of all others there.

    As in HpBandSter (optimizers/config_generators/bohb.py), the authors' implementation, but for:

    - A crashed or diverged trial is +inf at the level that it did not reach, and never good (there it can be, if few
      others are left): a level has enough observations when there are d + 1 good and d + 1 bad ones for d
      hyperparameters, all of the good ones finite.
    - A trial counts at every level that it has passed (there only at those where it was paused).
    - Categoricals: see ``KernelDensity``. Ordered ones, which HpBandSter refuses, are treated as integers are.
    - No configuration is suggested twice, but by the random draws. With ``candidates`` each draw is replaced by the
      nearest unused one before the ratio is computed.
    - Random configurations are those of random search, in its order. Each suggestion has its own stream of random
      numbers, so that the number of observations does not shift it.
    """

    def __init__(
        self,
        config_space: Mapping[str, Any],
        metric: str,
        *,
        mode: Mode = "min",
        max_t: int,
        resource_attr: str = "epoch",
        max_resource_attr: str | None = None,
        grace_period: int = 1,
        eta: float = 3,
        brackets: int | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ):
        """``candidates``: new configurations come from this list only, each at most once. The rest as in
        ``Hyperband``."""
        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, grace_period=grace_period, eta=eta, brackets=brackets, seed=seed,
            searcher=DensitySearcher(self, config_space, candidates, seed),
        )  # fmt: skip


class DensitySearcher:
    """New configurations from the books of ``scheduler``."""

    def __init__(
        self,
        scheduler: Hyperband,
        config_space: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]] | None,
        seed: int,
    ):
        self._scheduler, self._seed = scheduler, seed
        self._supply = supply(config_space, candidates, seed)
        self._coordinates = Coordinates(self._supply.encoder)
        self._suggested = 0
        self.origin = Origin("random")

    def suggest(self) -> dict[str, Any] | None:
        """None if all candidates were given."""
        stream = rng(self._seed, "bohb", self._suggested)
        self._suggested += 1
        self.origin = Origin("random")
        if stream.random() < RANDOM_FRACTION or (densities := self._densities()) is None:
            return self._supply.random()
        points, tickets = self._draw(densities[0], stream)
        if not tickets:
            return self._supply.random()
        self.origin = Origin("model")
        return self._supply.give(tickets[self._best(points, *densities)])

    def _draw(self, good: KernelDensity, stream: np.random.Generator) -> tuple[np.ndarray, list[Any]]:
        """Points and tickets of unused configurations from the good density."""
        points = self._coordinates.widen(good.sample(SAMPLES, stream))
        encoder = self._supply.encoder
        used = encoder.encode_all(config for config in self._scheduler.configs.values() if encoder.knows(config))
        return self._supply.near(points, used)

    def _best(self, points: np.ndarray, good: KernelDensity, bad: KernelDensity) -> int:
        rows = self._coordinates.narrow(points)
        ratio = np.maximum(bad.density(rows), MIN_DENSITY) / np.maximum(good.density(rows), MIN_DENSITY)
        return int(np.argmin(ratio))

    def _densities(self) -> tuple[KernelDensity, KernelDensity] | None:
        """Of the good and of the bad observations at the largest level that has enough of both."""
        values = rung_values(self._scheduler, self._supply.encoder)
        least = len(self._coordinates.choices) + 1
        for level in reversed(rung_levels(self._scheduler)):
            ranked = sorted((value, trial_id) for (trial_id, at), value in values.items() if at == level)
            good = max(least, TOP_PERCENT * len(ranked) // 100)
            if len(ranked) >= good + least and math.isfinite(ranked[good - 1][0]):
                return self._density(ranked[:good]), self._density(ranked[good:])
        return None

    def _density(self, ranked: list[tuple[float, int]]) -> KernelDensity:
        points = self._supply.encoder.encode_all(self._scheduler.configs[trial_id] for _, trial_id in ranked)
        return KernelDensity(self._coordinates.narrow(points), self._coordinates.choices)
