"""Run a plan: one cell after the other, skipping what is finished, surviving what fails."""

import contextlib
import errno
import json
import os
import shlex
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from backends import gpus
from backends.context import UserError
from backends.curve_store import CurveStore
from backends.local import LocalTrialBackend
from backends.pool import WorkerPool
from backends.simulated import Counts
from backends.slurm_commands import Resources
from backends.workers import Workers
from harness.curves import shown_counts
from harness.experiment import (
    PREPARE_FUNCTION,
    TRIAL_FUNCTION,
    CellFailed,
    Shared,
    run_cell,
    threads_per_process,
    trial_settings,
)
from harness.ownership import CellBusy, Superseded, cell_lock, given_up_by_slurm
from harness.progress import Display
from harness.provenance import provenance
from harness.record import CellPaths, detach
from harness.recorder import Recorder
from harness.sweep import Cell, Plan, gpus_per_trial
from harness.tracking import Guarded

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
EXIT_FAILED, EXIT_ELSEWHERE, EXIT_INTERRUPTED = 1, 3, 130


class _Console(Console):
    """Goes quiet when its reader has gone away (``| head``, a dead ``tee``): the sweep goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@dataclass
class Outcome:
    """Folders of the cells by what became of them."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # with the reason
    busy: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return EXIT_INTERRUPTED
        return EXIT_FAILED if self.failed else EXIT_ELSEWHERE if self.busy else 0


def run_sweep(plan: Plan, *, json_output: bool = False, verbose: bool = False) -> int:
    """Run every unfinished cell of ``plan`` and print the summary; the exit code: 0, 1 a cell failed, 3 another
    command is still running some of them, 130 Ctrl-C.

    ``json_output``: the summary as JSON on stdout, everything else on stderr. ``verbose``: what trials printed is shown
    when their cell ends (it is in the cell's stdout.log and stderr.log anyway).
    """
    console = _Console(file=sys.stderr if json_output else sys.stdout)  # now: a cell redirects sys.stdout
    _check_writable(plan.folder)
    meta = _provenance(sys.argv)
    todo = [cell for cell in plan.cells if not CellPaths.of_cell(cell).finished]
    for note in plan.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if len(todo) < len(plan.cells):
        console.print(f"{len(plan.cells) - len(todo)} of {len(plan.cells)} cells are finished already")
    outcome = _run(todo, len(plan.cells), console, meta, verbose)
    _say_outcome(outcome, console)
    print_results(plan, console, json_output)
    return outcome.exit_code


def run_alone(cell: Cell, command: list[str]) -> Outcome:
    """Run one cell unless it is finished, and print how it goes, but no summary. ``command``: what is recorded as the
    command line. The caller handles signals; one that raises KeyboardInterrupt makes the outcome ``interrupted``."""
    console = _Console()
    meta = _provenance(command)
    todo = [] if CellPaths.of_cell(cell).finished else [cell]
    outcome = _run(todo, 1, console, meta, verbose=False, signals=contextlib.nullcontext())
    _say_outcome(outcome, console)
    return outcome


def _provenance(command: list[str]) -> dict[str, Any]:
    """Errors: UserError for a GPU that the installed torch cannot use."""
    devices = gpus.visible_gpus()
    if devices:
        _check_gpus(devices)
    return provenance(command, [gpu.name for gpu in devices])


def print_results(plan: Plan, console: Console, json_output: bool) -> None:
    """The paired summary of the plan's study on ``console``, or as JSON on stdout; nothing if there is no record."""
    from harness import report  # two seconds of imports, better spent at the end

    root = plan.folder
    try:
        results = report.load_results(root)
    except report.ResultsError:  # it ended before there was a record
        return
    taus = {cell.config["labels"]["setting"]: cell.config["task"].get("tau") for cell in plan.cells}
    if json_output:
        print(json.dumps(report.summary_json(results, taus), indent=1))
    else:
        report.print_summary(results, console, taus)
        command = f"python -m harness.report {shlex.quote(_shown_path(root))}"
        line = f"The report, with the verdict, figures and tables for a paper: {command}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in [
        *dict.fromkeys(results.warnings),
        *(f"cell {cell} is corrupt and left out: {why}" for cell, why in results.corrupt.items()),
    ]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _shown_path(path: Path) -> str:
    """``path`` as one would type it here."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def _run(
    todo: list[Cell],
    total: int,
    console: Console,
    meta: dict[str, Any],
    verbose: bool,
    signals: contextlib.AbstractContextManager[None] | None = None,
) -> Outcome:
    outcome = Outcome()
    machinery = _Machinery(meta)
    with (
        Display(console, total, total - len(todo)) as display,
        signals or _terminate_is_interrupt(),
        contextlib.closing(machinery),
        contextlib.closing(_tracker(todo, display, meta)) as tracker,
    ):
        try:
            for cell in todo:
                _run_one(cell, machinery, tracker, display, meta, outcome)
                if verbose:
                    _show_logs(CellPaths.of_cell(cell), display)
        except KeyboardInterrupt:
            outcome.interrupted = True
    for path, counts in machinery.counts.items():
        console.print(shown_counts(vars(counts), Path(path)), highlight=False, markup=False, soft_wrap=True)
    outcome.busy = [
        cell.folder for cell in todo if cell.folder in outcome.busy and not CellPaths.of_cell(cell).finished
    ]
    return outcome


def _tracker(todo: list[Cell], display: Display, meta: dict[str, Any]) -> Guarded:
    """One for all cells: no cell differs by it."""
    spec = todo[0].config["tracker"] if todo else {"_target_": "harness.tracking.NoTracker"}
    return Guarded(spec, display.message, meta["time"])


def _run_one(
    cell: Cell, machinery: "_Machinery", tracker: Guarded, display: Display, meta: dict[str, Any], outcome: Outcome
) -> None:
    paths = CellPaths.of_cell(cell)

    def on_event(recorder: Recorder, event: dict[str, Any]) -> None:
        display.update(recorder, event)
        tracker.event(event, recorder.progress)

    try:
        lock = cell_lock(paths.lock, given_up_by_slurm, lambda: detach(paths))
        with _disk_errors_are_the_users(paths), lock as ownership:
            if paths.finished:  # another command finished it since the plan was made
                outcome.finished.append(cell.folder)
                return display.finish_cell(cell, "finished by another command")
            shared = machinery.for_cell(cell, display)
            display.start_cell(cell, resumed=paths.events.exists())
            tracker.start(cell, paths.root)
            try:
                summary = run_cell(cell, paths, shared, meta, on_event, display.message, ownership)
            except BaseException as error:
                left = isinstance(error, KeyboardInterrupt | Superseded | CellBusy)
                tracker.finish("interrupted" if left else "failed", None)
                raise
            tracker.finish("finished", summary)
        outcome.finished.append(cell.folder)
        best, failures = summary["best_validation_score"], summary["model_failures"]
        fits = f", {failures} model fits failed" if failures else ""
        display.finish_cell(cell, f"best {'-' if best is None else f'{best:.4f}'} in {summary['trials']} trials{fits}")
    except CellBusy as busy:
        outcome.busy.append(cell.folder)
        display.message(f"{cell.folder}: left alone, {busy}")
    except Superseded as newer:
        outcome.busy.append(cell.folder)
        display.message(f"{cell.folder}: {newer}")
    except CellFailed as failure:
        outcome.failed[cell.folder] = str(failure)
        display.message(f"{cell.folder}: failed. {failure}")
    except UserError:
        raise
    except Exception as error:
        outcome.failed[cell.folder] = f"{type(error).__name__}: {error}"
        display.message(f"{cell.folder}: failed.\n{traceback.format_exc()}")


def _show_logs(paths: CellPaths, display: Display) -> None:
    for file in (paths.stdout, paths.stderr):
        if file.exists() and (text := file.read_text(errors="replace").rstrip()):
            display.message(f"{file}:\n{text}")


class _Machinery:
    """What cells share: the warm workers and the curve store, kept as long as the cells ask for the same ones."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self._pool: Workers | None = None
        self._pool_key: tuple[Any, ...] = ()
        self._prepared: set[str] = set()  # tasks and variants that workers were told of
        self._stores: dict[str, CurveStore] = {}
        self.counts: dict[str, Counts] = {}  # by store
        self._origin = {key: meta[key] for key in ("cpu", "gpus", "host", "platform", "python", "packages")}

    def for_cell(self, cell: Cell, display: Display) -> Shared:
        kind = cell.config["backend"]["name"]
        if kind == "local":
            self._check_local(cell)
        elif kind in ("pool", "slurm"):
            self._workers(cell, display)
        shared = Shared(pool=lambda: self._workers(cell, display))
        if kind == "simulated":
            path = cell.config["backend"]["store"]
            if path not in self._stores:
                limit = int(cell.config["backend"]["max_gib"] * 2**30)
                self._stores[path] = CurveStore(path, limit, self._origin)
            shared.store, shared.counts = self._stores[path], self.counts.setdefault(path, Counts())
        return shared

    def close(self) -> None:
        self._close_pool()
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _workers(self, cell: Cell, display: Display) -> Workers:
        """The warm workers, prepared for the cell's task and variant; started if there are none that fit."""
        backend, settings = cell.config["backend"], trial_settings(cell)
        count, each = cell.config["n_workers"], gpus_per_trial(cell.config)
        if backend["name"] == "simulated":
            count = backend["processes"] or gpus.default_n_workers(each)
        common = {"threads": threads_per_process(cell, count), "stop_grace": backend["stop_grace"]}
        key = (count, each, json.dumps(backend if backend["name"] == "slurm" else common, sort_keys=True))
        if self._pool is None or key != self._pool_key:
            self._close_pool()
            display.message(f"starting {count} worker{'s' if count > 1 else ''} ...")
            if backend["name"] == "slurm":
                self._pool = _slurm_workers(cell, display.message, **common)
            else:
                self._pool = WorkerPool(count, gpus_each=each, **common)
            self._pool_key = key
        wanted = _task_and_variant(settings)
        if wanted not in self._prepared:
            self._pool.prepare(PREPARE_FUNCTION, settings)
            self._prepared.add(wanted)
        return self._pool

    def _check_local(self, cell: Cell) -> None:
        """Find the user's mistakes before the first trial does."""
        settings = trial_settings(cell)
        if _task_and_variant(settings) not in self._prepared:
            each = gpus_per_trial(cell.config)
            threads = threads_per_process(cell, cell.config["n_workers"])
            with contextlib.closing(LocalTrialBackend(TRIAL_FUNCTION, threads=threads, gpus_per_trial=each)) as trials:
                trials.prepare(PREPARE_FUNCTION, settings)
        self._prepared.add(_task_and_variant(settings))

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool, self._prepared = None, set()


def _slurm_workers(cell: Cell, warn: Callable[[str], None], **common: Any) -> Workers:
    from backends.slurm import SlurmWorkers

    backend = cell.config["backend"]
    chosen = {name: backend[name] for name in ("host", "port", "signal", "signal_seconds")}
    folder = CellPaths.of_cell(cell).root.parent / ".workers"
    return SlurmWorkers(cell.config["n_workers"], Resources.of(backend), folder=folder, warn=warn, **chosen, **common)


def _task_and_variant(settings: dict[str, Any]) -> str:
    return json.dumps([settings["task"], settings["ohgw"]])


def _check_writable(root: Path) -> None:
    """Fail before anything runs if results cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".writable"
        probe.write_text("x" * 4096)
        probe.unlink(missing_ok=True)  # another command may be looking as well
    except OSError as error:
        raise UserError(
            f"cannot write results to {root}: {error.strerror}; choose another results_dir or name"
        ) from None


def _check_gpus(devices: list[gpus.Gpu]) -> None:
    import torch

    gpus.check_supported(devices, torch.cuda.get_arch_list())


@contextlib.contextmanager
def _disk_errors_are_the_users(paths: CellPaths) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"the curve store cannot be used: {error} (a full disk, a damaged file, another process that holds it?); "
            "nothing that was recorded is lost, mend it or name another backend.store and run the same command again"
        ) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"cannot write the record of {paths.folder}: {error.strerror} ({error.filename or paths.root}); "
            "nothing that was recorded is lost, make room and run the same command again"
        ) from error


@contextlib.contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end a sweep as Ctrl-C does: workers stopped, records closed."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_outcome(outcome: Outcome, console: Console) -> None:
    if outcome.busy:
        console.print(f"{len(outcome.busy)} cells are still being run by another command")
    if outcome.failed:
        console.print(f"{len(outcome.failed)} cells failed: {', '.join(outcome.failed)}")
    if outcome.interrupted:
        console.print("interrupted; what is done is recorded, the same command goes on from here")
