"""Where a model-based scheduler takes its configurations from: a continuous space, or the rows of a table.

Both kinds name a configuration by a ticket, which ``give`` turns into the configuration and marks as used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.schedulers.bo.encoding import Encoder
from harness.schedulers.sampler import CandidateSampler, RandomSampler
from harness.space import Categorical, Domain, Integer, Space

FINE = 10_000  # values of an integer from which on it is as good as continuous


class SpaceSupply:
    """All configurations of a space. The random ones are those of ``RandomSampler``, in its order."""

    def __init__(self, config_space: Mapping[str, Any], seed: int):
        self._sampler = RandomSampler(config_space, seed)
        self.encoder = Encoder(self._sampler.space)
        self._grids = [_grid(name, domain) for name, domain in self._sampler.space.domains.items()]
        self._given: set[bytes] = set()

    def random(self) -> dict[str, Any]:
        config = self._sampler.suggest()
        self._given.update(_keys(self.encoder.encode_all([config])))
        return config

    def near(self, points: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The configurations nearest to ``points``, shape (n, dims), without those given and those at ``used``, shape
        (m, dims) (what warm starts made of them): their points, shape (at most n, dims), and their tickets."""
        taken = self._given | set(_keys(used))
        blocks = np.split(points, np.cumsum(self.encoder.widths)[:-1], axis=1)
        snapped = np.concatenate([_snap(b, g) for b, g in zip(blocks, self._grids, strict=True)], axis=1)
        unused = snapped[[key not in taken for key in _keys(snapped)]]
        return unused, list(unused)

    def give(self, ticket: np.ndarray) -> dict[str, Any]:
        self._given.update(_keys(ticket[None, :]))
        return self.encoder.decode(ticket)


class TableSupply:
    """The configurations of a table, each once. The random ones come in the order of ``CandidateSampler``."""

    def __init__(self, config_space: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], seed: int):
        self._candidates = candidates
        self.encoder = Encoder(Space.from_config_space(config_space))
        self.points = self.encoder.encode_all(candidates)
        self._free = np.ones(len(candidates), dtype=bool)
        self._order = CandidateSampler([{"row": row} for row in range(len(candidates))], seed)

    def random(self) -> dict[str, Any] | None:
        """None if all were given."""
        while (drawn := self._order.suggest()) is not None:
            if self._free[drawn["row"]]:
                return self.give(drawn["row"])
        return None

    def unused(self) -> tuple[np.ndarray, list[int]]:
        """Points, shape (n, dims), and tickets of all that are left."""
        return self.points[self._free], np.flatnonzero(self._free).tolist()

    def near(self, points: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Points and tickets of the unused candidates nearest to ``points``, shape (n, dims), without repetition.
        ``used`` does not matter: what warm starts made of a candidate is not in the table."""
        free, tickets = self.unused()
        if not tickets:
            return free, tickets
        nearest = np.unique([int(np.argmin(np.square(free - point).sum(axis=1))) for point in points])
        return free[nearest], [tickets[k] for k in nearest]

    def give(self, ticket: int) -> dict[str, Any]:
        self._free[ticket] = False
        return dict(self._candidates[ticket])


def _grid(name: str, domain: Domain) -> np.ndarray | None:
    """The coordinates, ascending, of all values of a hyperparameter that has one discrete coordinate; None for others,
    and for integers of so many values that two rarely meet."""
    values: Sequence[Any]
    if isinstance(domain, Integer) and domain.upper - domain.lower < FINE:
        values = range(domain.lower, domain.upper + 1)
    elif isinstance(domain, Categorical) and (domain.ordered or len(domain.choices) == 1):
        values = domain.choices
    else:
        return None
    return Encoder(Space({name: domain})).encode_all({name: value} for value in values)[:, 0]


def _snap(block: np.ndarray, grid: np.ndarray | None) -> np.ndarray:
    """The coordinates of one hyperparameter, shape (n, width), moved to the nearest that a value has."""
    if block.shape[1] > 1:
        return np.eye(block.shape[1])[block.argmax(axis=1)]
    if grid is None:
        return block
    return grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, block)]


def supply(
    config_space: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]] | None, seed: int
) -> SpaceSupply | TableSupply:
    """The space's, or the table's if there are ``candidates``."""
    return SpaceSupply(config_space, seed) if candidates is None else TableSupply(config_space, candidates, seed)


def _keys(points: np.ndarray) -> list[bytes]:
    """One for each row, equal for rows that are equal up to rounding errors of the encoding."""
    return [row.tobytes() for row in np.round(points, 9)]
