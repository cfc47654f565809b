"""Step rules, bounds and coordinates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.ohgw.coordinates import Coordinate
from harness.ohgw.step import STEP_RULES, displacement, length, shares, step
from harness.space import Float

COORDINATES = {
    "lr": Coordinate(Float(1e-3, 1.0, log=True)),
    "momentum": Coordinate(Float(0.0, 0.99), log1m=True),
    "augmentation": Coordinate(Float(0.0, 1.0)),
}
RULES = st.sampled_from(STEP_RULES)
ETAS = st.floats(0, 10)
UNITS = st.fixed_dictionaries({name: st.floats(0, 1) for name in COORDINATES})
FINITE = st.floats(allow_nan=False, allow_infinity=False)
GRADIENTS = st.fixed_dictionaries(dict.fromkeys(COORDINATES, FINITE))


def at(units: dict[str, float]) -> dict[str, float]:
    psi = {name: x.bounds[0] + units[name] * x.width for name, x in COORDINATES.items()}
    return {name: min(max(psi[name], x.bounds[0]), x.bounds[1]) for name, x in COORDINATES.items()}


@given(rule=RULES, eta=ETAS, gradient=GRADIENTS, units=UNITS)
def test_a_step_ends_inside_the_bounds_and_goes_against_the_gradient(rule, eta, gradient, units):
    psi = at(units)
    end = step(rule, eta, gradient, psi, COORDINATES)
    for name, x in COORDINATES.items():
        assert x.bounds[0] <= end[name] <= x.bounds[1]
        assert x.domain.lower <= x.value(end[name]) <= x.domain.upper
        assert (end[name] - psi[name]) * math.copysign(1, gradient[name]) <= 0


@given(rule=RULES, eta=ETAS, units=UNITS, gradient=GRADIENTS)
def test_without_gradient_or_step_size_nothing_moves(rule, eta, units, gradient):
    psi = at(units)
    assert step(rule, eta, dict.fromkeys(COORDINATES, 0.0), psi, COORDINATES) == psi
    assert step(rule, 0.0, gradient, psi, COORDINATES) == psi
    still = step(rule, eta, {**gradient, "lr": 0.0}, psi, COORDINATES)
    assert still["lr"] == psi["lr"]


@given(rule=RULES, eta=ETAS, gradient=GRADIENTS)
def test_a_value_beyond_its_bounds_is_left_alone_by_a_zero_step(rule, eta, gradient):
    outside = {"lr": 1.0, "momentum": 1.0, "augmentation": 2.0}
    assert step(rule, 0.0, gradient, outside, COORDINATES) == outside


@given(gradient=GRADIENTS)
def test_a_normalized_step_has_length_eta_in_unit_coordinates(gradient):
    psi = at(dict.fromkeys(COORDINATES, 0.5))
    move = displacement(psi, step("normalized", 0.1, gradient, psi, COORDINATES), COORDINATES)
    assert length(move) == pytest.approx(0.1 if any(gradient.values()) else 0.0, rel=1e-9)
    assert sum(shares(move).values()) == pytest.approx(1.0 if any(move.values()) else 0.0)


def test_rules_by_hand():
    psi = at(dict.fromkeys(COORDINATES, 0.5))
    gradient = {"lr": 0.3, "momentum": -0.1, "augmentation": 0.5}
    widths = {name: x.width for name, x in COORDINATES.items()}
    norm = math.hypot(*(gradient[name] * widths[name] for name in gradient))
    expected = {
        "raw": {name: -0.01 * g for name, g in gradient.items()},
        "unit": {name: -0.01 * g * widths[name] ** 2 for name, g in gradient.items()},
        "normalized": {name: -0.01 * g * widths[name] ** 2 / norm for name, g in gradient.items()},
        "sign": {name: -0.01 * math.copysign(widths[name], g) for name, g in gradient.items()},
    }
    for rule, moves in expected.items():
        end = step(rule, 0.01, gradient, psi, COORDINATES)
        assert {name: end[name] - psi[name] for name in psi} == {
            n: pytest.approx(m, rel=1e-9) for n, m in moves.items()
        }


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(ValueError, match="raw, unit, normalized, sign"):
        step("newton", 0.1, {}, {}, {})


@given(unit=st.floats(0, 1))
def test_coordinates_go_there_and_back_and_hit_their_bounds_exactly(unit):
    for x in COORDINATES.values():
        low, high = x.bounds
        value = x.value(low + unit * x.width)
        assert x.value(x.psi(value)) == pytest.approx(value, rel=1e-12, abs=1e-15)
        assert {x.value(low), x.value(high)} == {x.domain.lower, x.domain.upper}
        assert {x.value(low - 1), x.value(high + 1)} == {x.domain.lower, x.domain.upper}


@given(unit=st.floats(0.01, 0.99))
def test_slopes_are_derivatives(unit):
    for x in COORDINATES.values():
        psi, h = x.bounds[0] + unit * x.width, 1e-6
        difference = (x.value(psi + h) - x.value(psi - h)) / (2 * h)
        assert x.slope(x.value(psi)) == pytest.approx(difference, rel=1e-6)


def test_log1m_needs_an_upper_bound_below_one():
    with pytest.raises(ValueError, match="below 1"):
        Coordinate(Float(0.0, 1.0), log1m=True)
