"""The coordinates psi in which a warm start moves a configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harness.space import Float


@dataclass(frozen=True)
class Coordinate:
    """A continuous hyperparameter with its psi: the search space's own, or ``log(1 - value)`` if ``log1m``.

    ``log1m`` is meant for momentum, whose effect goes with 1 / (1 - mu); it needs an upper bound < 1 (else ValueError).
    """

    domain: Float
    log1m: bool = False

    def __post_init__(self) -> None:
        if self.log1m and self.domain.upper >= 1:
            raise ValueError(f"log(1 - value) needs an upper bound below 1, got {self.domain.upper}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of psi, ascending."""
        if self.log1m:
            return self.psi(self.domain.upper), self.psi(self.domain.lower)
        return self.domain.bounds

    @property
    def width(self) -> float:
        """Length of psi's range: one unit coordinate."""
        low, high = self.bounds
        return high - low

    def psi(self, value: float) -> float:
        return math.log1p(-value) if self.log1m else self.domain.psi(value)

    def value(self, psi: float) -> float:
        """The value at ``psi``: inside the bounds, and exactly a bound where psi is at or beyond one."""
        low, high = self.bounds
        if low < psi < high:
            value = -math.expm1(psi) if self.log1m else self.domain.value(psi)
            return min(max(value, self.domain.lower), self.domain.upper)
        return self.domain.lower if (psi <= low) != self.log1m else self.domain.upper

    def slope(self, value: float) -> float:
        """d value / d psi, for the chain rule dF/dpsi = dF/dvalue * slope."""
        if self.log1m:
            return value - 1.0
        return float(value) if self.domain.log else 1.0


Coordinates = Mapping[str, Coordinate]
