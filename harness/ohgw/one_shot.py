"""One warm start: from a sampled configuration x to x'.

result = warm_start(config, space, problem, Settings(estimator="lookahead", step="normalized", eta=0.1), rng)
result.config      # x', to train with
result.record()    # what to report (JSON-able)
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from harness.ohgw.coordinates import Coordinate
from harness.ohgw.estimators import (
    Estimate,
    MissingGradient,
    Objective,
    Problem,
    direct,
    finite_difference,
    finite_step,
    lookahead,
    lookahead_objective,
)
from harness.ohgw.settings import Settings
from harness.ohgw.step import displacement, length, shares, step
from harness.space import Space

NO_DERIVATIVE = re.compile(
    r"not implemented|derivative for|double backward|differentiate twice|does not require grad|does not have a grad_fn",
    re.IGNORECASE,
)
DRAWS = 1000  # directions tried before a random move is clipped; near a corner of the 5-dimensional cube 1 in 32 fits


@dataclass(frozen=True)
class WarmStart:
    """What a warm start did. Moves and lengths are in unit coordinates of psi.

    ``flops`` and ``peak_memory`` (bytes) are 0 until the caller, who knows how to measure them on its device, fills
    them in with ``dataclasses.replace``."""

    x: dict[str, Any]
    config: dict[str, Any]
    """x': a hyperparameter that did not move has x's own value, to the last bit."""
    settings: Settings
    estimator: str
    """The one used: the one asked for, "finite_difference" after a fallback, "none" if F was not finite (x' = x)."""
    fallback: str | None
    """Why it is not what was asked for."""
    gradient: dict[str, float]
    """dF/dpsi at x (``random``: of the lookahead whose length it takes)."""
    displacement: dict[str, float]
    loss: float | None
    """The objective at x."""
    seconds: float
    flops: int = 0
    peak_memory: int = 0

    def record(self) -> dict[str, Any]:
        """JSON-able record for the trial's first report."""
        return {
            "requested": self.settings.estimator,
            "estimator": self.estimator,
            "fallback": self.fallback,
            "step": self.settings.step,
            "n_steps": self.settings.n_steps,
            "batch_size": self.settings.batch_size,
            "x": self.x,
            "x_prime": self.config,
            "gradient": self.gradient,
            "displacement": self.displacement,
            "length": length(self.displacement),
            "share": shares(self.displacement),
            "loss": self.loss,
            "seconds": self.seconds,
            "flops": self.flops,
            "peak_memory": self.peak_memory,
        }


def warm_start(
    config: Mapping[str, Any],
    space: Space,
    problem: Problem | Objective,
    settings: Settings,
    rng: np.random.Generator | None = None,
) -> WarmStart:
    """One warm start of ``config`` (x). ``rng`` is needed, and drawn from, by the estimator ``random`` only.

    Moves the continuous hyperparameters of ``space`` that ``problem`` has a gradient for and ``settings.mask`` does not
    freeze. Each of the ``n_steps`` steps takes ``problem.draw(i)`` and the gradient at the psi reached so far.

    Fallbacks, all recorded: a gradient that is missing, not implemented or not finite gives way to finite differences;
    if they fail as well, x' = x. Other errors of the model or the losses, lack of memory among them, are raised.
    ``random`` first runs the lookahead with the same settings, for its length and so that both cost the same.
    Raises ValueError for the estimator ``off``, for a mask of unknown names, and for ``random`` without ``rng``."""
    if settings.estimator == "off":
        raise ValueError("the estimator is 'off': there is no warm start to do")
    if settings.estimator == "random" and rng is None:
        raise ValueError("the estimator 'random' needs a random generator")
    started = _now(problem.device)
    coordinates = _free_coordinates(config, space, problem, settings)
    walk = _descend(config, problem, settings, coordinates)
    if settings.estimator == "random" and walk.estimator != "none":
        walk = _scatter(walk, coordinates, cast(np.random.Generator, rng))
    return WarmStart(
        x=dict(config),
        config=_configuration(config, walk, coordinates),
        settings=settings,
        estimator=walk.estimator,
        fallback="; ".join(walk.reasons) or None,
        gradient=walk.first.gradient if walk.first else {},
        displacement=displacement(walk.start, walk.end, coordinates),
        loss=walk.first.loss if walk.first else None,
        seconds=_now(problem.device) - started,
    )


@dataclass(frozen=True)
class _Walk:
    """The way from psi ``start`` to psi ``end``; ``first``: the first step's estimate."""

    start: dict[str, float]
    end: dict[str, float]
    estimator: str
    reasons: Sequence[str]
    first: Estimate | None


def _free_coordinates(
    config: Mapping[str, Any], space: Space, problem: Problem | Objective, settings: Settings
) -> dict[str, Coordinate]:
    unknown = set(settings.mask) - set(space.continuous)
    if unknown:
        raise ValueError(f"mask names {', '.join(sorted(unknown))}; this space has {', '.join(space.continuous)}")
    free = [name for name in space.continuous if name in problem.movable and name not in settings.mask]
    log1m: set[Any] = set()
    if isinstance(problem, Problem) and settings.momentum_space == "log1m":
        log1m = {problem.update.momentum}
    return {name: Coordinate(space.continuous[name], log1m=name in log1m) for name in free}


def _descend(
    config: Mapping[str, Any], problem: Problem | Objective, settings: Settings, coordinates: Mapping[str, Coordinate]
) -> _Walk:
    """The steps of every estimator (``random``: of the lookahead)."""
    start = {name: x.psi(config[name]) for name, x in coordinates.items()}
    walk = _Walk(start, start, settings.estimator, [], None)
    for i in range(settings.n_steps):
        here = _configuration(config, walk, coordinates)
        estimate, why = _estimate(here, problem, settings, coordinates, i)
        reasons = [*walk.reasons, *(f"step {i + 1}: {reason}" if settings.n_steps > 1 else reason for reason in why)]
        if estimate is None:
            return _Walk(start, start, "none", reasons, walk.first)
        end = step(settings.step, settings.eta, estimate.gradient, walk.end, coordinates)
        used = "finite_difference" if why and settings.estimator != "random" else walk.estimator
        walk = _Walk(start, end, used, reasons, walk.first or estimate)
    return walk


def _configuration(config: Mapping[str, Any], walk: _Walk, coordinates: Mapping[str, Coordinate]) -> dict[str, Any]:
    """``config`` at psi ``walk.end``; what has not moved keeps its own value (exp(log(x)) is not always x)."""
    moved = {name: x.value(walk.end[name]) for name, x in coordinates.items() if walk.end[name] != walk.start[name]}
    return {**config, **moved}


def _estimate(
    config: Mapping[str, Any],
    problem: Problem | Objective,
    settings: Settings,
    coordinates: Mapping[str, Coordinate],
    step: int,
) -> tuple[Estimate | None, list[str]]:
    """The estimate, by finite differences if need be, None if they fail as well; and the reasons of the failures."""
    gradient, objective = _ways(problem, settings, coordinates, config, step)
    h = problem.h if isinstance(problem, Objective) else finite_step(problem)
    attempts = {"finite_difference": lambda: finite_difference(objective, config, coordinates, h)}
    if settings.estimator != "finite_difference":
        attempts = {settings.estimator: gradient, **attempts}
    reasons: list[str] = []
    for name, attempt in attempts.items():
        estimate, reason = _attempt(attempt)
        if estimate is not None:
            return estimate, reasons
        reasons.append(f"{name}: {reason}")
    return None, reasons


def _ways(
    problem: Problem | Objective,
    settings: Settings,
    coordinates: Mapping[str, Coordinate],
    config: Mapping[str, Any],
    step: int,
) -> tuple[Callable[[], Estimate], Callable[[Mapping[str, Any]], float]]:
    """The estimate by gradients, and the objective for finite differences."""
    if isinstance(problem, Objective):

        def none() -> Estimate:
            raise MissingGradient(f"missing gradient: {problem.reason}")

        return none, lambda trial: problem.value(trial, step)
    batches = problem.draw(step)
    if settings.estimator == "direct":
        by_gradient = functools.partial(direct, problem, config, batches, coordinates)
    else:
        by_gradient = functools.partial(lookahead, problem, config, batches, coordinates, settings.momentum)
    return by_gradient, lambda trial: lookahead_objective(problem, trial, batches, settings.momentum)


def _attempt(estimator: Callable[[], Estimate]) -> tuple[Estimate | None, str]:
    """The estimate, or None and why it is of no use."""
    try:
        estimate = estimator()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not isinstance(error, MissingGradient) and not NO_DERIVATIVE.search(str(error)):
            raise
        return None, str(error).splitlines()[0]
    if estimate.not_finite:
        return None, f"not finite: {', '.join(estimate.not_finite)}"
    return estimate, ""


def _scatter(walk: _Walk, coordinates: Mapping[str, Coordinate], rng: np.random.Generator) -> _Walk:
    """A move of the same length in a random direction, redrawn until it ends inside the bounds."""
    radius = length(displacement(walk.start, walk.end, coordinates))
    if radius == 0.0:
        return walk
    for _ in range(DRAWS):
        direction = rng.standard_normal(len(coordinates))
        move = dict(zip(coordinates, (radius * direction / np.linalg.norm(direction)).tolist(), strict=True))
        end = {name: walk.start[name] + move[name] * x.width for name, x in coordinates.items()}
        if all(x.bounds[0] <= end[name] <= x.bounds[1] for name, x in coordinates.items()):
            return dataclasses.replace(walk, end=end)
    clipped = {name: min(max(end[name], x.bounds[0]), x.bounds[1]) for name, x in coordinates.items()}
    reason = f"random: no direction of length {radius:.3g} inside the bounds in {DRAWS} draws, clipped"
    return dataclasses.replace(walk, end=clipped, reasons=[*walk.reasons, reason])


def _now(device: torch.device) -> float:
    """Seconds of a monotonic clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
