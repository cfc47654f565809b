"""Search spaces: hyperparameters, their coordinates psi, and the way to and from Syne Tune's ``config_space``.

Three views of a continuous hyperparameter (DESIGN 3): its *value* (what training uses), *psi* (natural log of the value
where the space is logarithmic, else the value) and the *unit* coordinate (psi scaled to [0, 1] by its bounds).
Integers and categoricals have values only: OHGW never moves them.
"""

import math
from collections.abc import Iterator, Mapping
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
        """Read Syne Tune's ``uniform, loguniform, randint, lograndint, choice, ordinal, finrange``; others raise SpaceError."""
        from syne_tune import config_space as st

        domains = {k: _from_syne_tune(k, v) for k, v in config_space.items() if isinstance(v, st.Domain)}
        constants = {k: v for k, v in config_space.items() if not isinstance(v, st.Domain)}
        return cls(domains, constants)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Space":
        """Read the YAML form: ``lr: {lower: 1e-3, upper: 1, log: true}``, ``depth: {lower: 2, upper: 8, integer: true}``,
        ``optimizer: {choices: [sgd, adamw]}``, ``nesterov: true`` (a constant)."""
        domains: dict[str, Domain] = {}
        constants: dict[str, Any] = {}
        for name, entry in spec.items():
            if not isinstance(entry, Mapping):
                constants[name] = entry
            elif "choices" in entry:
                domains[name] = Categorical(tuple(entry["choices"]), **_rest(name, entry, {"choices"}, {"ordered"}))
            elif entry.get("integer"):
                domains[name] = Integer(entry["lower"], entry["upper"], **_rest(name, entry, {"lower", "upper", "integer"}, {"log"}))
            else:
                lower, upper = float(entry["lower"]), float(entry["upper"])
                domains[name] = Float(lower, upper, **_rest(name, entry, {"lower", "upper", "integer"}, {"log"}))
        return cls(domains, constants)


def _rest(name: str, entry: Mapping[str, Any], used: set[str], allowed: set[str]) -> dict[str, Any]:
    unknown = set(entry) - used - allowed
    if unknown:
        raise SpaceError(f"hyperparameter {name!r} has unknown entries {sorted(unknown)}; possible: {sorted(used | allowed)}")
    return {k: entry[k] for k in sorted(allowed) if k in entry}


def _from_syne_tune(name: str, domain: Any) -> Domain:
    from syne_tune import config_space as st

    log = isinstance(domain.get_sampler(), st.LogUniform) if not isinstance(domain, (st.Categorical, st.FiniteRange)) else False
    if isinstance(domain, st.Categorical):
        return Categorical(tuple(domain.categories), ordered=isinstance(domain, st.Ordinal))
    if isinstance(domain, st.FiniteRange):
        return Categorical(tuple(domain.values), ordered=True)
    if isinstance(domain, st.Integer):
        return Integer(domain.lower, domain.upper, log)
    if isinstance(domain, st.Float) and isinstance(domain.get_sampler(), (st.Uniform, st.LogUniform)):
        return Float(domain.lower, domain.upper, log)
    raise SpaceError(f"hyperparameter {name!r} has a domain this project cannot sample: {domain!r}; possible: uniform, loguniform, "
                     "randint, lograndint, choice, ordinal, finrange")


def _check_bounds(lower: float, upper: float, log: bool) -> None:
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise SpaceError(f"bounds must be finite with lower < upper, got [{lower}, {upper}]")
    if log and lower <= 0:
        raise SpaceError(f"a logarithmic hyperparameter needs lower > 0, got {lower}")
