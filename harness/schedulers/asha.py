"""ASHA, asynchronous successive halving (Li et al., MLSys 2020): promotion and stopping type, with brackets."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from syne_tune.optimizer.scheduler import SchedulerDecision, TrialSuggestion

from harness.schedulers.base import BaseScheduler, Job, Mode, Searcher, require
from harness.schedulers.rungs import Entry, RungSystem, bracket_probabilities, check_halving, rung_levels
from harness.seeds import rng


@dataclass
class BracketJob(Job):
    """Train to ``milestone``, in a trial of ``bracket``."""

    bracket: int


class ASHA(BaseScheduler[BracketJob]):
    """Each free worker goes to the most promising paused trial (type "promotion") or to a new configuration.

    "promotion": a trial pauses at its milestone; ``suggest`` resumes the best waiting trial of the highest rung that
    has one at or better than the rung's cutoff. "stopping": a trial runs on until it is worse than the cutoff at a
    rung.

    Equal to syne-tune 0.14.2's ``HyperbandScheduler`` of the same type, decision for decision. Differences, where that
    is broken: bracket draws come from a seeded stream of their own (there: the global generator); a value that is not
    finite counts as worst and never passes, and a trial whose worker fails after it paused is taken out of its rung
    (there: resumed).
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
        grace_period: int = 1,
        eta: float = 3,
        brackets: int | None = 1,
        type: Literal["promotion", "stopping"] = "promotion",
        rung_system_per_bracket: bool = False,
        searcher: Searcher | None = None,
        draw_bracket: Callable[[], int] | None = None,
        seed: int = 0,
    ):
        """``grace_period``: the lowest rung level; ``eta``: reduction factor; ``brackets``: number of brackets (None:
        all, never more than rungs + 1); by default all brackets share one rung system and differ in the first milestone
        only. ``draw_bracket`` is called once per ``suggest``; default: a stream of ``seed``. The rest as in
        ``BaseScheduler``."""
        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, searcher=searcher, seed=seed,
        )  # fmt: skip
        check_halving(grace_period, eta, max_t, brackets)
        require(type in ("promotion", "stopping"), f"type must be 'promotion' or 'stopping', got {type!r}")
        self.grace_period, self.eta, self.type = grace_period, eta, type
        self.levels = rung_levels(grace_period, eta, max_t)
        self.bracket_probabilities = bracket_probabilities(self.levels, max_t, brackets)
        offsets = range(len(self.bracket_probabilities)) if rung_system_per_bracket else [0]
        self._systems = [RungSystem(self.levels[offset:], max_t, mode) for offset in offsets]
        self._cumulative = list(accumulate(self.bracket_probabilities))
        self._bracket_rng = rng(seed, "brackets")
        self._draw_bracket = self._draw if draw_bracket is None else draw_bracket

    @property
    def cap(self) -> int:
        """The largest resource to which trials are promoted now."""
        return self.max_t

    def suggest(self) -> TrialSuggestion | None:
        bracket = self._draw_bracket()
        if self.type == "promotion":
            promotion = self._system(bracket).promote(below=self.cap)
            if promotion is not None:
                trial_id, milestone = promotion
                return self.resume(trial_id, BracketJob(milestone, bracket))
        first = [*self.levels, self.max_t][bracket]
        return self.start(BracketJob(first, bracket), train_to=first if self.type == "promotion" else self.max_t)

    def decide(self, trial_id: int, job: BracketJob, resource: int, value: float) -> str:
        """Reports below the milestone, repeated ones of a trial without checkpoint included, change nothing."""
        if resource >= self.max_t:
            return SchedulerDecision.STOP
        if resource < job.milestone:
            return SchedulerDecision.CONTINUE
        system = self._system(job.bracket)
        rung = system[job.milestone]
        rung.insert(Entry(trial_id, value))
        if self.type == "promotion":
            return SchedulerDecision.PAUSE
        job.milestone = system.next_level(resource)
        return SchedulerDecision.CONTINUE if rung.lets_continue(value) else SchedulerDecision.STOP

    def withdraw(self, trial_id: int) -> None:
        if self.type == "promotion":
            for system in self._systems:
                system.withdraw(trial_id)

    def metadata(self) -> dict[str, Any]:
        return {
            **super().metadata(),
            "type": self.type,
            "grace_period": self.grace_period,
            "eta": self.eta,
            "brackets": len(self.bracket_probabilities),
            "rung_levels": self.levels,
        }

    def _system(self, bracket: int) -> RungSystem:
        return self._systems[bracket] if len(self._systems) > 1 else self._systems[0]

    def _draw(self) -> int:
        return min(bisect_right(self._cumulative, self._bracket_rng.random()), len(self._cumulative) - 1)
