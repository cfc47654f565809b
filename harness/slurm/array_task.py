"""Inside of a task of a job array: ``python -m harness.slurm.array_task SUBMISSION FIRST`` runs one of its cells.

The cell is number FIRST + SLURM_ARRAY_TASK_ID of the plan. Shortly before the time limit Slurm sends launch.signal: the
trials checkpoint, the record is closed, and the job goes back into the queue. On SIGTERM it does the same, faster; but
a job that is not running any more by then was cancelled, and stays away, or preempted, and was queued again by Slurm.
(A preempted job that ends within the site's GraceTime counts as ended: Slurm would not queue it again.)

Exit codes: 0 the cell is finished, 1 it failed, 2 it cannot run here, 3 another command runs it, 130 interrupted.
"""

import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from backends import slurm_commands
from backends.context import UserError
from backends.slurm_commands import SlurmError
from harness.leaving import Notice, leaving_on
from harness.ownership import own_slurm
from harness.record import write_json
from harness.slurm.snapshot import check_environment
from harness.slurm.submissions import Submission

EXIT_CODES = {"finished": 0, "failed": 1, "elsewhere": 3, "interrupted": 130}
EXIT_WRONG = 2
CLOSING = 15.0  # seconds at most that closing records and asking Slurm to queue the job again may take


@dataclass
class ArrayTask:
    """One run of a task; ``name``: such as ``12_3``; ``restart``: how often it was queued again before."""

    submission: Submission
    number: int
    name: str
    restart: int

    @classmethod
    def of_this_job(cls, folder: str, first: str) -> "ArrayTask":
        """Errors: UserError outside of a job array."""
        job, task = own_slurm(), os.environ.get("SLURM_ARRAY_TASK_ID")
        if job is None or task is None:
            raise UserError("this runs in a task of a job array; submit one with: python -m harness ... launch=slurm")
        return cls(Submission(Path(folder)), int(first) + int(task), job["job"], job["restart"])

    @property
    def graces(self) -> dict[signal.Signals, float]:
        """Seconds that workers have to checkpoint, by signal."""
        launch, kill_wait = self.submission.content["launch"], self.submission.content["kill_wait"]
        return {
            signal.Signals[f"SIG{launch['signal']}"]: _grace(launch["signal_seconds"]),
            signal.SIGTERM: _grace(kill_wait),
        }

    def say(self, state: str, reason: str = "") -> None:
        """Write down how the cell stands, unless a later run of this task has done so."""
        last = self.submission.status(self.number)
        if last and last["task"] == self.name and last["restart"] > self.restart:
            return
        words = {"state": state, "reason": reason, "task": self.name, "restart": self.restart}
        try:
            path = self.submission.status_file(self.number)
            write_json(path, {**words, "node": socket.gethostname(), "time": time.time()})
        except OSError as error:
            print(f"warning: cannot write {error.filename}: {error.strerror}", file=sys.stderr)

    def run(self) -> tuple[str, str]:
        """Run the cell; its state then and why. Errors: UserError, KeyboardInterrupt."""
        content = self.submission.content
        check_environment(content["environment"])
        _find_modules_beside(content["folder"])
        from harness.runner import run_alone  # seconds of imports

        cell = self.submission.cells[self.number]
        program = self.submission.code / "harness" / "__main__.py"
        outcome = run_alone(cell, [str(program), *content["argv"]])
        if outcome.interrupted:
            return "interrupted", ""
        if outcome.failed:
            return "failed", next(iter(outcome.failed.values()))
        return ("elsewhere", "another command runs this cell") if outcome.busy else ("finished", "")

    def leave(self, notice: Notice) -> None:
        """Queue the job again if it may and Slurm has not already decided what becomes of it."""
        if notice.arrived is None or not self.submission.content["launch"]["requeue"]:
            return
        try:
            job = slurm_commands.jobs().get(self.name)
            if job is not None and job.state == "RUNNING":
                slurm_commands.requeue(self.name)
                print("queued again", flush=True)
        except SlurmError as error:
            print(f"cannot be queued again ({error}): the command that submitted it submits it again", flush=True)


def main(folder: str, first: str) -> int:
    """Run the cell of this job and return the exit code."""
    try:
        task = ArrayTask.of_this_job(folder, first)
        graces = task.graces
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG
    with leaving_on(graces) as notice:
        return _run(task, notice)


def _run(task: ArrayTask, notice: Notice) -> int:
    code = None
    try:
        task.say("running")
        state, reason = task.run()
    except UserError as error:
        state, reason, code = "failed", " ".join(str(error).split()), EXIT_WRONG
        print(f"error: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        state, reason = "interrupted", ""
    except Exception as error:
        state, reason = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if state == "interrupted":
        reason = "the time limit was near"
        if notice.arrived == signal.SIGTERM:
            reason = "SIGTERM: cancelled or preempted"
    task.say(state, reason)
    if state == "interrupted":
        task.leave(notice)
    return EXIT_CODES[state] if code is None else code


def _grace(seconds: float) -> float:
    return max(seconds - CLOSING, seconds / 2)


def _find_modules_beside(folder: str) -> None:
    """Modules that lay where the command was given are found here as there, after everything else."""
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
