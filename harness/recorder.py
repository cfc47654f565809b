"""Between Syne Tune's ``Tuner`` and the scheduler: writes every decision down as it is made, keeps budgets, replays.

The recorder is itself a ``TrialScheduler``. It hides test scores from the scheduler, and after a crash it brings a
fresh scheduler to where the old one was by feeding it the recorded events and checking that it decides the same.
"""

import datetime
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from syne_tune.backend.trial_status import Status, Trial
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialScheduler, TrialSuggestion

from harness.record import EventLog

HIDDEN = "test_"  # begins the name of what is recorded for the study and never shown to a scheduler
NOT_GPU_TIME = ("test",)  # kinds of busy seconds that are left out of GPU-hours, for the same reason


class ReplayError(Exception):
    """The recorded events are not what this scheduler decides: the cell's record cannot be continued."""


@dataclass(frozen=True)
class Budget:
    """Limits of one cell; ``None`` means no limit.

    ``wallclock`` seconds, ``gpu_hours`` busy hours of all GPUs without test evaluation, ``trials`` new configurations,
    ``epochs`` reported epochs over all trials.
    """

    wallclock: float | None = None
    gpu_hours: float | None = None
    trials: int | None = None
    epochs: int | None = None


class CellClock:
    """Seconds since the cell started, without the pauses between its attempts."""

    def __init__(self, offset: float = 0.0):
        self._start = time.monotonic() - offset

    def __call__(self) -> float:
        return time.monotonic() - self._start


@dataclass
class TrialState:
    """What the events say of one trial: enough to continue it."""

    config: dict[str, Any]
    status: str = Status.in_progress
    results: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Progress:
    """Running totals of a cell, from its events. ``gpus``: of a trial."""

    gpus: int = 1
    epochs: int = 0
    gpu_seconds: float = 0.0
    best: float | None = None
    incumbent: tuple[int, int] | None = None  # trial and epoch of ``best``, the first of equals
    failures: int = 0
    barren: int = 0  # failures since the last report: a trial function that always fails must not spin for ever
    exhausted: str | None = None  # why no further trial will be started
    trials: dict[int, TrialState] = field(default_factory=dict)

    def apply(self, event: Mapping[str, Any], mode: str) -> None:
        """Account for one event of the log."""
        kind, trial = event["e"], event.get("trial", -1)
        if kind == "start":
            self.trials[trial] = TrialState(dict(event["config"]))
        elif kind == "resume":
            self.trials[trial].config = dict(event["config"])
            self.trials[trial].status = Status.in_progress
        elif kind == "report":
            self._report(trial, event, mode)
        elif kind == "error":
            self.trials[trial].status = Status.failed
            self.failures += 1
            self.barren += 1
            self._charge(event)
        elif kind == "complete":
            self.trials[trial].status = Status.completed
        elif kind == "none":
            self.exhausted = event["why"]

    def _report(self, trial_id: int, event: Mapping[str, Any], mode: str) -> None:
        trial, result = self.trials[trial_id], event["result"]
        trial.results.append(dict(result))
        trial.status = {"PAUSE": Status.paused, "STOP": Status.stopped}.get(event["decision"], Status.in_progress)
        self.epochs += 1
        self.barren = 0
        self._charge(result)
        score = result["validation_score"]
        if math.isfinite(score) and (self.best is None or (score > self.best if mode == "max" else score < self.best)):
            self.best, self.incumbent = score, (trial_id, result["epoch"])

    def _charge(self, spent: Mapping[str, Any]) -> None:
        busy = sum(s for kind, s in spent.get("busy", {}).items() if kind not in NOT_GPU_TIME)
        self.gpu_seconds += busy * self.gpus

    def in_flight(self) -> list[int]:
        return [k for k, trial in sorted(self.trials.items()) if trial.status == Status.in_progress]


class Recorder(TrialScheduler):
    """Wraps a scheduler for the ``Tuner``: log, budgets, replay.

    :param scheduler: any ``TrialScheduler``, usually ``OHGW(...)`` around one
    :param log: where events go
    :param budget: limits; once one is used up no further report is recorded and ``exhausted()`` is true
    :param clock: seconds since the cell started
    :param failure: ``trial_id -> {"reason": ..., "busy": ...}`` of a failed trial
    :param on_event: called after every event is on disk (progress display, tracker)
    :param on_decision: called with the seconds of every decision of the scheduler, before the event it leads to is
        written: ``("suggest" | "report", seconds)``
    :param gpus: of a trial
    """

    def __init__(
        self,
        scheduler: TrialScheduler,
        log: EventLog,
        budget: Budget,
        clock: Callable[[], float],
        failure: Callable[[int], dict[str, Any]],
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        on_decision: Callable[[str, float], None] = lambda kind, seconds: None,
        gpus: int = 1,
    ):
        super().__init__(random_seed=0)
        self.scheduler, self.log, self.budget, self.clock = scheduler, log, budget, clock
        self.failure, self.on_event, self.on_decision = failure, on_event, on_decision
        self.progress = Progress(gpus)
        self.mode = scheduler.metric_mode()
        self._returning: list[int] = []  # trials that were running when the last attempt at this cell ended

    # ---- what the Tuner calls

    def suggest(self) -> TrialSuggestion | None:
        if self._returning:
            trial_id = self._returning.pop(0)
            return TrialSuggestion.resume_suggestion(trial_id, dict(self.progress.trials[trial_id].config))
        if self.progress.exhausted:
            return None
        begun = time.perf_counter()
        suggestion = self.scheduler.suggest()
        self.on_decision("suggest", time.perf_counter() - begun)
        if suggestion is None:
            self._write({"e": "none", "why": "scheduler"})
        elif not suggestion.spawn_new_trial_id:
            trial_id = int(suggestion.checkpoint_trial_id)
            config = suggestion.config or self.progress.trials[trial_id].config
            self._write({"e": "resume", "trial": trial_id, "config": dict(config), **self._origin()})
        elif self.budget.trials is not None and len(self.progress.trials) >= self.budget.trials:
            self._write({"e": "none", "why": "trials"})
            return None
        return suggestion

    def on_trial_add(self, trial: Trial) -> None:
        self.scheduler.on_trial_add(trial)
        self._write({"e": "start", "trial": trial.trial_id, "config": dict(trial.config), **self._origin()})

    def on_trial_result(self, trial: Trial, result: dict[str, Any]) -> str:
        if self.exhausted():
            return SchedulerDecision.STOP
        result = {key: value for key, value in result.items() if not key.startswith("st_")}
        begun = time.perf_counter()
        decision = self.scheduler.on_trial_result(trial, _visible(result))
        self.on_decision("report", time.perf_counter() - begun)
        self._write({"e": "report", "trial": trial.trial_id, "decision": decision, "result": result})
        return decision

    def on_trial_error(self, trial: Trial) -> None:
        self.scheduler.on_trial_error(trial)
        self._write({"e": "error", "trial": trial.trial_id, **self.failure(trial.trial_id)})

    def on_trial_complete(self, trial: Trial, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(trial, _visible(result))
        self._write({"e": "complete", "trial": trial.trial_id})

    def on_trial_remove(self, trial: Trial) -> None:
        if not self.exhausted() or self.progress.trials[trial.trial_id].status != Status.in_progress:
            self.scheduler.on_trial_remove(trial)

    def metric_names(self) -> list[str]:
        return self.scheduler.metric_names()

    def metric_mode(self) -> str:
        return self.mode

    def metadata(self) -> dict[str, Any]:
        return {
            "scheduler_name": type(self.scheduler).__name__,
            "metric_names": self.metric_names(),
            "metric_mode": self.mode,
        }

    # ---- budgets and log

    def exhausted(self) -> str | None:
        """The name of the budget that is used up, if any."""
        used = {
            "wallclock": self.clock(),
            "gpu_hours": self.progress.gpu_seconds / 3600,
            "epochs": self.progress.epochs,
        }
        for name, amount in used.items():
            limit = getattr(self.budget, name)
            if limit is not None and amount >= limit:
                return name
        return None

    def note(self, event: dict[str, Any]) -> None:
        """Log an event that is no decision (a lost worker, a retry)."""
        self._write(event)

    def _origin(self) -> dict[str, Any]:
        """Where a model-based scheduler's suggestion came from (``harness.schedulers.Origin``); empty for others."""
        origin = getattr(self.scheduler, "origin", None)
        return {} if origin is None else {"origin": {k: v for k, v in vars(origin).items() if v is not None}}

    def _write(self, event: dict[str, Any]) -> None:
        event = {"e": event["e"], "t": round(self.clock(), 6), **event}
        self.log.append(event)
        self.progress.apply(event, self.mode)
        self.on_event(event)

    # ---- resume

    def replay(self, events: list[dict[str, Any]]) -> None:
        """Bring the scheduler to the state after ``events``; raises ReplayError where it decides otherwise."""
        for number, event in enumerate(events, 1):
            try:
                self._replay_one(event)
                self.progress.apply(event, self.mode)
            except (ReplayError, LookupError, TypeError, ValueError) as error:  # what an inconsistent record does
                why = error if isinstance(error, ReplayError) else repr(error)
                raise ReplayError(f"event {number} ({event['e']} of trial {event.get('trial')}): {why}") from error
        self._returning = self.progress.in_flight()

    def _replay_one(self, event: dict[str, Any]) -> None:
        kind, scheduler = event["e"], self.scheduler
        if kind in ("start", "resume"):
            self._replay_suggestion(event)
        elif kind == "none":
            suggestion = scheduler.suggest()
            if event["why"] == "scheduler" and suggestion is not None:
                raise ReplayError(f"no suggestion was recorded, now {suggestion}")
        elif kind == "report":
            trial = self._trial(event["trial"])
            decision = scheduler.on_trial_result(trial, _visible(event["result"]))
            if decision != event["decision"]:
                raise ReplayError(f"decision {event['decision']} was recorded, now {decision}")
            if decision != SchedulerDecision.CONTINUE:
                scheduler.on_trial_remove(trial)
        elif kind == "error":
            scheduler.on_trial_error(self._trial(event["trial"]))
        elif kind == "complete":
            trial_id = event["trial"]
            scheduler.on_trial_complete(self._trial(trial_id), _visible(self.progress.trials[trial_id].results[-1]))

    def _replay_suggestion(self, event: dict[str, Any]) -> None:
        new, trial_id, config = event["e"] == "start", event["trial"], dict(event["config"])
        suggestion = self.scheduler.suggest()
        if suggestion is None:
            raise ReplayError("a suggestion was recorded, now there is none")
        resumed = None if suggestion.spawn_new_trial_id else int(suggestion.checkpoint_trial_id)
        if resumed != (None if new else trial_id):
            raise ReplayError(f"trial {trial_id} was recorded, now {suggestion}")
        if suggestion.config is not None and dict(suggestion.config) != config:
            raise ReplayError(f"configuration {config} was recorded, now {suggestion.config}")
        if new:
            self.scheduler.on_trial_add(Trial(trial_id, config, datetime.datetime.now()))

    def _trial(self, trial_id: int) -> Trial:
        return Trial(trial_id, dict(self.progress.trials[trial_id].config), datetime.datetime.now())


def _visible(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not key.startswith(HIDDEN)}
