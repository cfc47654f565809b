"""Where a model-based scheduler takes its configurations from: a continuous space, or the rows of a table.

Both kinds name a configuration by a ticket, which ``give`` turns into the configuration and marks as used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.schedulers.bo.encoding import Encoder
from harness.schedulers.sampler import CandidateSampler, RandomSampler
from harness.space import Space


class SpaceSupply:
    """All configurations of a space. The random ones are those of ``RandomSampler``, in its order."""

    def __init__(self, config_space: Mapping[str, Any], seed: int):
        self._sampler = RandomSampler(config_space, seed)
        self.encoder = Encoder(self._sampler.space)
        self._given: set[bytes] = set()

    def random(self) -> dict[str, Any]:
        return self.give(self._sampler.suggest())

    def near(self, points: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The configurations nearest to ``points``, shape (n, dims), without those given and those at ``used``, shape
        (m, dims) (what warm starts made of them): their points, shape (at most n, dims), and their tickets."""
        taken = self._given | set(_keys(used))
        configs = [self.encoder.decode(point) for point in points]
        rounded = self.encoder.encode_all(configs)
        unused = [k for k, key in enumerate(_keys(rounded)) if key not in taken]
        return rounded[unused], [configs[k] for k in unused]

    def give(self, ticket: dict[str, Any]) -> dict[str, Any]:
        self._given.update(_keys(self.encoder.encode_all([ticket])))
        return ticket


class TableSupply:
    """The configurations of a table, each once. The random ones come in the order of ``CandidateSampler``."""

    def __init__(self, config_space: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], seed: int):
        self._candidates = candidates
        self.encoder = Encoder(Space.from_config_space(config_space))
        self._points = self.encoder.encode_all(candidates)
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
        return self._points[self._free], np.flatnonzero(self._free).tolist()

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


def supply(
    config_space: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]] | None, seed: int
) -> SpaceSupply | TableSupply:
    """The space's, or the table's if there are ``candidates``."""
    return SpaceSupply(config_space, seed) if candidates is None else TableSupply(config_space, candidates, seed)


def _keys(points: np.ndarray) -> list[bytes]:
    """One for each row, equal for rows that are equal up to rounding errors of the encoding."""
    return [row.tobytes() for row in np.round(points, 9)]
