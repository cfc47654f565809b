"""Slurm's account of each cell beside our own clocks': ``python -m harness.slurm.accounting results/NAME``.

The events of a cell name the Slurm jobs that worked for it: the one its driver ran in (``slurm`` in an open event) and
those of its workers. What Slurm charges for one run of a job is its elapsed time times its GPUs, used or not. Of that
time a cell has three parts, in seconds:

    inside    while an attempt at the cell ran in the job, from its open event to its last one
    lost      after the last event of an attempt that was ended without a word, and all of a run without any attempt
    outside   the rest: the job's start before, its end after, and what a worker's job waited between cells; of a run
              that served several cells each has an equal share

Inside, the GPUs were busy for the seconds that our clocks say, test evaluation being counted apart, and idle otherwise.
So busy + test + idle + outside + lost GPU-seconds are Slurm's, and explain the difference between both accounts.
It goes into ``slurm.json`` in the cell's folder once all its jobs have ended, or else what is missing, and why.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backends import slurm_commands
from backends.context import UserError
from backends.slurm_commands import Incarnation, SlurmError
from harness.ownership import own_slurm
from harness.record import CellPaths, RecordError, read_config, read_events, write_json

WAIT_SECONDS = 15.0  # for sacct's rows, which are complete some seconds after a job's end
POLL_SECONDS = 1.0
PARTS = ("busy", "test", "idle", "outside", "lost")
EXIT_WRONG = 2


def allocation() -> dict[str, Any] | None:
    """The Slurm job this process runs in, for an open event: job, restart, cluster, node, gpus; None outside of one."""
    slurm = own_slurm()
    if slurm is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = len([word for word in visible.split(",") if word.strip() not in ("", "-1", "NoDevFiles")])
    else:
        gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    return {**slurm, "node": os.environ.get("SLURMD_NODENAME"), "gpus": gpus}


def cgroup_usage(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> dict[str, Any] | None:
    """What the kernel counted for the whole Slurm job this process runs in, so far: memory_peak (bytes), cpu_seconds;
    None where the site does not put jobs into cgroups. ``cgroups``, ``own``: where the kernel shows them (v2 or v1)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    found: dict[str, Any] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        job = re.search(r"^.*/job_\d+(?=/|$)", path)
        if job is None:
            continue
        for controller in controllers.split(",") if controllers else [""]:
            folder = cgroups / controller / job[0].lstrip("/")
            for name, file, scale in _COUNTERS:
                if (value := _counter(folder / file)) is not None:
                    found[name] = value * scale
    return found or None


_COUNTERS = (
    ("memory_peak", "memory.peak", 1),  # v2, Linux 5.19
    ("memory_peak", "memory.max_usage_in_bytes", 1),  # v1
    ("cpu_seconds", "cpu.stat", 1e-6),  # v2: usage_usec
    ("cpu_seconds", "cpuacct.usage", 1e-9),  # v1
)


def _counter(file: Path) -> int | None:
    """The first number in a file of the kernel."""
    try:
        number = re.search(r"\d+", file.read_text())
    except OSError:
        return None
    return int(number[0]) if number else None


# ---- what a record says


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell in real time: from its open event (unix seconds) to its last event. ``closed``: that says
    how it ended. ``restarts``: which run of its driver's job it was; ``jobs``: all that worked for it."""

    begin: float
    end: float
    closed: bool
    jobs: frozenset[str]
    restarts: Mapping[str, int] = field(default_factory=dict)

    def overlap(self, run: Incarnation, number: int) -> float | None:
        """Seconds of ``run``, number ``number`` of its job, in which the attempt ran; None if it did not run in it."""
        job = run.id
        if job not in self.jobs or self.restarts.get(job, number) != number or run.begin is None or run.end is None:
            return None
        shared = min(self.end, run.end) - max(self.begin, run.begin)
        return max(0.0, shared) if job in self.restarts or shared > 0 else None


@dataclass(frozen=True)
class Use:
    """What a cell's record says of its time in Slurm. ``busy``: seconds by kind, times a trial's GPUs; ``wallclock``:
    seconds, both of the attempts in Slurm only; ``opens``: all attempts there were; ``gpus``: the most that a driver
    saw; ``cgroup``: the most that the kernel counted for a driver's job (``cgroup_usage``)."""

    paths: CellPaths
    attempts: Sequence[Attempt]
    busy: Mapping[str, float]
    wallclock: float
    opens: int
    gpus: int
    cgroup: Mapping[str, float] = field(default_factory=dict)

    @property
    def jobs(self) -> list[str]:
        return sorted({job for attempt in self.attempts for job in attempt.jobs})

    def restarts(self, job: str) -> int:
        """How often the job was started again, as far as this cell knows."""
        return max((attempt.restarts.get(job, 0) for attempt in self.attempts), default=0)


def use_of_slurm(paths: CellPaths, events: Iterable[Mapping[str, Any]], gpus_per_trial: int = 1) -> Use | None:
    """None if the events name no Slurm job."""
    parts: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["e"] == "open":
            parts.append([])
        if parts:
            parts[-1].append(event)
    found = [(attempt, part) for part in parts if (attempt := _attempt(part)) is not None]
    if not found:
        return None
    busy: dict[str, float] = defaultdict(float)
    for _, part in found:
        for event in part:
            for kind, seconds in (event.get("result", event).get("busy") or {}).items():
                busy[kind] += seconds * gpus_per_trial
    attempts = [attempt for attempt, _ in found]
    wallclock = sum(attempt.end - attempt.begin for attempt in attempts)
    gpus = max((part[0].get("slurm") or {}).get("gpus", 0) for _, part in found)
    cgroup: dict[str, float] = {}
    for _, part in found:
        for name, amount in (part[-1].get("cgroup") or {}).items():
            cgroup[name] = max(amount, cgroup.get(name, 0))
    return Use(paths, attempts, dict(busy), wallclock, len(parts), gpus, cgroup)


def _attempt(events: Sequence[Mapping[str, Any]]) -> Attempt | None:
    opened, last = events[0], events[-1]
    driver = opened.get("slurm")
    jobs = {event["job"] for event in events if event["e"] == "worker"} | ({driver["job"]} if driver else set())
    if not jobs or "opened" not in opened:
        return None
    end = opened["opened"] + last["t"] - opened["t"]
    restarts = {driver["job"]: driver["restart"]} if driver else {}
    return Attempt(opened["opened"], end, last["e"] == "close", frozenset(jobs), restarts)


# ---- what Slurm says


@dataclass(frozen=True)
class Share:
    """A cell's part of one run of a job: seconds of it, by what they were (see above)."""

    inside: float = 0.0
    outside: float = 0.0
    lost: float = 0.0


def divide(run: Incarnation, number: int, cells: Mapping[str, Sequence[Attempt]]) -> dict[str, Share]:
    """Divide run ``number`` (from 0) of a job among the ``cells`` whose attempts name the job: all of its seconds."""
    inside: dict[str, float] = defaultdict(float)
    present: list[tuple[float, bool, str]] = []
    for cell, attempts in cells.items():
        for attempt in attempts:
            if (seconds := attempt.overlap(run, number)) is not None:
                inside[cell] += seconds
                present.append((attempt.end, attempt.closed, cell))
    if not present:
        return {cell: Share(lost=run.elapsed / len(cells)) for cell in cells}
    if (together := sum(inside.values())) > run.elapsed:  # it was suspended, or cells ran side by side
        inside = {cell: seconds * run.elapsed / together for cell, seconds in inside.items()}
    rest = max(0.0, run.elapsed - together)
    end, closed, last = max(present)
    lost = 0.0 if closed or run.end is None else min(rest, max(0.0, run.end - end))
    each = (rest - lost) / len(inside)
    return {cell: Share(seconds, each, lost if cell == last else 0.0) for cell, seconds in inside.items()}


Runs = Mapping[str, Sequence[Incarnation]]  # of each job, oldest first


def account_of(use: Use, runs: Runs, shares: Mapping[tuple[str, int], Mapping[str, Share]]) -> dict[str, Any]:
    """The content of slurm.json. ``shares``: of each run, by job and number, those of its cells."""
    rows: list[dict[str, Any]] = []
    seconds = dict.fromkeys(PARTS, 0.0)
    for job in use.jobs:
        for number, run in enumerate(runs[job]):
            shared = shares[job, number]
            if (share := shared.get(use.paths.folder)) is None:
                continue
            rows.append({**asdict(run), **asdict(share), "cells": len(shared)})
            for part, amount in (("idle", share.inside), ("outside", share.outside), ("lost", share.lost)):
                seconds[part] += run.gpus * amount
    seconds["test"] = use.busy.get("test", 0.0)
    seconds["busy"] = sum(use.busy.values()) - seconds["test"]
    total = seconds["idle"] + seconds["outside"] + seconds["lost"]
    seconds["idle"] -= seconds["busy"] + seconds["test"]
    return {**_ours(use), "gpu_hours": total / 3600, "gpu_seconds": seconds, "runs": rows}


def _ours(use: Use) -> dict[str, Any]:
    charged = sum(use.busy.values()) - use.busy.get("test", 0.0)
    return {
        "jobs": use.jobs,
        "attempts": use.opens,
        "wallclock": use.wallclock,
        "busy_hours": sum(use.busy.values()) / 3600,
        "busy_hours_without_test": charged / 3600,
        **({"cgroup": dict(use.cgroup)} if use.cgroup else {}),
    }


def account(root: str | Path, wait_seconds: float = WAIT_SECONDS) -> dict[str, dict[str, Any]]:
    """Account for the cells of ``results/NAME`` that name Slurm jobs; what is known of each by its folder: slurm.json's
    content, or ``{"missing": why}`` and our side of it.

    Asks Slurm only for what is not there yet, and waits up to ``wait_seconds`` for rows that sacct does not have yet.
    Errors: OSError if a slurm.json cannot be written.
    """
    uses = _uses(Path(root))
    known = {use.paths.folder: found for use in uses if (found := _final(use)) is not None}
    wanted = [use for use in uses if use.paths.folder not in known]
    if not wanted:
        return known
    jobs = {job for use in wanted for job in use.jobs}
    active: set[str] = set()
    runs: Runs = {}
    failure = None
    try:
        active = {job for job, now in slurm_commands.jobs().items() if now.active}
        runs = _complete_runs(wanted, jobs - active, wait_seconds)
    except SlurmError as error:
        failure = str(error)
    shares = _shares(uses, runs)
    for use in wanted:
        why = failure or _why_not(use, runs, active)
        known[use.paths.folder] = account_of(use, runs, shares) if why is None else _missing(use, why)
        if not active & set(use.jobs):
            write_json(use.paths.slurm, known[use.paths.folder])
    return known


def read_account(paths: CellPaths) -> dict[str, Any] | None:
    """The cell's slurm.json; None if there is none that can be read."""
    try:
        content = json.loads(paths.slurm.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def account_in_record(use: Use) -> dict[str, Any]:
    """What the cell's folder has, without asking Slurm: slurm.json's content, or ``{"missing": why}``."""
    return _final(use) or read_account(use.paths) or _missing(use, "sacct was not asked yet")


def _final(use: Use) -> dict[str, Any] | None:
    """slurm.json, if it is complete and of the whole record."""
    found = read_account(use.paths)
    if found is None or "missing" in found or (found.get("attempts"), found.get("jobs")) != (use.opens, use.jobs):
        return None
    return found


def _missing(use: Use, why: str) -> dict[str, Any]:
    return {"missing": why, **_ours(use)}


def _uses(root: Path) -> list[Use]:
    found = []
    for events in sorted(root.glob("*/events.jsonl")):
        content = events.read_bytes()
        if b'"slurm": {' in content or b'"e": "worker"' in content:  # else it need not be parsed
            paths = CellPaths.of(events.parent)
            if (use := use_of_slurm(paths, read_events(events)[0], _gpus_per_trial(paths))) is not None:
                found.append(use)
    return found


def _gpus_per_trial(paths: CellPaths) -> int:
    with contextlib.suppress(RecordError):  # only the cell's own GPU-hours need it
        return read_config(paths)["task"].get("gpus_per_trial", 1)
    return 1


def _complete_runs(uses: Sequence[Use], jobs: set[str], wait_seconds: float) -> dict[str, list[Incarnation]]:
    """The runs of each job, as many as the records know of and all with their end if that can be had in time."""
    deadline = time.monotonic() + wait_seconds
    while True:
        runs: dict[str, list[Incarnation]] = {job: [] for job in jobs}
        for run in slurm_commands.accounting(sorted(jobs)) if jobs else []:
            if run.id in runs:
                runs[run.id].append(run)
        lacking = [job for use in uses for job in use.jobs if job in jobs and not _complete(use, job, runs)]
        if not lacking or time.monotonic() > deadline:
            return runs
        time.sleep(POLL_SECONDS)


def _complete(use: Use, job: str, runs: Runs) -> bool:
    rows = runs.get(job, [])
    return len(rows) > use.restarts(job) and all(run.end is not None for run in rows)


def _why_not(use: Use, runs: Runs, active: set[str]) -> str | None:
    """What is missing to account for a cell, in words that fit many cells; None if nothing is."""
    if active & set(use.jobs):
        return "not all of its jobs have ended"
    if not all(runs[job] for job in use.jobs):
        return "sacct shows nothing of one of its jobs"
    if not all(_complete(use, job, runs) for job in use.jobs):
        return "sacct does not show all runs of its jobs, or not how they ended"
    if use.gpus and not any(run.gpus for job in use.jobs for run in runs[job]):
        return "sacct shows no GPUs: AccountingStorageTRES of this site lacks gres/gpu"
    return None


def _shares(uses: Sequence[Use], runs: Runs) -> dict[tuple[str, int], dict[str, Share]]:
    shares = {}
    for job, rows in runs.items():
        cells = {use.paths.folder: use.attempts for use in uses if job in use.jobs}
        for number, run in enumerate(rows):
            shares[job, number] = divide(run, number, cells)
    return shares


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Account for a results folder, print a line a cell, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.slurm.accounting",
        description="Write slurm.json (Slurm's GPU-hours beside ours) for the cells that ran in Slurm jobs which have "
        "ended, and print them. To be run where sacct is.",
    )
    parser.add_argument("results", type=Path, help="results/NAME")
    options = parser.parse_args(arguments)
    try:
        if not options.results.is_dir():
            raise UserError(f"{options.results} is no folder of results; expected results/NAME")
        found = account(options.results, WAIT_SECONDS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_WRONG
    for line in _lines(found) or [f"no cell of {options.results} names a Slurm job"]:
        print(line)
    return 0


def _lines(accounts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [("cell", "ours (h)", "Slurm (h)", *(f"{part} (%)" for part in PARTS))]
    missing = []
    for cell, found in accounts.items():
        if "missing" in found:
            ours, jobs = f"{found['busy_hours']:.4f} h by our clocks", ", ".join(found["jobs"])
            missing.append(f"{cell}: {ours}, none by Slurm's: {found['missing']} (jobs {jobs})")
            continue
        total = found["gpu_hours"] * 3600
        parts = (f"{100 * found['gpu_seconds'][part] / total:.1f}" if total else "-" for part in PARTS)
        rows.append((cell, f"{found['busy_hours']:.4f}", f"{found['gpu_hours']:.4f}", *parts))
    if len(rows) == 1:
        return missing
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return [
        "  ".join([f"{row[0]:<{first}}", *(f"{word:>{width}}" for word, width in zip(row[1:], others, strict=True))])
        for row in rows
    ] + missing


if __name__ == "__main__":
    sys.exit(main())
