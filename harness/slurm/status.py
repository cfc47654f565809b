"""How cells that were given to Slurm stand: from their records, their tasks' own words, and Slurm's.

A task that ends says why (``status/<cell>.json``); where it could not, Slurm knows (TIMEOUT, OUT_OF_MEMORY, NODE_FAIL).
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import slurm_commands
from backends.slurm_commands import ACTIVE, HELD_BY_THE_SITE, Job, SlurmError
from harness.ownership import shown_holder
from harness.record import CellPaths
from harness.slurm import submissions
from harness.slurm.submissions import REPORT, Submission
from harness.sweep import Cell, Plan, aligned

NAMES = ("finished", "running", "pending", "failed", "interrupted", "not submitted")
LOOK = 1.0, 15.0  # seconds between two looks at the queue: at first, and later
SAY = 30.0  # seconds after which watching says a word although nothing has changed
VISIBLE = 120.0  # seconds until a file that a node wrote is seen on every other


@dataclass(frozen=True)
class State:
    """How a cell stands: ``name``, one of NAMES; ``why``: where it runs, what it waits for, what ended it; ``task`` of
    a job array, such as ``12_3``."""

    cell: Cell
    name: str
    why: str = ""
    task: str = ""
    log: Path | None = None


@dataclass(frozen=True)
class _Place:
    """A cell in a submission, and the task that has it."""

    submission: Submission
    number: int
    task: str


class Board:
    """The cells of a plan among all submissions of their study so far; does not notice later ones."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._submissions = {s.name: s for s in submissions.of_study(plan.root)}
        self._places: dict[str, _Place] = {}  # by the cell's identity, in the latest submission that has it
        self._ended: dict[str, tuple[str, str]] = {}  # by task, what Slurm's accounting said
        for submission in self._submissions.values():
            for job in submission.noted_jobs():
                if job["first"] != REPORT:
                    for k in range(job["cells"]):
                        self._put(_Place(submission, job["first"] + k, f"{job['job']}_{k}"))

    def _put(self, place: _Place) -> None:
        self._places[place.submission.cells[place.number].identity] = place

    def look(self, *, locks: bool = False) -> list[State]:
        """The states of all cells, in the plan's order. ``locks``: also see whether a command outside of Slurm runs
        one. Errors: SlurmError."""
        jobs = self._jobs()
        return [self._state(cell, jobs, locks) for cell in self.plan.cells]

    def active_jobs(self) -> tuple[list[str], list[str]]:
        """Ids of what waits or runs: tasks that have a cell of the plan, and report jobs of submissions all of whose
        other tasks are among them. Errors: SlurmError."""
        wanted = {cell.identity for cell in self.plan.cells}
        mine: dict[str, Job] = {}
        reports: dict[str, str] = {}
        touched, others = set(), set()
        for submission, number, job in self._ours(slurm_commands.jobs() if self._submissions else {}):
            if not job.active or job.state == "COMPLETING":
                continue
            if number is None:
                reports[job.id] = submission.name
            elif submission.cells[number].identity in wanted:
                mine[job.id] = job
                touched.add(submission.name)
            else:
                others.add(submission.name)
        waiting_first = sorted(mine, key=lambda task: mine[task].state != "PENDING")  # else they begin meanwhile
        return waiting_first, [job for job, submission in reports.items() if submission in touched - others]

    def active_arrays(self) -> list[str]:
        """Ids of the job arrays of the study, of any command, that have not ended. Errors: SlurmError."""
        ours = self._ours(slurm_commands.jobs() if self._submissions else {})
        return sorted(
            {job.id.partition("_")[0] for _, number, job in ours if number is not None and job.active}, key=int
        )

    def _jobs(self) -> dict[str, Job]:
        """By task, if there is a cell that is not finished and may have one."""
        if not self._submissions or all(CellPaths.of_cell(cell).finished for cell in self.plan.cells):
            return {}
        found = {}
        for submission, number, job in self._ours(slurm_commands.jobs()):
            if number is None:
                continue
            found[job.id] = job
            identity = submission.cells[number].identity
            if job.active or identity not in self._places:  # active ones of earlier submissions count more
                self._put(_Place(submission, number, job.id))
        return found

    def _ours(self, jobs: Mapping[str, Job]) -> Iterable[tuple[Submission, int | None, Job]]:
        """Jobs that belong to this study's submissions, by their comment, with the cell's number (None: the report)."""
        for job in jobs.values():
            named = submissions.of_comment(job.comment)
            if named is None or named[0] not in self._submissions:
                continue
            task = job.id.partition("_")[2]
            if named[1] == REPORT:
                yield self._submissions[named[0]], None, job
            elif task.isdigit():  # else it stands for what was left of an array when that was cancelled
                yield self._submissions[named[0]], int(named[1]) + int(task), job

    def _state(self, cell: Cell, jobs: Mapping[str, Job], locks: bool) -> State:
        place, paths = self._places.get(cell.identity), CellPaths.of_cell(cell)
        job = jobs.get(place.task) if place else None
        if place and job and job.state == "PENDING":
            return State(cell, "pending", job.reason, place.task)
        if paths.finished:
            return State(cell, "finished", "", place.task if place else "")
        log = place.submission.log(place.task) if place else None
        if place and job and job.active:
            return State(cell, "running", _where(job), place.task, log)
        if locks and (holder := shown_holder(paths.lock)):
            return State(cell, "running", f"{holder}, no task of this study")
        if place is None:
            return State(cell, "interrupted" if paths.events.exists() else "not submitted")
        return State(cell, *self._end(place, job), place.task, log)

    def _end(self, place: _Place, job: Job | None) -> tuple[str, str]:
        """What became of a task that is no longer in the queue: the state and why."""
        said = place.submission.status(place.number)
        of_last_run = said and said["task"] == place.task and (job is None or said["restart"] >= job.restarts)
        if said and of_last_run and said["state"] == "failed":
            return "failed", said["reason"]
        if said and of_last_run and said["state"] in ("interrupted", "elsewhere"):
            by_slurm = job is not None and job.state in ("CANCELLED", "PREEMPTED")
            return "interrupted", job.state.lower() if job and by_slurm else said["reason"]
        log = place.submission.log(place.task)
        if job is not None:
            return _judge(job.state, job.node, job.end, log)
        if place.task in self._ended:
            return self._ended[place.task]
        end = _accounted(place.task, log, ever_ran=said is not None)
        if end[0] != "running":
            self._ended[place.task] = end
        return end


def _where(job: Job) -> str:
    since = f" since {time.strftime('%d %b %H:%M', time.localtime(job.begin))}" if job.begin else ""
    return f"on {job.node}{since}" if job.node else job.state.lower()


def _accounted(task: str, log: Path, ever_ran: bool) -> tuple[str, str]:
    try:
        runs = slurm_commands.accounting([task])
    except SlurmError:
        runs = []
    if not runs:
        return "interrupted", "Slurm no longer knows its job" if ever_ran else "cancelled before it started"
    return _judge(runs[-1].state, runs[-1].nodes, runs[-1].end, log)


def _judge(state: str, node: str, end: float | None, log: Path) -> tuple[str, str]:
    """A cell's state by that of a job that has ended without a word of its own."""
    if state in ACTIVE:  # as accounting last heard; the queue does not have it
        return "interrupted", f"Slurm no longer has its job, last {state}"
    if state == "COMPLETED":
        if end is not None and time.time() - end < VISIBLE:
            return "running", "has ended, its record is not visible here yet"
        return "interrupted", "its job ended, but left no summary here"
    if state == "CANCELLED":
        return "interrupted", "cancelled"
    where = f"{state} on {node}" if node else state
    if state in HELD_BY_THE_SITE:
        return "interrupted" if state == "PREEMPTED" else "failed", where
    last = _last_line(log)
    return "failed", f"{where}: {last}" if last else where


def _last_line(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


# ---- for people


def counted(states: Sequence[State]) -> str:
    """``3 finished, 2 running, 3 pending (Resources)``."""
    counts = Counter(state.name for state in states)
    reasons = Counter(state.why for state in states if state.name == "pending" and state.why not in ("", "None"))
    why = f" ({', '.join(reasons)})" if reasons else ""
    return ", ".join(f"{counts[name]} {name}{why if name == 'pending' else ''}" for name in NAMES if counts[name])


def as_json(states: Sequence[State]) -> dict[str, Any]:
    """For ``--status --json``."""
    cells = [
        {"folder": state.cell.folder, "seed": state.cell.seed, **state.cell.config["labels"], "state": state.name,
         "why": state.why, "task": state.task, "log": str(state.log) if state.log else None}
        for state in states
    ]  # fmt: skip
    return {"cells": cells, "counts": dict(Counter(state.name for state in states))}


def print_status(plan: Plan, json_output: bool) -> None:
    """``--status``: a table of the plan's cells. Errors: SlurmError."""
    states = Board(plan).look(locks=True)
    if json_output:
        print(json.dumps(as_json(states), indent=1))
        return
    rows = [("task", "scheduler", "variant", "seed", "state", "job", "why, log")]
    for state in states:
        cell, failed = state.cell, state.name == "failed" and state.log
        why = " ".join(state.why.split()) + (f"; {state.log}" if failed else "")
        rows.append((cell.task, cell.scheduler, cell.variant, str(cell.seed), state.name, state.task, why))
    for line in aligned(rows):
        print(line)
    root = plan.root
    print(f"\n{len(states)} cells ({counted(states)}) in {root}")
    if not any(state.task for state in states):
        others = "other cells of it were" if submissions.of_study(root) else "nothing of this study was"
        print(f"none of these cells was given to Slurm, {others}; give the same arguments as then, also launch=slurm")


def print_cancel(plan: Plan) -> None:
    """``--cancel``: end the jobs of the plan's cells. Errors: SlurmError."""
    tasks, reports = Board(plan).active_jobs()
    slurm_commands.cancel([*reports, *tasks])
    also = f" and {len(reports)} job that would make the report" if reports else ""
    ended = f"{len(tasks)} task{'s' * (len(tasks) != 1)}{also}"
    print(f"cancelled {ended}; what is recorded stays, the same command without --cancel goes on")


def watch(board: Board, say: Callable[[str], None]) -> list[State]:
    """Say how the cells stand, whenever it changes, until none is in the queue; their states then."""
    before, said, pause = "", 0.0, LOOK[0]
    failed: set[str] = set()
    while True:
        try:
            states = board.look()
        except SlurmError as error:
            say(f"warning: {error}; running jobs are not affected, watching on")
            time.sleep(LOOK[1])
            continue
        for state in states:
            if state.name == "failed" and state.cell.identity not in failed:
                failed.add(state.cell.identity)
                say(f"{state.cell.folder}: failed. {state.why}; log: {state.log}")
        now, active = counted(states), any(state.name in ("running", "pending") for state in states)
        if now != before or time.monotonic() - said >= SAY:
            before, said = now, time.monotonic()
            say(f"{time.strftime('%H:%M:%S')}  {now}")
        if not active:
            return states
        time.sleep(pause)
        pause = min(2 * pause, LOOK[1])
