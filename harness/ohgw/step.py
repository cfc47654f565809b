"""Step rules: from dF/dpsi to the next psi.

With w the width of a coordinate's psi range (so that g*w is the gradient in unit coordinates):

    raw         psi - eta * g                  unit    psi - eta * w^2 * g       (the same rule in unit coordinates)
    normalized  psi - eta * w * (g*w)/|g*w|    sign    psi - eta * w * sign(g)

Every step is clipped to the bounds. A coordinate whose gradient is zero stays where it is, to the last bit.
"""

import math
from collections.abc import Mapping

from harness.ohgw.coordinates import Coordinates

STEP_RULES = ("raw", "unit", "normalized", "sign")


def step(
    rule: str, eta: float, gradient: Mapping[str, float], psi: Mapping[str, float], coordinates: Coordinates
) -> dict[str, float]:
    """One step from ``psi`` against ``gradient`` = dF/dpsi (finite), clipped to the bounds, for all ``coordinates``."""
    change = _changes(rule, eta, gradient, coordinates)
    return {name: _clipped(psi[name], -change[name], coordinates[name].bounds) for name in coordinates}


def displacement(start: Mapping[str, float], end: Mapping[str, float], coordinates: Coordinates) -> dict[str, float]:
    """The move from psi ``start`` to psi ``end`` in unit coordinates."""
    return {name: (end[name] - start[name]) / c.width for name, c in coordinates.items()}


def length(move: Mapping[str, float]) -> float:
    """Euclidean length."""
    return math.hypot(*move.values())


def shares(move: Mapping[str, float]) -> dict[str, float]:
    """Share of the squared length per coordinate; they sum to 1, or are all 0 if nothing moved."""
    unit = _normalized(move)
    return {name: part * part for name, part in unit.items()}


def _changes(rule: str, eta: float, gradient: Mapping[str, float], coordinates: Coordinates) -> dict[str, float]:
    if rule == "raw":
        return {name: eta * gradient[name] for name in coordinates}
    if rule == "unit":
        return {name: eta * c.width**2 * gradient[name] for name, c in coordinates.items()}
    if rule == "sign":
        return {name: eta * c.width * _sign(gradient[name]) for name, c in coordinates.items()}
    if rule == "normalized":
        scaled = _normalized({name: gradient[name] for name in coordinates})  # now the widths cannot make it overflow
        direction = _normalized({name: scaled[name] * c.width for name, c in coordinates.items()})
        return {name: eta * c.width * direction[name] for name, c in coordinates.items()}
    raise ValueError(f"unknown step rule {rule!r}; possible: {', '.join(STEP_RULES)}")


def _normalized(vector: Mapping[str, float]) -> dict[str, float]:
    """``vector`` at unit length (zero stays zero); scaled first, so that neither end of the float range is lost."""
    largest = max((abs(v) for v in vector.values()), default=0.0)
    if largest == 0.0:
        return dict.fromkeys(vector, 0.0)
    scaled = {name: v / largest for name, v in vector.items()}
    norm = math.hypot(*scaled.values())
    return {name: v / norm for name, v in scaled.items()}


def _sign(x: float) -> float:
    return math.copysign(1.0, x) if x else 0.0


def _clipped(psi: float, change: float, bounds: tuple[float, float]) -> float:
    return min(max(psi + change, bounds[0]), bounds[1]) if change else psi
