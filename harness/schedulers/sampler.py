"""The seeded sampler of configurations: one sequence per seed, the same for every scheduler and OHGW variant."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.seeds import rng
from harness.space import Space


class RandomSampler:
    """Independent, uniform configurations (in each hyperparameter's own coordinate).

    Configuration ``k`` depends on ``(seed, k)`` and the space only: nothing is skipped, also not a duplicate, and
    nothing that a scheduler observes changes the sequence, so that the cells of one seed are paired configuration by
    configuration.
    """

    def __init__(self, config_space: Mapping[str, Any], seed: int = 0):
        """``config_space`` in Syne Tune's terms; raises SpaceError for a domain that ``Space`` does not know."""
        self.space = Space.from_config_space(config_space)
        self.seed = seed
        self.drawn = 0

    def suggest(self) -> dict[str, Any]:
        """The next configuration, the space's constants included; never None."""
        config = self.space.sample(rng(self.seed, "configuration", self.drawn))
        self.drawn += 1
        return config


class CandidateSampler:
    """The configurations of a table, each once, in a random order that depends on the seed and their number only."""

    def __init__(self, candidates: Sequence[Mapping[str, Any]], seed: int = 0):
        self.candidates = candidates
        self._order = iter(rng(seed, "candidates").permutation(len(candidates)).tolist())

    def suggest(self) -> dict[str, Any] | None:
        """The next configuration; None when all were given."""
        index = next(self._order, None)
        return None if index is None else dict(self.candidates[index])
