"""What all backends that run a trial function share: paths, attempts, numbered reports, retries, restoring."""

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_omp = os.environ.get("OMP_NUM_THREADS")
from syne_tune.backend.local_backend import LocalBackend  # noqa: E402
from syne_tune.backend.trial_backend import TrialBackend  # noqa: E402
from syne_tune.backend.trial_status import Status, Trial, TrialResult  # noqa: E402

if _omp is None:  # importing anything of syne_tune.backend sets it to 1, for this process and all it starts
    os.environ.pop("OMP_NUM_THREADS", None)

from backends.attempt import NUMBER, TIMESTAMP, AttemptSpec  # noqa: E402
from backends.context import (  # noqa: E402
    RestoredTrial,
    UserError,
    attempt_files,
    attempt_name,
    checkpoint_files,
    copy_checkpoint,
    trial_seed,
)

__all__ = ["FunctionBackend", "LocalBackend", "Status"]  # LocalBackend from here, without its side effect

WAIT = 0.2  # seconds fetch_status_results blocks at most, so that the Tuner sees its stopping criterion
_OF_ATTEMPT = re.compile(r"\d{4,}-\d{4,}")  # how the files of an attempt begin (attempt_name)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class FunctionBackend(TrialBackend):
    """A Syne Tune backend for a trial function. Subclasses run attempts: ``_schedule``, ``_collect``, ``_halt``.

    Every report of a trial is delivered once and in order of its number, whatever attempts repeat. A trial whose
    process died goes on from its checkpoint up to ``max_retries`` times. ``path`` (default: where the Tuner says) holds
    ``trials/<trial_id>/`` with files that begin with the name of an attempt: checkpoints (.pt) and logs (.out, .err).
    """

    def __init__(
        self,
        function: str,
        *,
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        path: str | Path | None = None,
        run: int = 1,
        max_retries: int = 2,
        delete_checkpoints: bool = False,
        **inherited: Any,
    ):
        """``run`` counts the drivers that have worked on ``path``; it orders their attempts.

        Errors: UserError if ``function`` is not a dotted name that another process could import.
        """
        self.set_entrypoint(function)
        self.settings, self.seed, self.run, self.max_retries = settings or {}, seed, run, max_retries
        self.on_event: Callable[[dict[str, Any]], None] = _ignore
        self.path: Path | None = Path(path) if path is not None else None
        self._path_is_given = path is not None
        self._attempts: dict[int, int] = defaultdict(int)
        self._begun: dict[int, int] = {}  # the run in which a trial began: files of earlier ones are not its own
        self._retries: dict[int, int] = defaultdict(int)
        self._reasons: dict[int, str] = {}
        self._details: dict[int, dict[str, Any]] = {}
        self._fresh: list[tuple[int, dict[str, Any]]] = []
        super().__init__(delete_checkpoints=delete_checkpoints, **inherited)

    # ---- for subclasses

    def _collect(self, wait: float) -> None:
        """Take in what running trials have to say; block up to ``wait`` seconds until one does."""
        raise NotImplementedError

    def _halt(self, trial_id: int) -> None:
        """Ask the running or waiting attempt of the trial, if there is one, to end; ignore it from now on."""
        raise NotImplementedError

    def _wait_for_halted(self) -> None:
        """Return when no halted attempt is left that could still write a file."""
        raise NotImplementedError

    def _next_attempt(self, trial_id: int, config: dict[str, Any]) -> AttemptSpec:
        self._attempts[trial_id] += 1
        return AttemptSpec(
            function=self.function,
            config=config,
            settings=self.settings,
            seed=trial_seed(self.seed, trial_id),
            trial_id=trial_id,
            attempt=attempt_name(self.run, self._attempts[trial_id]),
            folder=str(self.trial_path(trial_id).absolute()),
            received=self._received(trial_id),
            oldest=self._oldest(trial_id),
        )

    def _on_report(self, trial_id: int, report: dict[str, Any]) -> None:
        if report[NUMBER] >= self._received(trial_id):
            self._trial_dict[trial_id].metrics.append(report)
            self._fresh.append((trial_id, report))

    def _on_returned(self, trial_id: int) -> None:
        trial = self._trial_dict[trial_id]
        if trial.metrics:
            self._end(trial_id, Status.completed)
        else:
            self._on_failed(trial_id, f"{self.function} returned without a single report")

    def _on_failed(self, trial_id: int, reason: str, details: dict[str, Any] | None = None) -> None:
        self._reasons[trial_id], self._details[trial_id] = reason, details or {}
        self._end(trial_id, Status.failed)

    def _on_lost(self, trial_id: int, attempt: str, reason: str, counts: bool = True) -> None:
        """The process died under the trial: start another attempt, unless it has happened too often. ``counts``: the
        trial may have been the reason (it was not where the site took the worker away)."""
        self._reasons[trial_id] = reason
        self._retries[trial_id] += counts
        if self._retries[trial_id] > self.max_retries:
            self._on_failed(trial_id, f"{reason}; given up after {self.max_retries} retries")
            return
        self.on_event({"e": "retry", "trial": trial_id, "attempt": attempt, "reason": reason})
        self._schedule(trial_id, self._trial_dict[trial_id].config)

    def _end(self, trial_id: int, status: str) -> None:
        trial = self._trial_dict[trial_id]
        trial.status = status
        trial.training_end_time = datetime.now()

    def _received(self, trial_id: int) -> int:
        """Number of the next report the scheduler has to get."""
        trial = self._trial_dict.get(trial_id)
        return trial.metrics[-1][NUMBER] + 1 if trial is not None and trial.metrics else 0

    def _oldest(self, trial_id: int) -> str:
        """Name of the first attempt whose files are the trial's."""
        return attempt_name(self._begun.get(trial_id, 0), 0)

    # ---- Syne Tune's interface

    def start_trial(self, config: dict[str, Any], checkpoint_trial_id: int | None = None) -> TrialResult:
        """As in Syne Tune; files that earlier runs left under the new trial's number are deleted first."""
        trial_id = self.new_trial_id()
        self._delete_files(trial_id)
        self._begun[trial_id] = self.run
        return super().start_trial(config, checkpoint_trial_id)

    def fetch_status_results(self, trial_ids: list[int]) -> tuple[dict[int, tuple[Trial, str]], list[tuple[int, dict]]]:
        """As in Syne Tune, at a cost that depends on what is new only; blocks until there is something, <= 0.2 s."""
        self._collect(WAIT if trial_ids and not self._has_news(trial_ids) else 0.0)
        wanted = set(trial_ids)
        results = [item for item in self._fresh if item[0] in wanted]
        self._fresh = [item for item in self._fresh if item[0] not in wanted]
        for trial_id, _ in results:
            self._last_metric_seen_index[trial_id] += 1
        statuses = {trial_id: (self._trial_dict[trial_id], self._trial_dict[trial_id].status) for trial_id in trial_ids}
        return statuses, _by_time(results)

    def _has_news(self, trial_ids: list[int]) -> bool:
        return bool(self._fresh) or any(self._trial_dict[k].status != Status.in_progress for k in trial_ids)

    def _all_trial_results(self, trial_ids: list[int]) -> list[TrialResult]:
        self._collect(0.0)
        return [self._trial_dict[trial_id] for trial_id in trial_ids]

    def pause_trial(self, trial_id: int, result: dict | None = None) -> None:
        """Reports after ``result`` that were fetched with it are given back: the scheduler gets them after a resume."""
        self._forget_reports_after(trial_id, result)
        super().pause_trial(trial_id, result)

    def _pause_trial(self, trial_id: int, result: dict | None) -> None:
        self._halt(trial_id)

    def _resume_trial(self, trial_id: int) -> None:
        self._retries[trial_id] = 0

    def _stop_trial(self, trial_id: int, result: dict | None) -> None:
        self._halt(trial_id)
        self._forget_reports_after(trial_id, result)
        self._end(trial_id, Status.stopped)

    def _forget_reports_after(self, trial_id: int, result: dict | None) -> None:
        metrics = self._trial_dict[trial_id].metrics
        if result is not None and NUMBER in result:
            while metrics and metrics[-1][NUMBER] > result[NUMBER]:
                metrics.pop()
        else:  # forget what was not fetched
            del metrics[self._last_metric_seen_index[trial_id] :]
        self._last_metric_seen_index[trial_id] = len(metrics)
        self._fresh = [item for item in self._fresh if item[0] != trial_id]

    def interrupt(self, seconds: float) -> None:
        """Let running trials checkpoint before the process ends, for ``seconds`` at most, where a backend can do so."""

    def stop_all(self) -> None:
        """Stop what runs and wait until it has stopped; checkpoints stay, unless ``delete_checkpoints``."""
        for trial_id, trial in self._trial_dict.items():
            if trial.status == Status.in_progress:
                self.stop_trial(trial_id)
        self._wait_for_halted()
        if self.delete_checkpoints:
            for trial_id in self.trial_ids:
                self.delete_checkpoint(trial_id)

    def copy_checkpoint(self, src_trial_id: int, tgt_trial_id: int) -> None:
        """The target starts from the source's newest checkpoint; its reports count from 0."""
        copy_checkpoint(self.trial_path(src_trial_id), self.trial_path(tgt_trial_id), attempt_name(self.run, 0))

    def delete_checkpoint(self, trial_id: int) -> None:
        for file in checkpoint_files(self.trial_path(trial_id)):
            file.unlink(missing_ok=True)

    def _delete_files(self, trial_id: int) -> None:
        """Delete what runs up to this one left of the trial; nothing if a later run has it: then this one is a ghost's
        and the trial not its own."""
        folder, later = self.trial_path(trial_id), attempt_name(self.run + 1, 0)
        files = [file for file in folder.glob("*") if _OF_ATTEMPT.match(file.name)]
        if any(file.name >= later for file in files):
            return
        for file in files:
            file.unlink(missing_ok=True)

    def stdout(self, trial_id: int) -> list[str]:
        return self._printed(trial_id, "out")

    def stderr(self, trial_id: int) -> list[str]:
        return self._printed(trial_id, "err")

    def _printed(self, trial_id: int, ending: str) -> list[str]:
        files = attempt_files(self.trial_path(trial_id), ending, self._oldest(trial_id))
        return [line for file in files for line in file.read_text(errors="replace").splitlines(keepends=True)]

    def trial_path(self, trial_id: int) -> Path:
        """The folder of one trial."""
        if self.path is None:  # used without a Tuner
            self.path = Path(tempfile.mkdtemp(prefix="trials-"))
        return self.path / "trials" / str(trial_id)

    def set_path(self, results_root: str | None = None, tuner_name: str | None = None) -> None:
        """Called by the Tuner; an explicit ``path`` wins."""
        if not self._path_is_given and results_root is not None:
            self.path = Path(results_root)

    def entrypoint_path(self) -> Path:
        """The file of the trial function, as far as this process can tell; the Tuner takes its name from it."""
        module = self.function.rpartition(".")[0]
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            spec = None
        return Path(spec.origin if spec and spec.origin else module.rpartition(".")[2] + ".py")

    def set_entrypoint(self, entry_point: str) -> None:
        """Replace the trial function."""
        module, _, name = entry_point.rpartition(".")
        if module == "__main__" or not name.isidentifier() or not all(p.isidentifier() for p in module.split(".")):
            raise UserError(
                f"trial function {entry_point!r} must be a dotted name such as 'my_module.train', "
                "of a module that another process can import (not __main__)"
            )
        self.function = entry_point

    # ---- ours

    def failure(self, trial_id: int) -> str:
        """Why the trial failed or was last retried: a reason or a traceback; empty if nothing happened to it."""
        return self._reasons.get(trial_id, "")

    def failure_details(self, trial_id: int) -> dict[str, Any]:
        """What the exception that failed the trial carried in its ``details``; empty if nothing."""
        return self._details.get(trial_id, {})

    def restore(self, trials: Iterable[RestoredTrial]) -> None:
        """Take over the trials of an earlier run, so that the Tuner may resume the paused ones.

        Errors: ValueError if ids are not 0, 1, 2, ... or this backend has trials already.
        """
        ordered = sorted(trials, key=lambda trial: trial.trial_id)
        if self.trial_ids or [trial.trial_id for trial in ordered] != list(range(len(ordered))):
            raise ValueError("restore() needs a fresh backend and trials numbered 0, 1, 2, ...")
        for trial in ordered:
            metrics = [{NUMBER: number, **report} for number, report in enumerate(trial.metrics)]
            status = getattr(Status, trial.status.lower())
            self.trial_ids.append(trial.trial_id)
            self._begun[trial.trial_id] = trial.run
            self._trial_dict[trial.trial_id] = TrialResult(
                trial.trial_id, trial.config, datetime.now(), metrics=metrics, status=status
            )
            self._last_metric_seen_index[trial.trial_id] = len(metrics)


def _ignore(event: dict[str, Any]) -> None:
    pass


def _by_time(results: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Sorted by worker time; reports of one trial keep their order even if the clock was set back between them."""
    latest: dict[int, float] = {}
    keys = []
    for trial_id, report in results:
        latest[trial_id] = max(latest.get(trial_id, report[TIMESTAMP]), report[TIMESTAMP])
        keys.append(latest[trial_id])
    return [results[i] for i in sorted(range(len(results)), key=keys.__getitem__)]


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that limit numerical libraries to ``threads`` threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def threads_per_worker(n_workers: int) -> int:
    """A fair share of the CPUs this process may use (affinity and cgroup quota), at least 1."""
    return max(1, available_cpus() // n_workers)


def available_cpus() -> int:
    """CPUs by affinity, or by the container's quota (cgroup v2) if that is less."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or quota "max"
        return cpus
