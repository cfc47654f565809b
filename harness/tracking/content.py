"""What trackers show of a cell: the run's id, history rows, tables, the summary as flat keys, the files of the record.

History keys: ``wallclock`` (seconds of the cell), ``gpu_hours`` and ``epochs`` (reports of all trials together) are
the x axes; ``incumbent/validation_score`` and ``incumbent/test_score``; ``trials`` and ``failures`` so far;
``rung/<level>``: trials that reached that number of epochs. A row's step is ``epochs``, so that the rows of a cell that
goes on after an interruption follow those of its earlier attempts. A record is one run: a cell that starts afresh (its
record was deleted or set aside) gets another one, because its steps start again, too.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import record
from harness.record import CellPaths
from harness.recorder import Progress
from harness.schedulers.rungs import rung_levels
from harness.sweep import Cell, gpus_per_trial

FILES = ("config.yaml", "meta.json", "events.jsonl", "trials.jsonl", "decisions.jsonl", "summary.json")
AXES = ("wallclock", "gpu_hours", "epochs")
RULER = 3.0  # eta of the levels at which schedulers without rungs are read
NOT_X = ("epochs",)  # what a configuration has besides hyperparameters


NAME_LENGTH = 40  # characters of a study's name in a run's id: W&B takes 64 in all


def run_id(cell: Cell, folder: Path, now: float) -> str:
    """``<name>-<identity>-<start of the record>``, in characters that every tracker takes: the same for every attempt.

    The start is in unix seconds, hexadecimal; ``now`` (the time in the command's meta.json) where the record in
    ``folder`` will not be continued. A longer name is cut, with a digest of the whole one.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", cell.config["name"])
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(cell.config['name'].encode()).hexdigest()[:8]}"
    return f"{name}-{cell.identity}-{int(_start(cell, folder, now)):x}"


def _start(cell: Cell, folder: Path, now: float) -> float:
    events, problems = record.read_events(CellPaths.of(folder).events)
    failed = bool(events) and events[-1]["e"] == "close" and events[-1]["why"] == "failed"
    if not events or failed or any(problem.fatal for problem in problems):
        return now
    return events[0].get("time", now)  # in virtual time there is none: such a cell always starts afresh


def levels(config: Mapping[str, Any]) -> list[int]:
    """The cell's rung levels in epochs, ascending, ``max_epochs`` included; 1, 3, 9, ... for a scheduler without."""
    scheduler, most = config["scheduler"], config["task"]["max_epochs"]
    return [*rung_levels(scheduler.get("grace_period", 1), scheduler.get("eta", RULER), most), most]


@dataclass(frozen=True)
class Row:
    """A point of the history: ``step`` is the number of reports so far."""

    step: int
    values: dict[str, float]


class History:
    """Collects a cell's history and gives it out in bursts, ``interval`` seconds (of real time) apart.

    A burst has a row for each change of the incumbent since the last one, at its own time, and one of the present
    state: in virtual time, where a whole cell fits between two bursts, the incumbent's curve is complete all the same.
    """

    def __init__(self, cell: Cell, folder: Path, interval: float):
        self._events, self._mode = CellPaths.of(folder).events, cell.config["task"].get("mode", "max")
        self._levels, self._interval, self._gpus = levels(cell.config), interval, gpus_per_trial(cell.config)
        self._reset()

    def _reset(self) -> None:
        self._pending: list[Row] = []
        self._now: tuple[float, Progress] | None = None  # set while there is something that no row shows
        self._given = 0  # the last step
        self._best: float | None = None
        self._test = math.nan
        self._reached = dict.fromkeys(self._levels, 0)
        self._sent = time.monotonic()

    def add(self, event: Mapping[str, Any], progress: Progress) -> list[Row]:
        """Account for an event; returns the rows to send now, usually none."""
        kind = event["e"]
        if kind == "open":
            self._reset()
            if progress.epochs:
                self._catch_up(event)
        elif kind in ("report", "error"):
            self._now = (event["t"], progress)
            if kind == "report":
                self._report(event["result"], progress)
            if time.monotonic() - self._sent >= self._interval:
                return self.rest()
        return []

    def rest(self) -> list[Row]:
        """All rows that were not given out yet, the present state last."""
        if self._now is not None:
            self._keep()
        rows, self._pending = self._pending, []
        self._given = max([self._given, *(row.step for row in rows)])
        self._now, self._sent = None, time.monotonic()
        return rows

    def put_back(self, rows: Sequence[Row]) -> None:
        """Rows that could not be sent: an interrupt came between. They are the first of the next ones."""
        self._pending = [*rows, *self._pending]

    def _catch_up(self, opened: Mapping[str, Any]) -> None:
        """The rows of earlier attempts, from the record, ``interval`` seconds of the cell apart: a tracker may lack the
        last ones, or all of them. It leaves out the steps that it has."""
        past, shown = Progress(self._gpus), -math.inf
        for event in record.read_events(self._events)[0]:
            if event["e"] == "open" and event["run"] == opened["run"]:
                break
            past.apply(event, self._mode)
            if event["e"] == "report":
                self._now = (event["t"], past)
                self._report(event["result"], past)
                if event["t"] - shown >= self._interval:
                    self._keep()
                    shown = event["t"]
        if self._now is not None:
            self._keep()
        self._now = None

    def _report(self, result: Mapping[str, Any], progress: Progress) -> None:
        if result["epoch"] in self._reached:
            self._reached[result["epoch"]] += 1
        if progress.best != self._best:
            self._best, self._test = progress.best, result["test_score"]
            self._keep()

    def _keep(self) -> None:
        """Make a row of the present state; each step has one, the first: of an incumbent, that is its own time."""
        row = self._row()
        if row.step > max([self._given, *(row.step for row in self._pending[-1:])]):
            self._pending.append(row)

    def _row(self) -> Row:
        assert self._now is not None
        t, progress = self._now
        values = {"wallclock": t, "gpu_hours": progress.gpu_seconds / 3600, "epochs": progress.epochs,
                  "trials": len(progress.trials), "failures": progress.failures}  # fmt: skip
        if self._best is not None:
            values |= {"incumbent/validation_score": self._best, "incumbent/test_score": self._test}
        values |= {f"rung/{level}": count for level, count in self._reached.items()}
        return Row(progress.epochs, values)


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Any]]


def trial_table(events: Sequence[Mapping[str, Any]], mode: str) -> Table:
    """A row a trial: x, x', the estimator that was used and why not the requested one, epochs reached, best score."""
    records = {event["trial"]: {"x": event["config"]} for event in events if event["e"] == "start"}
    records |= {row["trial"]: row for row in record.trial_rows(events)}
    epochs, best = _reached(events, mode)
    names = list(dict.fromkeys(k for row in records.values() for k in row["x"] if k not in NOT_X))
    moved = list(dict.fromkeys(k for row in records.values() for k in row.get("x_prime") or {} if k not in NOT_X))
    columns = ["trial", *(f"x/{k}" for k in names), *(f"x_prime/{k}" for k in moved),
               "estimator", "fallback", "epochs", "best_validation_score"]  # fmt: skip
    rows = [
        [trial, *(row["x"].get(k) for k in names), *((row.get("x_prime") or {}).get(k) for k in moved),
         row.get("estimator"), row.get("fallback"), epochs.get(trial, 0), best.get(trial)]
        for trial, row in sorted(records.items())
    ]  # fmt: skip
    return Table(columns, record.plain(rows))


def rung_table(events: Sequence[Mapping[str, Any]], at: Iterable[int]) -> Table:
    """How many trials reached each level."""
    epochs, _ = _reached(events, "max")
    return Table(["level", "trials"], [[level, sum(last >= level for last in epochs.values())] for level in at])


def _reached(events: Sequence[Mapping[str, Any]], mode: str) -> tuple[dict[int, int], dict[int, float]]:
    """The last epoch and the best finite validation score of each trial that reported."""
    epochs: dict[int, int] = {}
    best: dict[int, float] = {}
    better = max if mode == "max" else min
    for event in events:
        if event["e"] == "report":
            trial, result = event["trial"], event["result"]
            epochs[trial] = max(result["epoch"], epochs.get(trial, 0))
            if math.isfinite(score := result["validation_score"]):
                best[trial] = better(score, best.get(trial, score))
    return epochs, best


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by "/"; None left out; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in record.plain(tree).items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found


def flat_summary(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json as flat keys. Besides ``t_tau/<tau>/...``, the times to the task's own tau as ``t_tau/...``, so that
    one chart fits all tasks, and ``t_tau/reached``, 1 or 0."""
    values = flat(summary)
    tau = cell.config["task"].get("tau")
    if tau is not None:
        times = summary["t_tau"][str(float(tau))]
        values |= flat(times, "t_tau/") | {"t_tau/reached": int(times["wallclock"] is not None)}
    return values


def files(folder: Path) -> list[Path]:
    """The files of a cell's record that exist."""
    return [folder / name for name in FILES if (folder / name).is_file()]
