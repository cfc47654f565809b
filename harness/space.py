"""Search spaces: hyperparameters, their coordinates psi, and the way to and from Syne Tune's ``config_space``.

Three views of a continuous hyperparameter: its *value* (what training uses), *psi* (natural log of the value
where the space is logarithmic, else the value) and the *unit* coordinate (psi scaled to [0, 1] by its bounds).
Integers and categoricals have values only: OHGW never moves them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class SpaceError(ValueError):
    """A search space or configuration that makes no sense; the message says what and what would be possible."""


@dataclass(frozen=True)
class Float:
    """A continuous hyperparameter in ``[lower, upper]``; ``log``: searched (and moved) in the natural logarithm."""

    lower: float
    upper: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.lower, self.upper, self.log)

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of psi."""
        return self.psi(self.lower), self.psi(self.upper)

    def psi(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def value(self, psi: float) -> float:
        """The value at ``psi``, never outside the bounds (``exp(log(upper))`` can be)."""
        value = math.exp(psi) if self.log else float(psi)
        return min(max(value, self.lower), self.upper)

    def unit(self, value: float) -> float:
        low, high = self.bounds
        return (self.psi(value) - low) / (high - low)

    def from_unit(self, unit: float) -> float:
        low, high = self.bounds
        return self.value(low + unit * (high - low))

    def sample(self, rng: np.random.Generator) -> float:
        return self.from_unit(rng.random())


@dataclass(frozen=True)
class Integer:
    """An integer hyperparameter in ``[lower, upper]``, both ends included; ``log``: uniform in the logarithm."""

    lower: int
    upper: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.lower, self.upper, self.log)

    def sample(self, rng: np.random.Generator) -> int:
        if not self.log:
            return int(rng.integers(self.lower, self.upper, endpoint=True))
        low, high = math.log(self.lower - 0.5), math.log(self.upper + 0.5)
        return min(max(round(math.exp(low + rng.random() * (high - low))), self.lower), self.upper)


@dataclass(frozen=True)
class Categorical:
    """One of ``choices``; ``ordered`` keeps Syne Tune's ordinal type on the way there and back."""

    choices: tuple[Any, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.choices:
            raise SpaceError("a categorical hyperparameter needs at least one choice")
        if len({type(choice) for choice in self.choices}) > 1:  # Syne Tune's rule
            raise SpaceError(f"choices must all have one type, got {list(self.choices)}")

    def sample(self, rng: np.random.Generator) -> Any:
        return self.choices[int(rng.integers(len(self.choices)))]


Domain = Float | Integer | Categorical


@dataclass(frozen=True)
class Space:
    """An ordered set of hyperparameters, plus constants that every configuration carries unchanged."""

    domains: Mapping[str, Domain]
    constants: Mapping[str, Any]

    def __init__(self, domains: Mapping[str, Domain], constants: Mapping[str, Any] | None = None):
        object.__setattr__(self, "domains", dict(domains))
        object.__setattr__(self, "constants", dict(constants or {}))

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)

    def __getitem__(self, name: str) -> Domain:
        return self.domains[name]

    @property
    def continuous(self) -> dict[str, Float]:
        """The hyperparameters that OHGW may move, in order."""
        return {name: d for name, d in self.domains.items() if isinstance(d, Float)}

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """One configuration, each hyperparameter independent and uniform in its own coordinate."""
        return {**{name: d.sample(rng) for name, d in self.domains.items()}, **self.constants}

    def psi(self, config: Mapping[str, Any]) -> dict[str, float]:
        """Search coordinates of the continuous hyperparameters."""
        return {name: d.psi(config[name]) for name, d in self.continuous.items()}

    def unit(self, config: Mapping[str, Any]) -> dict[str, float]:
        """Unit coordinates of the continuous hyperparameters."""
        return {name: d.unit(config[name]) for name, d in self.continuous.items()}

    def config_space(self) -> dict[str, Any]:
        """The same space in Syne Tune's terms."""
        from syne_tune import config_space as st

        def convert(domain: Domain) -> Any:
            if isinstance(domain, Categorical):
                choices = list(domain.choices)
                return st.ordinal(choices, kind="equal") if domain.ordered else st.choice(choices)
            if isinstance(domain, Float):
                return (st.loguniform if domain.log else st.uniform)(domain.lower, domain.upper)
            return (st.lograndint if domain.log else st.randint)(domain.lower, domain.upper)

        return {**{name: convert(d) for name, d in self.domains.items()}, **self.constants}

    @classmethod
    def from_config_space(cls, config_space: Mapping[str, Any]) -> "Space":
        """Read Syne Tune's ``uniform, loguniform, randint, lograndint, choice, ordinal, finrange``; others raise
        SpaceError. An ordinal (of either kind) or finite range is sampled uniformly over its values."""
        from syne_tune import config_space as st

        domains = {k: _named(k, _from_syne_tune, v) for k, v in config_space.items() if isinstance(v, st.Domain)}
        constants = {k: v for k, v in config_space.items() if not isinstance(v, st.Domain)}
        return cls(domains, constants)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Space":
        """Read the YAML form: ``lr: {lower: 1e-3, upper: 1, log: true}``, ``depth: {lower: 2, upper: 8, integer:
        true}``, ``optimizer: {choices: [sgd, adamw]}``, ``nesterov: true`` (a constant). Raises SpaceError, which names
        the hyperparameter, for an entry that makes no sense."""
        domains = {name: _named(name, _from_entry, entry) for name, entry in spec.items() if isinstance(entry, Mapping)}
        constants = {name: entry for name, entry in spec.items() if not isinstance(entry, Mapping)}
        return cls(domains, constants)


def _named(name: str, read: Callable[[Any], Domain], source: Any) -> Domain:
    try:
        return read(source)
    except SpaceError as error:
        raise SpaceError(f"hyperparameter {name!r}: {error}") from None


def _from_entry(entry: Mapping[str, Any]) -> Domain:
    if "choices" in entry:
        _check_keys(entry, required=("choices",), flags=("ordered",))
        choices = entry["choices"]
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise SpaceError(f"choices must be a list, got {choices!r}")
        return Categorical(tuple(choices), ordered=entry.get("ordered", False))
    _check_keys(entry, required=("lower", "upper"), flags=("log", "integer"))
    lower, upper, log = _number(entry["lower"]), _number(entry["upper"]), entry.get("log", False)
    if not entry.get("integer", False):
        return Float(lower, upper, log)
    if not (lower.is_integer() and upper.is_integer()):
        raise SpaceError(f"bounds of an integer hyperparameter must be integers, got [{lower}, {upper}]")
    return Integer(int(lower), int(upper), log)


def _check_keys(entry: Mapping[str, Any], required: tuple[str, ...], flags: tuple[str, ...]) -> None:
    missing, unknown = set(required) - set(entry), set(entry) - set(required) - set(flags)
    if missing or unknown:
        raise SpaceError(
            f"missing entries {sorted(missing)}, unknown entries {sorted(unknown, key=str)}; "
            "possible: lower and upper, with log and integer, or choices, with ordered"
        )
    for flag in flags:
        if not isinstance(entry.get(flag, False), bool):
            raise SpaceError(f"{flag} must be true or false, got {entry[flag]!r}")


def _number(value: Any) -> float:
    """A YAML number; also a string such as ``1e-3``, which YAML 1.1 does not read as a number."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise SpaceError(f"bounds must be numbers, got {value!r}") from None


def _from_syne_tune(domain: Any) -> Domain:
    from syne_tune import config_space as st

    if isinstance(domain, st.Categorical):
        return Categorical(tuple(domain.categories), ordered=isinstance(domain, st.Ordinal))
    if isinstance(domain, st.FiniteRange):
        return Categorical(tuple(domain.values), ordered=True)
    # Exact types: the reverse logarithm is a subclass of the logarithm, a quantised sampler wraps another.
    sampler = type(domain.get_sampler())
    if sampler in (st.Integer._Uniform, st.Integer._LogUniform):
        return Integer(domain.lower, domain.upper, log=sampler is st.Integer._LogUniform)
    if sampler in (st.Float._Uniform, st.Float._LogUniform):
        return Float(float(domain.lower), float(domain.upper), log=sampler is st.Float._LogUniform)
    raise SpaceError(
        f"this project cannot sample {domain!r}; possible: uniform, loguniform, randint, lograndint, choice, "
        "ordinal, finrange"
    )


def _check_bounds(lower: float, upper: float, log: bool) -> None:
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise SpaceError(f"bounds must be finite with lower < upper, got [{lower}, {upper}]")
    if log and lower <= 0:
        raise SpaceError(f"a logarithmic hyperparameter needs lower > 0, got {lower}")
