"""launch=slurm: every cell becomes a task of a Slurm job array, on a node of its own, in a copy of the code.

    python -m harness scheduler=asha,pasha ohgw=off,on seed=0..49 launch=slurm

submits what is neither finished nor in the queue, waits and prints the summary; ``launch.watch=false`` only submits.
``harness/slurm/submissions.py`` is what it leaves on disk, ``harness/slurm/status.py`` looks how the cells stand, and
``harness/slurm/array_task.py`` runs in the jobs.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends import slurm_commands
from backends.context import UserError
from backends.slurm_commands import Resources, SlurmError
from harness.ownership import CellBusy, cell_lock
from harness.slurm import submissions
from harness.slurm.status import Board, as_json, counted, watch
from harness.slurm.submissions import REPORT, Submission
from harness.sweep import Cell, Plan

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
_TOO_MANY = ("SubmitJob", "job submit limit", "Invalid job array specification")  # what a smaller array may cure

Say = Callable[[str], None]


def run(plan: Plan, *, json_output: bool = False) -> int:
    """Submit what has to be done, watch it and print the summary. The exit code: 0, 1 a cell failed, 130 no longer
    watched (Ctrl-C), or cells that were interrupted or are not submitted.

    ``json_output``: the summary (without watching, the state of the cells) as JSON on stdout, the rest on stderr.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr if json_output else sys.stdout, flush=True)

    for note in plan.notes:
        say(note)
    submit(plan, say)
    board = Board(plan)
    if not plan.cells[0].config["launch"]["watch"]:
        say(f"how they stand: {command(plan, '--status')}")
        if json_output:
            print(json.dumps(as_json(board.look()), indent=1))
        return 0
    try:
        states = watch(board, say)
    except KeyboardInterrupt:
        say(f"\nno longer watched, the jobs go on; how they stand: {command(plan, '--status')}")
        say(f"to end them: {command(plan, '--cancel')}")
        return EXIT_INTERRUPTED
    _print_results(plan, json_output)
    failed = [state for state in states if state.name == "failed"]
    if unfinished := [state for state in states if state.name != "finished"]:
        say(f"{counted(states)}; the same command submits the {len(unfinished)} that are not finished")
    return EXIT_FAILED if failed else EXIT_INTERRUPTED if unfinished else 0


def command(plan: Plan, option: str = "") -> str:
    """The command line that asked for the plan, for the user to type again."""
    return shlex.join(["python", "-m", "harness", *plan.argv, *([option] if option else [])])


def _print_results(plan: Plan, json_output: bool) -> None:
    from rich.console import Console

    from harness.runner import print_results  # seconds of imports, not needed to submit

    print_results(plan, Console(file=sys.stderr if json_output else sys.stdout), json_output)


# ---- submitting


def submit(plan: Plan, say: Say) -> Submission | None:
    """Submit the cells that are neither finished nor in the queue; None if there are none. Tells what it did.

    Errors: UserError, with nothing submitted. Where Slurm takes only a part, it says so.
    """
    root = plan.root
    try:
        with cell_lock(root / ".slurm" / "submit.lock"):
            return _submit(plan, say)
    except CellBusy:
        raise UserError(f"another command is submitting cells of {root}; try again when it is done") from None
    except OSError as error:
        raise UserError(
            f"cannot write results to {root}: {error.strerror or error}; choose another results_dir or name"
        ) from None


def _submit(plan: Plan, say: Say) -> Submission | None:
    launch = _completed(_launch(plan))
    resources(launch).options()  # to find mistakes before anything is written
    board = Board(plan)
    states = board.look(locks=True)
    todo = [state.cell for state in states if state.name not in ("finished", "running", "pending")]
    if len(todo) < len(states):
        say(f"{len(states) - len(todo)} of {len(states)} cells are left alone: {counted(states)}")
    if not todo:
        return None
    todo.sort(key=_is_driver)  # cells that ask for the same side by side
    size = slurm_commands.largest_array()
    submission = submissions.create(plan, todo, launch, kill_wait())
    before = board.active_arrays() if launch["array_limit"] else []
    progress = _Progress(submission, launch, size, submission.cells, before)
    try:
        progress.submit_all()
    except SlurmError as error:
        if not progress.jobs and progress.refused:
            shutil.rmtree(submission.folder, ignore_errors=True)
            raise UserError(f"nothing was submitted: {error}") from None
        if not progress.jobs:
            raise UserError(f"{error}; what was submitted all the same: {command(plan, '--status')}") from None
        say(
            f"{progress.done} of {len(todo)} cells were submitted, Slurm refused the rest: {error}. The same command "
            "submits them later"
        )
    except KeyboardInterrupt:
        say(f"interrupted: {progress.done} of {len(todo)} cells were submitted; {command(plan, '--status')} shows them")
        raise
    ids = ", ".join(progress.jobs)
    at_a_time = f", {launch['array_limit']} at a time" if launch["array_limit"] else ""
    say(f"submitted {_cells(progress.done)} as job {ids}{at_a_time}; logs: {submission.logs}")
    if launch["report"]:
        _submit_report(submission, launch, progress.jobs, say)
    return submission


def _launch(plan: Plan) -> dict[str, Any]:
    """Errors: UserError if it is not the same for all cells."""
    launch = plan.cells[0].config["launch"]
    if any(cell.config["launch"] != launch for cell in plan.cells):
        raise UserError("the lists of this experiment differ in launch.*; use several commands for them")
    return launch


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"


def kill_wait() -> float:
    """Seconds that Slurm leaves a process between SIGTERM and SIGKILL."""
    found = slurm_commands.setting("KillWait")
    return float(found) if found and found.isdigit() else 30.0


def _completed(launch: Mapping[str, Any]) -> dict[str, Any]:
    """Inside of a job, what is not set is as that job has it. Its quality of service may belong to its partition."""
    here = {key: os.environ.get(f"SLURM_JOB_{key.upper()}") for key in ("partition", "account", "qos")}
    if launch["partition"]:
        here["qos"] = None
    return {**launch, **{key: launch[key] or value for key, value in here.items()}}


@dataclass
class _Progress:
    """Cells on their way into the queue: arrays of at most ``size`` cells. With a limit on how many run at a time each
    array waits for the one before it, and the first for those in the queue (``before``): limits are an array's own."""

    submission: Submission
    launch: Mapping[str, Any]
    size: int
    cells: Sequence[Cell]
    before: Sequence[str]
    jobs: list[str] = field(default_factory=list)
    done: int = 0
    refused: bool = False  # Slurm was asked after an error, and does not have the job

    def submit_all(self) -> None:
        """Errors: SlurmError if Slurm refuses a cell."""
        while self.done < len(self.cells):
            count = self._next()
            try:
                job = self._submit(count)
            except SlurmError as error:
                if count == 1 or not any(words in str(error) for words in _TOO_MANY):
                    raise
                self.size = count // 2
                continue
            self.jobs.append(job)
            with contextlib.suppress(OSError):  # it carries its submission as its comment as well
                self.submission.note_job(job, self.done, count)
            self.done += count

    def _next(self) -> int:
        """How many cells the next array has: they ask for the same."""
        part = self.cells[self.done : self.done + self.size]
        kind = _is_driver(part[0])
        return next((k for k, cell in enumerate(part) if _is_driver(cell) != kind), len(part))

    def _submit(self, count: int) -> str:
        after = (self.jobs[-1:] or self.before) if self.launch["array_limit"] else ()
        options = array_options(self.submission, self.launch, self.done, count, after)
        options += resources(self.launch, driver=_is_driver(self.cells[self.done])).options()
        try:
            return _sbatch(self.submission, options, self.done)
        except SlurmError as error:
            return self._arrived(error)

    def _arrived(self, error: SlurmError) -> str:
        """The id of a job that Slurm took although its answer did not come. Errors: SlurmError."""
        with contextlib.suppress(SlurmError):
            for job in slurm_commands.jobs().values():
                if job.comment == self.submission.comment(self.done):
                    return job.id.partition("_")[0]
            self.refused = True
        raise error


def _sbatch(submission: Submission, options: Sequence[str], first: int | str) -> str:
    arguments = ("--plan", str(submission.folder), submission.content["interpreter"], str(first))
    return slurm_commands.submit(options, submission.script, *arguments)


def _is_driver(cell: Cell) -> bool:
    """Whether the cell trains on jobs of its own, so that its task needs no GPU."""
    return bool(cell.config["backend"]["name"] == "slurm")


def array_options(
    submission: Submission, launch: Mapping[str, Any], first: int, count: int, after: Sequence[str] = ()
) -> list[str]:
    """Options of sbatch for the cells ``first`` to ``first + count - 1``, without their resources. ``after``: jobs that
    have to end before."""
    limit = f"%{launch['array_limit']}" if launch["array_limit"] else ""
    return [
        *_job_options(submission, first, "%A_%a", after),
        f"--array=0-{count - 1}{limit}",
        "--requeue" if launch["requeue"] else "--no-requeue",
        f"--signal=B:{launch['signal']}@{launch['signal_seconds']}",
    ]


def _job_options(submission: Submission, first: int | str, log: str, after: Sequence[str]) -> list[str]:
    logs = str(submission.logs).replace("%", "%%")
    return [
        f"--job-name=ohgw-{submission.results.name}",
        f"--comment={submission.comment(first)}",
        f"--output={logs}/{log}.log",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks=1",
        *([f"--dependency=afterany:{':'.join(after)}"] if after else []),
    ]


def resources(launch: Mapping[str, Any], *, driver: bool = False) -> Resources:
    """What a cell's job asks for; a ``driver`` trains nothing itself."""
    return Resources.of(launch, **({"gres": None, "exclusive": False} if driver else {}))


def _submit_report(submission: Submission, launch: Mapping[str, Any], jobs: Sequence[str], say: Say) -> None:
    """A job that makes the report when all others have ended, however they did."""
    asked = Resources(**{key: launch[key] for key in ("partition", "account", "qos", "time")}, cpus=1)
    try:
        options = _job_options(submission, REPORT, "report-%j", jobs) + asked.options()
        job = _sbatch(submission, options, REPORT)
        with contextlib.suppress(OSError):
            submission.note_job(job, REPORT, 0)
        say(f"job {job} makes the report when they have ended: {submission.results / 'report' / 'index.html'}")
    except SlurmError as error:
        by_hand = shlex.join(["python", "-m", "harness.report", str(submission.results)])
        say(f"no job will make the report ({error}); when the cells have ended: {by_hand}")
