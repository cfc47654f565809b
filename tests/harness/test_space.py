"""Search spaces: bounds, coordinates, and the way to and from Syne Tune and YAML."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from syne_tune import config_space as syne

from harness.seeds import rng
from harness.space import Categorical, Float, Integer, Space, SpaceError

STUDY = {
    "lr": {"lower": 1e-3, "upper": 1, "log": True},
    "wd": {"lower": 1e-6, "upper": 1e-2, "log": True},
    "momentum": {"lower": 0, "upper": 0.99},
    "depth": {"lower": 2, "upper": 8, "integer": True},
    "width": {"lower": 8, "upper": 512, "integer": True, "log": True},
    "optimizer": {"choices": ["sgd", "adamw"]},
    "size": {"choices": [1, 2, 4], "ordered": True},
    "nesterov": True,
}


@st.composite
def floats(draw):
    log = draw(st.booleans())
    lower = draw(st.floats(1e-8, 1e3) if log else st.floats(-1e3, 1e3))
    upper = lower + draw(st.floats(1e-6, 1e3))
    assume(upper > lower)
    return Float(lower, upper, log)


@st.composite
def integers(draw):
    log = draw(st.booleans())
    lower = draw(st.integers(1 if log else -100, 100))
    return Integer(lower, lower + draw(st.integers(1, 1000)), log)


@given(domain=floats(), seed=st.integers(0, 99))
def test_float_samples_lie_within_the_bounds(domain, seed):
    assert domain.lower <= domain.sample(rng(seed, "x")) <= domain.upper


@given(domain=floats(), unit=st.floats(0, 1))
def test_unit_psi_and_value_are_inverse_within_the_bounds(domain, unit):
    value = domain.from_unit(unit)
    assert domain.lower <= value <= domain.upper
    assert domain.value(domain.psi(value)) == pytest.approx(value, rel=1e-9, abs=1e-12)
    low, high = domain.bounds
    rounding = 1e-12 * max(1, abs(low), abs(high)) / (high - low)
    assert domain.unit(value) == pytest.approx(unit, abs=rounding)


@given(domain=floats(), unit=st.floats(-2, 3))
def test_values_outside_the_bounds_are_clipped(domain, unit):
    assert domain.lower <= domain.from_unit(unit) <= domain.upper


@given(domain=floats())
def test_ends_of_the_unit_interval_are_the_bounds(domain):
    assert [domain.unit(domain.lower), domain.unit(domain.upper)] == [0, 1]
    assert [domain.from_unit(0), domain.from_unit(1)] == pytest.approx([domain.lower, domain.upper], rel=1e-9, abs=1e-9)


@given(domain=integers(), seed=st.integers(0, 99))
def test_integer_samples_are_integers_within_the_bounds(domain, seed):
    value = domain.sample(rng(seed, "x"))
    assert type(value) is int
    assert domain.lower <= value <= domain.upper


@pytest.mark.parametrize("log", [False, True])
def test_integers_reach_both_ends(log):
    generator = rng(0, "x")
    assert {Integer(1, 4, log).sample(generator) for _ in range(200)} == {1, 2, 3, 4}


def test_logarithmic_samples_are_uniform_in_the_logarithm():
    generator = rng(0, "x")
    draws = [Float(1e-4, 1, True).sample(generator) for _ in range(2000)]
    assert np.quantile(np.log10(draws), [0.25, 0.5, 0.75]) == pytest.approx([-3, -2, -1], abs=0.12)


@pytest.mark.parametrize(
    "domain",
    [
        Float(0.0, 1.0),
        Float(1e-3, 1.0, True),
        Integer(1, 9),
        Integer(1, 9, True),
        Categorical(("a", "b")),
        Categorical((1, 2, 4), ordered=True),
        Categorical(("only",)),
    ],
)
def test_syne_tune_round_trip(domain):
    space = Space({"x": domain}, {"epochs": 27})
    assert Space.from_config_space(space.config_space()) == space


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (syne.uniform(0, 1), Float(0.0, 1.0)),
        (syne.loguniform(1e-3, 1), Float(1e-3, 1.0, True)),
        (syne.randint(0, 3), Integer(0, 3)),
        (syne.lograndint(1, 3), Integer(1, 3, True)),
        (syne.choice(["a", "b"]), Categorical(("a", "b"))),
        (syne.ordinal([1, 2, 4], kind="equal"), Categorical((1, 2, 4), ordered=True)),
        (syne.ordinal([1, 2, 4]), Categorical((1, 2, 4), ordered=True)),
        (syne.logordinal([1, 2, 4]), Categorical((1, 2, 4), ordered=True)),
        (syne.finrange(0, 1, 5), Categorical((0.0, 0.25, 0.5, 0.75, 1.0), ordered=True)),
        (syne.logfinrange(1, 8, 4, cast_int=True), Categorical((1, 2, 4, 8), ordered=True)),
    ],
)
def test_syne_tune_domains_are_read(theirs, ours):
    assert Space.from_config_space({"x": theirs})["x"] == ours


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (syne.quniform(0, 1, 0.1), "cannot sample"),
        (syne.qrandint(1, 9, 2), "cannot sample"),
        (syne.reverseloguniform(0.1, 0.9), "cannot sample"),
        (syne.uniform(1, 1), "lower < upper"),
    ],
)
def test_syne_tune_domains_that_would_be_misread_are_refused(theirs, message):
    with pytest.raises(SpaceError, match=f"hyperparameter 'x': .*{message}"):
        Space.from_config_space({"x": theirs})


def test_samples_are_valid_for_syne_tune():
    space = Space.from_spec(STUDY)
    config = space.sample(rng(0, "x"))
    for name, domain in space.config_space().items():
        if isinstance(domain, syne.Domain):
            assert domain.is_valid(config[name])
    assert config["nesterov"] is True
    assert list(config) == list(STUDY)


def test_spec_is_read():
    space = Space.from_spec(STUDY)
    assert dict(space.domains) == {
        "lr": Float(1e-3, 1.0, True),
        "wd": Float(1e-6, 1e-2, True),
        "momentum": Float(0.0, 0.99),
        "depth": Integer(2, 8),
        "width": Integer(8, 512, True),
        "optimizer": Categorical(("sgd", "adamw")),
        "size": Categorical((1, 2, 4), ordered=True),
    }
    assert space.constants == {"nesterov": True}
    assert list(space.continuous) == ["lr", "wd", "momentum"]


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert Space.from_spec({"lr": {"lower": "1e-3", "upper": "1e0", "log": True}})["lr"] == Float(1e-3, 1.0, True)


def test_coordinates_are_those_of_the_continuous_hyperparameters():
    space = Space.from_spec(STUDY)
    config = {"lr": 0.1, "wd": 1e-4, "momentum": 0.495, "depth": 3, "width": 9, "optimizer": "sgd", "size": 2}
    assert space.psi(config) == pytest.approx({"lr": math.log(0.1), "wd": math.log(1e-4), "momentum": 0.495})
    assert space.unit(config) == pytest.approx({"lr": 2 / 3, "wd": 0.5, "momentum": 0.5})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lower": 1}, r"missing entries \['upper'\]"),
        ({}, r"missing entries \['lower', 'upper'\]"),
        ({"lower": 1, "upper": 2, "logarithmic": True}, r"unknown entries \['logarithmic'\]"),
        ({"choices": [1], "log": True}, r"unknown entries \['log'\]"),
        ({"lower": 2, "upper": 1}, "lower < upper"),
        ({"lower": 1, "upper": 1}, "lower < upper"),
        ({"lower": 0, "upper": 1, "log": True}, "needs lower > 0, got 0"),
        ({"lower": 0, "upper": "inf"}, "bounds must be finite"),
        ({"lower": "nan", "upper": 1}, "bounds must be finite"),
        ({"lower": "small", "upper": 1}, "bounds must be numbers, got 'small'"),
        ({"lower": None, "upper": 1}, "bounds must be numbers, got None"),
        ({"lower": False, "upper": True}, "bounds must be numbers, got False"),
        ({"lower": 1, "upper": 2, "log": "no"}, "log must be true or false, got 'no'"),
        ({"lower": 1, "upper": 2.5, "integer": True}, "must be integers"),
        ({"lower": 1, "upper": "inf", "integer": True}, "must be integers"),
        ({"choices": []}, "at least one choice"),
        ({"choices": "sgd"}, "choices must be a list, got 'sgd'"),
        ({"choices": [1, 0.5]}, "one type"),
        ({"choices": 3}, "choices must be a list, got 3"),
        ({"choices": [1], "ordered": 1}, "ordered must be true or false, got 1"),
    ],
)
def test_wrong_specs_are_refused_by_name(entry, message):
    with pytest.raises(SpaceError, match=f"hyperparameter 'x': .*{message}"):
        Space.from_spec({"x": entry})
