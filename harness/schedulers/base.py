"""What all schedulers share: arguments, the books of trials, and Syne Tune 0.16's ``TrialScheduler`` protocol.

The protocol, as the ``Tuner`` drives it: ``suggest`` gets no trial id, ``on_trial_add`` follows a new trial before the
next ``suggest`` (a resumed trial gets none); STOP and PAUSE are both followed by ``on_trial_remove``,
``on_trial_complete`` comes only if a trial ended with neither, a failure gives ``on_trial_error``; a ``suggest`` that
returns None ends scheduling for good.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialScheduler, TrialSuggestion

from harness.schedulers.sampler import RandomSampler

Mode = Literal["min", "max"]


class Searcher(Protocol):
    """Where new configurations come from. A model-based one reads its scheduler's books (``BaseScheduler``) and has an
    attribute ``origin``: the ``Origin`` of its latest suggestion."""

    def suggest(self) -> dict[str, Any] | None:
        """A new configuration, or None if there is none left."""


@dataclass(frozen=True)
class Origin:
    """Where a suggestion of a model-based scheduler came from; goes into the record of the trial's start.

    ``by``: "random" (too few observations, or its turn), "model", or "last_model" (the newest fit failed, an older one
    was used). ``failure``: why the newest fit was of no use; None if it was, or if there was none to make.
    """

    by: Literal["random", "model", "last_model"]
    failure: str | None = None


@dataclass
class Job:
    """What a running trial is to do: train to ``milestone`` (a resource level, in units of ``resource_attr``)."""

    milestone: int


JobT = TypeVar("JobT", bound=Job)


class BaseScheduler(TrialScheduler, Generic[JobT]):
    """A scheduler that starts trials, pauses or stops them at resource levels, and resumes them.

    A subclass writes ``suggest`` (with ``start`` and ``resume``) and ``decide``; ``leave`` if it cares that a job
    ended.

    ``configs`` is the one place where a trial's configuration lives: set when the trial is added, replaced by
    ``trial.config`` at its first result, used when it is resumed. Whoever changes a configuration at the start of
    training (OHGW: x becomes x') passes a ``Trial`` that holds the new one, and everything built on ``configs``
    follows. ``curves`` holds every reported value by trial and resource (+-inf for one that is not finite), ``running``
    the jobs of the trials that are being trained, ``failed`` the trials that ended in an error: what a model needs.
    """

    def __init__(
        self,
        config_space: Mapping[str, Any],
        metric: str,
        *,
        mode: Mode = "min",
        max_t: int,
        resource_attr: str = "epoch",
        max_resource_attr: str | None = None,
        searcher: Searcher | None = None,
        seed: int = 0,
    ):
        """``metric`` and ``resource_attr`` are keys of the trials' reports, ``max_t`` the largest resource of a trial.
        ``max_resource_attr``: key under which a suggested configuration carries its milestone (None: it carries none).
        ``searcher``: default a ``RandomSampler`` of ``seed``. Raises ValueError for arguments that make no sense."""
        require(
            isinstance(metric, str) and metric != "", f"metric must be the name of a reported value, got {metric!r}"
        )
        require(mode in ("min", "max"), f"mode must be 'min' or 'max', got {mode!r}")
        require(is_integer(max_t) and max_t >= 1, f"max_t must be an integer >= 1, got {max_t!r}")
        require(is_integer(seed) and seed >= 0, f"seed must be an integer >= 0, got {seed!r}")
        super().__init__(random_seed=seed)
        self.metric, self.mode, self.max_t = metric, mode, max_t
        self.resource_attr, self.max_resource_attr = resource_attr, max_resource_attr
        self.searcher: Searcher = RandomSampler(config_space, seed) if searcher is None else searcher
        self.configs: dict[int, dict[str, Any]] = {}
        self.running: dict[int, JobT] = {}
        self.curves: dict[int, dict[int, float]] = {}
        self.failed: set[int] = set()
        self.origin: Origin | None = None
        self._observed: set[int] = set()
        self._pending: JobT | None = None

    def decide(self, trial_id: int, job: JobT, resource: int, value: float) -> str:
        """The decision on a report. ``value``: the metric, or the worst possible one (+-inf) if it was not finite."""
        raise NotImplementedError

    def leave(self, trial_id: int, job: JobT) -> None:
        """``job`` has ended, for whatever reason."""

    def withdraw(self, trial_id: int) -> None:
        """The trial has failed: it can never be resumed."""

    def start(self, job: JobT, train_to: int) -> TrialSuggestion | None:
        """Suggest a new trial for ``job``, told to train to ``train_to``; None if the searcher has nothing left."""
        config = self.searcher.suggest()
        if config is None:
            return None
        self._pending, self.origin = job, getattr(self.searcher, "origin", None)
        return TrialSuggestion.start_suggestion(self._with_milestone(config, train_to))

    def resume(self, trial_id: int, job: JobT) -> TrialSuggestion:
        """Suggest that a paused trial goes on, with the configuration in the books, and does ``job``."""
        self.running[trial_id], self.origin = job, None
        return TrialSuggestion.resume_suggestion(trial_id, self._with_milestone(self.configs[trial_id], job.milestone))

    def on_trial_add(self, trial: Trial) -> None:
        self.configs[trial.trial_id] = dict(trial.config)
        if self._pending is not None:
            self.running[trial.trial_id], self._pending = self._pending, None

    def on_trial_result(self, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE, PAUSE or STOP. A trial that this scheduler has not asked for runs up to ``max_t``.
        Raises ValueError if the report lacks the metric or the resource."""
        if trial.trial_id not in self._observed:
            self._observed.add(trial.trial_id)
            self.configs[trial.trial_id] = dict(trial.config)
        resource, value = self.read(trial, result)
        self.curves.setdefault(trial.trial_id, {})[resource] = value
        job = self.running.get(trial.trial_id)
        if job is None:
            return SchedulerDecision.STOP if resource >= self.max_t else SchedulerDecision.CONTINUE
        return self.decide(trial.trial_id, job, resource, value)

    def on_trial_remove(self, trial: Trial) -> None:
        job = self.running.pop(trial.trial_id, None)
        if job is not None:
            self.leave(trial.trial_id, job)

    def on_trial_complete(self, trial: Trial, result: dict[str, Any]) -> None:
        """The trial ended by itself, perhaps before its milestone: it is in no rung for that and never goes on."""
        self.on_trial_remove(trial)

    def on_trial_error(self, trial: Trial) -> None:
        self.failed.add(trial.trial_id)
        self.on_trial_remove(trial)
        self.withdraw(trial.trial_id)

    def read(self, trial: Trial, result: Mapping[str, Any]) -> tuple[int, float]:
        """Resource and metric of a report; a metric that is not finite becomes the worst possible one."""
        for key in (self.resource_attr, self.metric):
            require(key in result, f"trial {trial.trial_id} reported no {key!r}; it reported {sorted(result)}")
        value = float(result[self.metric])
        return int(result[self.resource_attr]), value if math.isfinite(value) else worst(self.mode)

    def metric_names(self) -> list[str]:
        return [self.metric]

    def metric_mode(self) -> str:
        return self.mode

    def metadata(self) -> dict[str, Any]:
        """What Syne Tune writes into an experiment's metadata; JSON-able."""
        return {
            "scheduler_name": type(self).__name__,
            "metric_names": self.metric_names(),
            "metric_mode": self.mode,
            "max_t": self.max_t,
            "resource_attr": self.resource_attr,
            "max_resource_attr": self.max_resource_attr,
            "seed": self.random_seed,
        }

    def _with_milestone(self, config: Mapping[str, Any], milestone: int) -> dict[str, Any]:
        return dict(config) if self.max_resource_attr is None else {**config, self.max_resource_attr: milestone}


def worst(mode: Mode) -> float:
    """The worst possible value of a metric."""
    return math.inf if mode == "min" else -math.inf


def is_integer(value: Any) -> bool:
    """True for an int that is no bool (YAML's ``yes`` must not pass for 1)."""
    return isinstance(value, int) and not isinstance(value, bool)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
