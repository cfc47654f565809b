"""Configurations as points of the unit cube, for models."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from harness.space import Categorical, Float, Integer, Space


class Encoder:
    """Maps configurations of ``space`` into [0, 1]^``dims`` and back; constants are left out and put back.

    A continuous hyperparameter is its unit coordinate, an integer the middle of its share of the (logarithmic) range,
    an ordered categorical the middle of its share, an unordered one a block of one-hot coordinates. Values outside the
    bounds are clipped.
    """

    def __init__(self, space: Space):
        self.space = space
        self.widths = [
            len(d.choices) if isinstance(d, Categorical) and not d.ordered else 1 for d in space.domains.values()
        ]
        self.dims = sum(self.widths)

    def knows(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` has all hyperparameters, categoricals with one of their choices."""
        return all(
            name in config and (not isinstance(domain, Categorical) or config[name] in domain.choices)
            for name, domain in self.space.domains.items()
        )

    def encode(self, config: Mapping[str, Any]) -> np.ndarray:
        """Shape (dims,), float64."""
        parts = [_encode(domain, config[name]) for name, domain in self.space.domains.items()]
        return np.clip(np.concatenate(parts), 0.0, 1.0) if parts else np.zeros(0)

    def encode_all(self, configs: Iterable[Mapping[str, Any]]) -> np.ndarray:
        """Shape (number of configurations, dims), float64."""
        rows = [self.encode(config) for config in configs]
        return np.stack(rows) if rows else np.zeros((0, self.dims))

    def decode(self, point: np.ndarray) -> dict[str, Any]:
        """The configuration nearest to a point of the cube, shape (dims,): integers and categoricals rounded."""
        config, start = {}, 0
        for (name, domain), width in zip(self.space.domains.items(), self.widths, strict=True):
            config[name] = _decode(domain, point[start : start + width])
            start += width
        return {**config, **self.space.constants}


def _encode(domain: Any, value: Any) -> np.ndarray:
    if isinstance(domain, Float):
        return np.array([domain.unit(min(max(value, domain.lower), domain.upper))])
    if isinstance(domain, Integer):
        low, high = _integer_range(domain)
        return np.array([((math.log(value) if domain.log else value) - low) / (high - low)])
    index = domain.choices.index(value)
    if domain.ordered:
        return np.array([(index + 0.5) / len(domain.choices)])
    return np.eye(len(domain.choices))[index]


def _decode(domain: Any, part: np.ndarray) -> Any:
    if isinstance(domain, Float):
        return domain.from_unit(min(max(float(part[0]), 0.0), 1.0))
    if isinstance(domain, Integer):
        low, high = _integer_range(domain)
        position = low + float(part[0]) * (high - low)
        return min(max(round(math.exp(position) if domain.log else position), domain.lower), domain.upper)
    if domain.ordered:
        return domain.choices[min(max(int(part[0] * len(domain.choices)), 0), len(domain.choices) - 1)]
    return domain.choices[int(np.argmax(part))]


def _integer_range(domain: Integer) -> tuple[float, float]:
    low, high = domain.lower - 0.5, domain.upper + 0.5
    return (math.log(low), math.log(high)) if domain.log else (low, high)
