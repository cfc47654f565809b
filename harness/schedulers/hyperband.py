"""Hyperband (Li et al., JMLR 2018), synchronous: a rung is promoted when all of its trials have reported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialSuggestion

from harness.schedulers.base import BaseScheduler, Job, Mode, Searcher, worst
from harness.schedulers.rungs import check_halving, halvings


def bracket_rungs(
    grace_period: int, eta: float, max_t: int, brackets: int | None = None
) -> list[list[tuple[int, int]]]:
    """(size, level) of the rungs of each bracket, most halvings first; ``brackets=k``: the first k, None: all.

    For 1..27 by 3: [27@1, 9@3, 3@9, 1@27], [12@3, 4@9, 2@27], [6@9, 2@27], [4@27]. A level that rounds to ``max_t``
    before the last rung is left out: its trials would have nothing to train in the rung after.
    """
    s_max = halvings(grace_period, eta, max_t)
    count = s_max + 1 if brackets is None else min(brackets, s_max + 1)
    return [_rungs_of_bracket(b, s_max, grace_period, eta, max_t) for b in range(count)]


def _rungs_of_bracket(bracket: int, s_max: int, grace_period: int, eta: float, max_t: int) -> list[tuple[int, int]]:
    m = s_max - bracket
    last = (s_max + 1) / (m + 1)
    rungs = [(math.ceil(last * eta ** (m - j)), round(grace_period * eta ** (j + bracket))) for j in range(m)]
    return [rung for rung in rungs if rung[1] < max_t] + [(math.ceil(last), max_t)]


@dataclass
class Slot:
    """A place in a rung: for a new configuration if ``trial_id`` is None; ``closed``: it has a value, or failed
    (None)."""

    trial_id: int | None = None
    taken: bool = False
    closed: bool = False
    value: float | None = None


class Bracket:
    """One bracket: the slots of its current rung. Complete when all slots of the last rung are closed."""

    def __init__(self, rungs: list[tuple[int, int]], mode: Mode):
        self._rungs, self._mode, self._index = rungs, mode, 0
        self.slots = [Slot() for _ in range(rungs[0][0])]

    @property
    def level(self) -> int:
        return self._rungs[self._index][1]

    @property
    def complete(self) -> bool:
        return self._index == len(self._rungs)

    def take(self) -> Slot | None:
        """The first free slot of the current rung, now taken."""
        slot = next((s for s in self.slots if not (s.taken or s.closed)), None)
        if slot is not None:
            slot.taken = True
        return slot

    def close(self, slot: Slot, value: float | None) -> None:
        """Enter the value of a slot (None: failed). The last one of a rung promotes its best trials."""
        slot.closed, slot.value = True, value
        while not self.complete and all(s.closed for s in self.slots):
            self._promote()

    def withdraw(self, trial_id: int) -> None:
        """The trial has failed: its slot in the current rung fails, whatever its state."""
        for slot in self.slots:
            if slot.trial_id == trial_id:
                self.close(slot, None)
                return

    def _promote(self) -> None:
        self._index += 1
        if self.complete:
            self.slots = []
            return
        size = self._rungs[self._index][0]
        sign = 1.0 if self._mode == "min" else -1.0
        reported = [(sign * s.value, k) for k, s in enumerate(self.slots) if s.value is not None]
        if len(reported) >= size:  # too few for the next rung stay in slot order, as published
            reported = sorted(reported)[:size]
        self.slots = [Slot(self.slots[k].trial_id) for _, k in reported]


@dataclass
class SlotJob(Job):
    """Fill ``slot`` of ``bracket``."""

    bracket: Bracket
    slot: Slot


class Hyperband(BaseScheduler[SlotJob]):
    """Brackets from many configurations at little resource to few at ``max_t``, one after another and again from the
    first.

    A free worker takes the first free slot, from the oldest incomplete bracket upward; if all are taken a further
    bracket begins, so that no worker ever waits.

    Equal to syne-tune 0.14.2's synchronous Hyperband, decision for decision. Difference: a trial that failed, or whose
    value is not finite, is never promoted; if too few others are left, the next rung is smaller (there: failed trials
    are resumed).
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
        brackets: int | None = None,
        searcher: Searcher | None = None,
        seed: int = 0,
    ):
        """``grace_period``: the lowest level; ``eta``: reduction factor; ``brackets``: use the first so many (None:
        all). The rest as in ``BaseScheduler``."""
        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, searcher=searcher, seed=seed,
        )  # fmt: skip
        check_halving(grace_period, eta, max_t, brackets)
        self.grace_period, self.eta = grace_period, eta
        self.bracket_rungs = bracket_rungs(grace_period, eta, max_t, brackets)
        self._created = 0
        self._open: list[Bracket] = []
        self._bracket_of: dict[int, Bracket] = {}

    def suggest(self) -> TrialSuggestion | None:
        """None only if the searcher has no configuration left; the slot has failed then, so that its bracket can go
        on."""
        bracket, slot = self._take_slot()
        job = SlotJob(bracket.level, bracket, slot)
        if slot.trial_id is not None:
            return self.resume(slot.trial_id, job)
        suggestion = self.start(job, train_to=job.milestone)
        if suggestion is None:
            bracket.close(slot, None)
        return suggestion

    def on_trial_add(self, trial: Trial) -> None:
        super().on_trial_add(trial)
        job = self.running.get(trial.trial_id)
        if job is not None:
            job.slot.trial_id = trial.trial_id
            self._bracket_of[trial.trial_id] = job.bracket

    def decide(self, trial_id: int, job: SlotJob, resource: int, value: float) -> str:
        """PAUSE at every level, ``max_t`` included."""
        if resource < job.milestone:
            return SchedulerDecision.CONTINUE
        job.bracket.close(job.slot, None if value == worst(self.mode) else value)
        return SchedulerDecision.PAUSE

    def leave(self, trial_id: int, job: SlotJob) -> None:
        """A trial that ended before its level counts as failed: its rung must not wait for it."""
        if not job.slot.closed:
            job.bracket.close(job.slot, None)

    def withdraw(self, trial_id: int) -> None:
        if trial_id in self._bracket_of:
            self._bracket_of[trial_id].withdraw(trial_id)

    def metadata(self) -> dict[str, Any]:
        return {
            **super().metadata(),
            "grace_period": self.grace_period,
            "eta": self.eta,
            "brackets": len(self.bracket_rungs),
            "bracket_rungs": self.bracket_rungs,
        }

    def _take_slot(self) -> tuple[Bracket, Slot]:
        self._open = [bracket for bracket in self._open if not bracket.complete]
        for bracket in self._open:
            slot = bracket.take()
            if slot is not None:
                return bracket, slot
        self._open.append(Bracket(self.bracket_rungs[self._created % len(self.bracket_rungs)], self.mode))
        self._created += 1
        return self._take_slot()
