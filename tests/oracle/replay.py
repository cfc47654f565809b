"""Replays recorded decision traces of syne-tune 0.14.2's schedulers against a scheduler of this project.

A case file (``dev/*.jsonl``) is an input line (workers, configurations, learning curves, ticks per epoch), the events
of the published scheduler in order, and an end line. ``run`` is the deterministic event loop in which they were
recorded, without any scheduler logic; ``factory(inp, suggest_config, next_bracket)`` builds the scheduler under test.
"""

import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Factory = Callable[[dict[str, Any], Callable[[], dict[str, Any] | None], Callable[[], int]], Any]


@dataclass
class Trial:
    trial_id: int
    config: dict[str, Any]
    creation_time: datetime = datetime(2020, 1, 1)


@dataclass
class Simulation:
    """W workers and a virtual integer clock; trial k takes ``epoch_ticks[k]`` an epoch and follows ``curves[k]``."""

    inp: dict[str, Any]
    scheduler: Any
    now: int = 0
    exhausted: bool = False
    trials: list[Trial] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # reported by each trial
    due: list[tuple[int, int]] = field(default_factory=list)  # heap of (time of the next report, trial)

    def events(self) -> Iterator[Event]:
        while True:
            yield from self._fill_workers()
            if not self.due:
                return
            self.now = self.due[0][0]
            while self.due and self.due[0][0] == self.now:
                yield self._report(heapq.heappop(self.due)[1])

    def _fill_workers(self) -> Iterator[Event]:
        while len(self.due) < self.inp["workers"] and not self.exhausted:
            suggestion = self.scheduler.suggest()
            if suggestion is None:
                self.exhausted = self.inp["on_none"] == "stop"
                yield {"e": "suggest", "t": self.now, "none": True}
                return
            event = {"e": "suggest", "t": self.now}
            event |= self._start(suggestion) if suggestion.spawn_new_trial_id else self._resume(suggestion)
            if self.inp["scheduler"] != "asha_stopping":
                event["to"] = suggestion.config["epochs"]
            yield event

    def _start(self, suggestion: Any) -> Event:
        trial = Trial(len(self.trials), dict(suggestion.config))
        self.trials.append(trial)
        self.epochs.append(0)
        self.scheduler.on_trial_add(trial)
        self._schedule(trial.trial_id)
        return {"new": trial.trial_id}

    def _resume(self, suggestion: Any) -> Event:
        trial_id = int(suggestion.checkpoint_trial_id)
        done = self.epochs[trial_id]
        if suggestion.config is not None:
            self.trials[trial_id].config = dict(suggestion.config)
        if not self.inp["checkpointing"]:
            self.epochs[trial_id] = 0
        self._schedule(trial_id)
        return {"resume": trial_id, "from": done}

    def _report(self, trial_id: int) -> Event:
        trial, epoch = self.trials[trial_id], self.epochs[trial_id] + 1
        self.epochs[trial_id] = epoch
        value = self.inp["curves"][trial_id][epoch - 1]
        if value is None:
            self.scheduler.on_trial_error(trial)
            return {"e": "error", "t": self.now, "id": trial_id, "r": epoch}
        decision = self.scheduler.on_trial_result(trial, {self.inp["metric"]: value, self.inp["resource_attr"]: epoch})
        event = {"e": "report", "t": self.now, "id": trial_id, "r": epoch, "d": decision}
        if hasattr(self.scheduler, "oracle_state"):
            event |= self.scheduler.oracle_state()
        if decision == "CONTINUE":
            assert epoch < self.inp["max_t"], "CONTINUE at max_t"
            self._schedule(trial_id)
        else:
            self.scheduler.on_trial_remove(trial)
        return event

    def _schedule(self, trial_id: int) -> None:
        heapq.heappush(self.due, (self.now + self.inp["epoch_ticks"][trial_id], trial_id))


def load(path: str | Path) -> tuple[dict[str, Any], list[Event]]:
    """Input and events of a case file."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert (rows[0]["e"], rows[-1]["e"]) == ("input", "end"), path
    return rows[0], rows[1:-1]


def run(inp: dict[str, Any], factory: Factory) -> Iterator[Event]:
    """The events of ``factory``'s scheduler on ``inp``."""
    configs = iter(inp["configs"])
    draws = iter(inp.get("bracket_draws", []))

    def suggest_config() -> dict[str, Any] | None:
        config = next(configs, None)
        return None if config is None else dict(config)

    def next_bracket() -> int:
        return next(draws, 0)

    return Simulation(inp, factory(inp, suggest_config, next_bracket)).events()


def check_case(path: str | Path, factory: Factory) -> tuple[int, Event | None, Event | None] | None:
    """None if the traces agree, else (number of the event, expected, got)."""
    inp, expected = load(path)
    got = run(inp, factory)
    for number, want in enumerate(expected):
        event = next(got, None)
        if event is None or not agrees(want, event):
            return number, want, event
    extra = next(got, None)
    return None if extra is None else (len(expected), None, extra)


def agrees(want: Event, got: Event) -> bool:
    """All that we say is as recorded, and we say all that makes a decision."""
    decisions = ("new", "resume", "none", "d", "cap", "eps")
    return all(want.get(key) == value for key, value in got.items()) and all(k in got for k in decisions if k in want)
