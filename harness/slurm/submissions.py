"""What is on disk of cells that were given to Slurm: one folder a submission, which is added to but never changed.

    results/<name>/.slurm/<submission>/plan.json            the cells with their resolved configs, versions, settings
                                       code/                the project as it was, with its commit and diff
                                       setup.sh             launch.setup, if there is any
                                       jobs.jsonl           one line a job: id, what it is, its first cell, how many
                                       logs/                what jobs printed: <job>_<task>.log
                                       status/<cell>.json   how a task stands, in its own words

A job carries ``ohgw:<submission>:<first cell>`` as its comment, by which Slurm's jobs are known as ours: an id alone
may have been given to another one since.
"""

import functools
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from backends.context import UserError
from harness.record import EventLog, write_json
from harness.slurm.snapshot import copy_code, environment
from harness.sweep import Cell, Plan

REPORT = "report"  # in the place of a first cell: the job that makes the report


@dataclass(frozen=True)
class Submission:
    """One of them; ``folder`` is absolute."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def script(self) -> Path:
        return self.code / "slurm" / "sweep.sbatch"

    @property
    def setup(self) -> Path:
        return self.folder / "setup.sh"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def results(self) -> Path:
        """The folder of the study, ``results/<name>``."""
        return self.folder.parent.parent

    def log(self, task: str) -> Path:
        """Of a task ``12_3``."""
        return self.logs / f"{task}.log"

    def status_file(self, cell: int) -> Path:
        return self.folder / "status" / f"{cell}.json"

    def comment(self, first: int | str) -> str:
        """Of the job whose first cell this is, or of the one that makes the report."""
        return f"ohgw:{self.name}:{first}"

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """What plan.json says. Errors: UserError if it is damaged."""
        try:
            return orjson.loads(self.plan.read_bytes())  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.plan} cannot be read: {error}; delete {self.folder} if it is of no use") from None

    @functools.cached_property
    def cells(self) -> list[Cell]:
        return [Cell(config) for config in self.content["cells"]]

    def status(self, cell: int) -> dict[str, Any] | None:
        """What the task of a cell said last: state, reason, task, restart, node, time; None before its first word."""
        try:
            said = json.loads(self.status_file(cell).read_bytes())
        except (OSError, ValueError):
            return None
        return said if isinstance(said, dict) else None

    def note_job(self, job: str, first: int | str, count: int) -> None:
        """Remember a job. Raises OSError."""
        with EventLog(self.jobs) as log:
            log.append({"job": job, "first": first, "cells": count, "time": time.time()})

    def noted_jobs(self) -> list[dict[str, Any]]:
        """The jobs so far; a torn last line is left out."""
        jobs = []
        for line in self.jobs.read_bytes().splitlines() if self.jobs.exists() else []:
            try:
                jobs.append(json.loads(line))
            except ValueError:
                continue
        return jobs


def of_comment(comment: str) -> tuple[str, str] | None:
    """The submission's name and the first cell (or ``report``) that a job's comment names, None if it is not ours."""
    found = re.fullmatch(r"ohgw:([\w-]+):(\d+|report)", comment)
    return (found[1], found[2]) if found else None


def of_study(root: Path) -> list[Submission]:
    """Those of the study at ``root``, oldest first; ones that were never written whole are left out."""
    return [Submission(plan.parent) for plan in sorted((root / ".slurm").glob("*/plan.json"))]


def create(plan: Plan, cells: Sequence[Cell], launch: Mapping[str, Any], kill_wait: float) -> Submission:
    """Write a new submission of ``cells``, a part of the plan. ``kill_wait``: seconds between SIGTERM and SIGKILL.

    Errors: UserError if it cannot be written; then nothing is left of it.
    """
    root = plan.root
    if ":" in str(root):
        raise UserError(f"results_dir={root.parent}: a path with a colon cannot be on PYTHONPATH; choose another one")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    submission = Submission(root / ".slurm" / f"{stamp}-{secrets.token_hex(2)}")
    try:
        _write(submission, plan, cells, launch, kill_wait)
    except OSError as error:
        shutil.rmtree(submission.folder, ignore_errors=True)
        raise UserError(
            f"cannot write the submission to {submission.folder}: {error.strerror or error}; make room, or choose "
            "another results_dir"
        ) from None
    return submission


def _write(
    submission: Submission, plan: Plan, cells: Sequence[Cell], launch: Mapping[str, Any], kill_wait: float
) -> None:
    copy_code(submission.code)
    for folder in (submission.logs, submission.status_file(0).parent):
        folder.mkdir()
    if launch["setup"]:
        submission.setup.write_text("\n".join(launch["setup"]) + "\n")
    results_dir = str(submission.results.parent)
    content = {
        "time": time.time(),
        "argv": plan.argv,
        "folder": os.getcwd(),
        "commit": json.loads((submission.code / "commit.json").read_bytes())["commit"],
        "interpreter": sys.executable,
        "environment": environment(),
        "launch": dict(launch),
        "kill_wait": kill_wait,
        "cells": [{**cell.config, "results_dir": results_dir} for cell in cells],
    }
    write_json(submission.plan, content)
