"""One cell: build the scheduler, the backend and Syne Tune's ``Tuner``, run, record; continue it where it stopped.

A cell that was interrupted is continued by replaying its events into a fresh scheduler (``harness/recorder.py``);
trials that were running go on from their checkpoints. A cell whose record cannot be continued is set aside and starts
again, and so does one in virtual time: its trials are in the curve store, and its events come out the same.
"""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syne_tune import Tuner
from syne_tune.tuner_callback import TunerCallback
from syne_tune.tuner_logger import TunerLogger

from backends.context import RestoredTrial, attempt_files, attempt_name
from backends.curve_store import CurveStore
from backends.function_backend import FunctionBackend, threads_per_worker
from backends.local import LocalTrialBackend
from backends.pool import PoolBackend
from backends.simulated import Counts, SimulatedBackend, VirtualClock
from backends.workers import Workers
from harness import record
from harness.curves import curve_identity
from harness.instantiate import instantiate
from harness.leaving import Leaving
from harness.ohgw import OHGW
from harness.ownership import SOLE, Ownership, Superseded
from harness.record import CellPaths, EventLog
from harness.recorder import Budget, CellClock, Recorder, ReplayError
from harness.slurm.accounting import allocation, cgroup_usage
from harness.space import Space
from harness.sweep import Cell, gpus_per_trial

TRIAL_FUNCTION = "harness.trial.run"
PREPARE_FUNCTION = "harness.trial.prepare"
METRIC = "validation_score"
RESOURCE = "epoch"
MAX_RESOURCE = "epochs"  # the configuration key that tells a trial its next milestone
BARREN_LIMIT = 20  # failures in a row without one report: the trial function itself is broken


class CellFailed(Exception):
    """The cell cannot go on: every trial fails. The message holds the last reason."""


class _Silent(TunerLogger):
    """Syne Tune's own screen output is replaced by the harness's progress display."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("print_"):
            return lambda *args, **kwargs: None
        return super().__getattribute__(name)


class _CheckpointsFirst(TunerCallback):
    """However a Tuner ends it stops all trials, at once. Where it ends because Slurm wants the process to go, they
    checkpoint before that."""

    def __init__(self, backend: FunctionBackend):
        self.backend = backend

    def on_tuning_end(self) -> None:
        error = sys.exc_info()[1]  # called in a ``finally``
        if isinstance(error, Leaving):
            self.backend.interrupt(error.grace)


@dataclass
class Shared:
    """What the cells of a sweep have in common. ``pool``: the warm workers, started by the first call; ``store`` and
    ``counts``: of ``backend=simulated``."""

    pool: Callable[[], Workers]
    store: CurveStore | None = None
    counts: Counts = field(default_factory=Counts)


def run_cell(
    cell: Cell,
    paths: CellPaths,
    shared: Shared,
    meta: dict[str, Any],
    on_event: Callable[[Recorder, dict[str, Any]], None] = lambda recorder, event: None,
    warn: Callable[[str], None] = lambda message: None,
    ownership: Ownership = SOLE,
) -> dict[str, Any]:
    """Run ``cell`` to its end and return its summary. ``ownership``: from the cell's lock, which the caller holds.

    Raises CellFailed, KeyboardInterrupt with everything done so far on disk, or Superseded.
    """
    try:
        return _run(cell, paths, shared, meta, on_event, warn, ownership)
    except Exception as error:  # a ghost may stumble over anything: its files are gone
        if not ownership.owned():
            raise Superseded from error
        raise


def _run(
    cell: Cell,
    paths: CellPaths,
    shared: Shared,
    meta: dict[str, Any],
    on_event: Callable[[Recorder, dict[str, Any]], None],
    warn: Callable[[str], None],
    ownership: Ownership,
) -> dict[str, Any]:
    try:
        with ownership.guarded():
            events = _earlier_events(paths, cell, meta, warn)
        return _attempt(cell, paths, shared, meta, events, on_event, ownership)
    except ReplayError as error:
        with ownership.guarded():
            aside = record.set_aside(paths)
            warn(f"{paths.folder}: its record cannot be continued ({error}); set aside as {aside.name}, starting again")
            _create(paths, cell, meta)
        return _attempt(cell, paths, shared, meta, [], on_event, ownership)


def _attempt(
    cell: Cell,
    paths: CellPaths,
    shared: Shared,
    meta: dict[str, Any],
    events: list[dict[str, Any]],
    on_event: Callable[[Recorder, dict[str, Any]], None],
    ownership: Ownership,
) -> dict[str, Any]:
    run = 1 + sum(event["e"] == "open" for event in events)
    # one in virtual time has one run, however often it begins again
    files_of = ownership.number if cell.config["backend"]["name"] == "simulated" else run
    backend = _backend(cell, paths, shared, files_of)
    virtual = backend.clock if isinstance(backend, SimulatedBackend) else None
    with ownership.guarded():
        _take_models(paths, files_of)
        log, trials = EventLog(paths.events), _TrialsLog(paths, events)
        models = _BestModel(_models_of(paths, files_of))
        decisions = _DecisionLog(paths, virtual if cell.config["backend"].get("charge_decisions") else None)

    def recorded(event: dict[str, Any]) -> None:
        trials.event(event)
        if cell.config["save_model"] == "best" and event["e"] == "report":
            models.reported(event["trial"], event["result"]["epoch"], recorder.progress.incumbent)
        on_event(recorder, event)

    recorder = Recorder(
        _scheduler(cell.config),
        log,
        Budget(**cell.config["budget"]),
        virtual or CellClock(events[-1]["t"] if events else 0.0),
        lambda trial_id: {"reason": backend.failure(trial_id), **backend.failure_details(trial_id)},
        on_event=recorded,
        on_decision=decisions.add,
        gpus=gpus_per_trial(cell.config),
    )
    backend.on_event = recorder.note
    try:
        recorder.replay(events)
        begun = _runs_of_trials(events)
        backend.restore(
            [
                RestoredTrial(k, trial.config, trial.results, _paused_if_running(trial.status), begun[k])
                for k, trial in sorted(recorder.progress.trials.items())
            ]
        )
        with ownership.guarded():  # the next attempt reads how many there were: each has a number of its own
            recorder.note({"e": "open", "run": run} if virtual else _opening(run, meta))
        if isinstance(backend, PoolBackend):
            backend.announce_workers()
        why = _tune(cell, paths, backend, recorder, ownership)
        recorder.note(_closing(why, virtual is not None))
    except BaseException as error:
        if not isinstance(error, ReplayError | Superseded):
            why = "failed" if isinstance(error, CellFailed) else "interrupted"
            with contextlib.suppress(OSError):
                recorder.note(_closing(why, virtual is not None))
        raise
    finally:
        log.close()
        trials.close()
        decisions.close()
        backend.close()
    with ownership.guarded():
        return _finish(cell, paths, why, files_of)


def _closing(why: str, virtual: bool) -> dict[str, Any]:
    """The close event; in a Slurm job at a site with cgroups, with what the kernel counted for the job."""
    usage = None if virtual else cgroup_usage()
    return {"e": "close", "why": why} | ({} if usage is None else {"cgroup": usage})


def _opening(run: int, meta: dict[str, Any]) -> dict[str, Any]:
    """The open event. ``time``: when the command began, ``opened``: now (unix seconds); ``slurm``: the job this is."""
    opened = {"e": "open", "run": run, "time": meta["time"], "opened": time.time(), "commit": meta["commit"]}
    slurm = allocation()
    return opened if slurm is None else opened | {"slurm": slurm}


def _tune(cell: Cell, paths: CellPaths, backend: Any, recorder: Recorder, ownership: Ownership) -> str:
    """Run the Tuner until a budget is used up or the scheduler has nothing left; returns which."""
    with _output_to(paths, ownership):
        tuner = Tuner(
            trial_backend=backend,
            scheduler=recorder,
            stop_criterion=lambda status: bool(recorder.exhausted() or recorder.progress.barren >= BARREN_LIMIT),
            n_workers=cell.config["n_workers"],
            sleep_time=0.0,  # both backends block in fetch_status_results
            max_failures=10**9,  # a failed trial never ends a cell; BARREN_LIMIT does
            tuner_name=paths.folder,
            suffix_tuner_name=False,
            save_tuner=False,  # our own append-only record replaces the dill dump and the CSV
            callbacks=[_CheckpointsFirst(backend)],
            trial_backend_path=str(paths.root),
            print_update_interval=1e9,
            output_logger=_Silent(),
        )
        tuner.tuner_path = paths.root / "syne-tune"
        tuner.last_seen_result_per_trial = {k: t.results[-1] for k, t in recorder.progress.trials.items() if t.results}
        tuner.run()
    if recorder.progress.barren >= BARREN_LIMIT:
        last = max(k for k, t in recorder.progress.trials.items() if t.status == "Failed")
        raise CellFailed(
            f"{BARREN_LIMIT} trials in a row failed without one report; the last one: {backend.failure(last)}"
        )
    return recorder.exhausted() or recorder.progress.exhausted or "scheduler"


def _scheduler(config: dict[str, Any]) -> OHGW:
    task = config["task"]
    space = Space.from_spec(task["spaces"][task["space"]])
    scheduler = instantiate(
        config["scheduler"],
        config_space={**space.config_space(), MAX_RESOURCE: task["max_epochs"]},
        metric=METRIC,
        mode=task["mode"],
        resource_attr=RESOURCE,
        max_resource_attr=MAX_RESOURCE,
        max_t=task["max_epochs"],
        seed=config["seed"],
    )
    return OHGW(scheduler)


def trial_settings(cell: Cell, models: Path | None = None) -> dict[str, Any]:
    """What the trial function needs besides the configuration (``ctx.settings``). ``models``: where to save some."""
    keep = cell.config["save_model"]
    return {
        "task": cell.config["task"],
        "ohgw": cell.config["ohgw"],
        "max_resource_attr": MAX_RESOURCE,
        "save_model": keep,
        "model_dir": str(models) if models and keep != "none" else None,
    }


def _backend(
    cell: Cell, paths: CellPaths, shared: Shared, run: int
) -> PoolBackend | LocalTrialBackend | SimulatedBackend:
    options = cell.config["backend"]
    common: dict[str, Any] = {
        "settings": trial_settings(cell, _models_of(paths, run)),
        "seed": cell.seed,
        "path": str(paths.root),
        "run": run,
        "max_retries": options["max_retries"],
    }
    if options["name"] in ("pool", "slurm"):
        return PoolBackend(TRIAL_FUNCTION, pool=shared.pool(), **common)
    if options["name"] == "simulated":
        assert shared.store is not None
        every_epoch = {**common["settings"], "checkpoint_seconds": 0.0}  # any epoch may be the last one asked for
        return SimulatedBackend(
            TRIAL_FUNCTION, store=shared.store, pool=shared.pool, identity=curve_identity(cell),
            max_resource_attr=MAX_RESOURCE, counts=shared.counts, **{**common, "settings": every_epoch},
        )  # fmt: skip
    threads, gpus = threads_per_process(cell, cell.config["n_workers"]), gpus_per_trial(cell.config)
    return LocalTrialBackend(
        TRIAL_FUNCTION, threads=threads, stop_grace=options["stop_grace"], gpus_per_trial=gpus, **common
    )


def threads_per_process(cell: Cell, n_workers: int) -> int:
    """CPU threads of a process that trains: its worker's, shared by the ``gpus_per_trial`` processes of a trial."""
    backend = cell.config["backend"]
    share = (backend["cpus"] or 1) if backend["name"] == "slurm" else threads_per_worker(n_workers)
    return max(1, (backend["threads"] or share) // gpus_per_trial(cell.config))


def _paused_if_running(status: str) -> str:
    """A trial that ran when the driver died is handed back to the Tuner as one to resume."""
    return "Paused" if status == "InProgress" else status


# ---- disk


class _TrialsLog:
    """Appends a line to trials.jsonl at a trial's first report or failure; catches up on what a crash left out."""

    def __init__(self, paths: CellPaths, events: list[dict[str, Any]]):
        known, _ = record.read_trials(paths.trials)
        self._log = EventLog(paths.trials)
        self._known = set(known)
        self._starts: dict[int, dict[str, Any]] = {}
        for event in events:
            self.event(event)

    def event(self, event: dict[str, Any]) -> None:
        if event["e"] == "start":
            self._starts[event["trial"]] = event
        elif event["e"] in ("report", "error") and event["trial"] not in self._known:
            for row in record.trial_rows([self._starts[event["trial"]], event]):
                self._log.append(row)
            self._known.add(event["trial"])

    def close(self) -> None:
        self._log.close()


class _BestModel:
    """With ``save_model=best``, deletes saved models as others beat them. Trials delete none: they train on while the
    driver decides, and do not know which of their epochs will be in the record."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._kept: tuple[int, int] | None = None

    def reported(self, trial: int, epoch: int, incumbent: tuple[int, int] | None) -> None:
        """The driver got to know of this epoch; ``incumbent``: trial and epoch of the best one now."""
        for loser in {(trial, epoch), self._kept or (trial, epoch)} - {incumbent}:
            _model_file(self._folder, loser).unlink(missing_ok=True)
        self._kept = incumbent


class _DecisionLog:
    """Writes decisions.jsonl, and moves the virtual clock by what decisions take if there is one to ``charge``."""

    def __init__(self, paths: CellPaths, charge: VirtualClock | None):
        self._log, self._charge, self._reports = EventLog(paths.decisions), charge, 0.0

    def add(self, kind: str, seconds: float) -> None:
        if self._charge is not None:
            self._charge.advance_to(self._charge.now + seconds)
        if kind == "report":
            self._reports += seconds
            return
        self._log.append({"suggest": seconds, "reports": self._reports})
        self._reports = 0.0

    def close(self) -> None:
        self._log.close()


def _earlier_events(
    paths: CellPaths, cell: Cell, meta: dict[str, Any], warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The events of earlier attempts; an unusable record is set aside with a warning, and the cell starts afresh."""
    if not paths.events.exists():
        if paths.summary.exists():  # somebody deleted the events
            warn(f"{paths.folder}: has no events, set aside as {record.set_aside(paths).name}, starting again")
        _create(paths, cell, meta)
        return []
    if not (paths.config.exists() and paths.meta.exists()):
        _create(paths, cell, meta)
    events, problems = record.read_events(paths.events)
    for problem in problems:
        warn(str(problem))
    failed = bool(events) and events[-1]["e"] == "close" and events[-1]["why"] == "failed"
    if failed or any(problem.fatal for problem in problems):
        aside = record.set_aside(paths)
        warn(f"{paths.folder}: set aside as {aside.name}, starting again")
        _create(paths, cell, meta)
        return []
    if cell.config["backend"]["name"] == "simulated":  # what was trained is in the store: nothing is lost
        paths.events.unlink()
        shutil.rmtree(paths.root, ignore_errors=True)  # a ghost's workers may write in there
        _create(paths, cell, meta)
        return []
    commits = [event["commit"] for event in events if event["e"] == "open"]
    if commits and commits[-1] != meta["commit"]:
        warn(f"{paths.folder}: begun with commit {commits[-1]}, goes on with {meta['commit']}")
    return events


def _create(paths: CellPaths, cell: Cell, meta: dict[str, Any]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    record.write_config(paths, cell.config)
    record.write_json(paths.meta, meta)


def _finish(cell: Cell, paths: CellPaths, why: str, run: int) -> dict[str, Any]:
    events, _ = record.read_events(paths.events)
    summary = record.summarize(cell.config, events) | {"stop_reason": why}
    summary["decision_seconds"] = record.decision_seconds(paths.decisions)
    _collect_models(paths, run)
    if cell.config["save_model"] == "best":
        _keep_best_model(paths, summary)
    _collect_logs(paths, _runs_of_trials(events))
    shutil.rmtree(paths.checkpoints, ignore_errors=True)  # pause checkpoints are of no use once the cell has ended
    shutil.rmtree(paths.root / "syne-tune", ignore_errors=True)
    record.write_json(paths.summary, summary)
    return summary


def _runs_of_trials(events: list[dict[str, Any]]) -> dict[int, int]:
    """The run in which each trial began."""
    run, begun = 0, {}
    for event in events:
        run += event["e"] == "open"
        if event["e"] == "start":
            begun[event["trial"]] = run
    return begun


def _collect_logs(paths: CellPaths, begun: dict[int, int]) -> None:
    """What trials printed goes from their folders to the cell's stdout.log and stderr.log."""
    for target, ending in ((paths.stdout, "out"), (paths.stderr, "err")):
        with open(target, "a") as log:
            for trial, run in sorted(begun.items()):
                files = attempt_files(paths.checkpoints / str(trial), ending, attempt_name(run, 0))
                if files:
                    log.write(f"--- trial {trial}\n" + "".join(file.read_text(errors="replace") for file in files))


def _models_of(paths: CellPaths, run: int) -> Path:
    """Where the trials of a run save models until the cell ends: a ghost of another run cannot touch them there."""
    return paths.models / f"run-{run:04d}"


def _take_models(paths: CellPaths, run: int) -> None:
    """The models of the run before go on as this one's."""
    if earlier := sorted(paths.models.glob("run-*")):
        earlier[-1].rename(_models_of(paths, run))


def _collect_models(paths: CellPaths, run: int) -> None:
    for file in _models_of(paths, run).glob("*.pt"):
        file.replace(paths.models / file.name)
    for folder in paths.models.glob("run-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _keep_best_model(paths: CellPaths, summary: dict[str, Any]) -> None:
    best = summary["incumbent"]
    kept = best and _model_file(paths.models, (best["trial"], best["epoch"]))
    for file in paths.models.glob("*.pt"):
        if file != kept:
            file.unlink()


def _model_file(folder: Path, trial_and_epoch: tuple[int, int]) -> Path:
    """As ``harness.trial.save_model`` names it."""
    trial, epoch = trial_and_epoch
    return folder / f"{trial}-{epoch}.pt"


@contextlib.contextmanager
def _output_to(paths: CellPaths, ownership: Ownership) -> Iterator[None]:
    """What Syne Tune prints and logs goes to the cell's stdout.log and stderr.log."""
    logger = logging.getLogger("syne_tune")
    with contextlib.ExitStack() as files:
        with ownership.guarded():
            handler = logging.FileHandler(paths.stderr)
            files.callback(handler.close)
            out = files.enter_context(open(paths.stdout, "a"))
        logger.addHandler(handler)
        propagate, logger.propagate = logger.propagate, False
        try:
            with contextlib.redirect_stdout(out):
                yield
        finally:
            logger.propagate = propagate
            logger.removeHandler(handler)
