"""Experiments in virtual time: W virtual workers over trials that are really trained, each once.

``SimulatedBackend`` answers Syne Tune's Tuner as a live backend with W workers would, but on a virtual clock that jumps
from one report to the next. What a trial reports, and how long each report took, comes from a curve store
(``backends/curve_store.py``); what the store lacks is trained on a pool of real workers, at that moment, and added. So
order, decisions and times depend on the stored durations only: not on how many real workers there are, how busy this
machine is, or how long the scheduler thinks (unless that is charged).

The rules of virtual time:
- A started or resumed trial begins at once. Its next report comes after the seconds that this report took when it was
  measured: all busy seconds that the report itself names, by kind, or else the time between two reports.
- A report's start-up counts only for the first report after a start or resume (after a resume, that of the trial's
  first report), its checkpoint only where the trial is told to pause (its milestone, under ``max_resource_attr``).
- Reports due at the same time are handled one after another by trial id; free workers are filled afterwards.
- A trial told to stop or pause frees its worker at once; real training may have run ahead, and what it added stays in
  the store.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from backends.attempt import NUMBER, SECONDS, TIMESTAMP
from backends.context import attempt_name, checkpoint_files, reports_before, trial_seed
from backends.curve_store import Curve, CurveStore, Row
from backends.function_backend import WAIT, FunctionBackend, Status
from backends.workers import Job, Workers

KEEP_SECONDS = 10.0  # of training are lost, besides the running epoch, when this process is killed


class VirtualClock:
    """Seconds since the experiment began; only moves forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, seconds: float) -> None:
        self.now = max(self.now, seconds)


@dataclass
class Counts:
    """What virtual experiments asked of a store, and what had to be trained for it.

    ``trainings``: trials of which at least one report was needed; ``epochs``: reports that were delivered;
    ``trainings_run``: trials of these that needed real training; ``epochs_run``: reports that real workers made, those
    ahead of need included."""

    trainings: int = 0
    epochs: int = 0
    trainings_run: int = 0
    epochs_run: int = 0


@dataclass
class _Running:
    """A trial on a virtual worker."""

    curve: Curve
    milestone: int  # the trial function returns after this report
    started: float
    received: int  # reports delivered so far, in all attempts
    begins: bool = True  # no report yet in this attempt
    last: float = 0.0  # when the latest report (or the start) was
    due: float | None = None  # when the next one comes; None: not looked up yet

    @property
    def next_row(self) -> Row | None:
        return self.curve.rows[self.received] if self.received < len(self.curve.rows) else None


class SimulatedBackend(FunctionBackend):
    """Syne Tune backend in virtual time; give the Tuner ``sleep_time=0`` and any ``n_workers``.

    ``function`` must train to the report number that ``config[max_resource_attr]`` says, report every unit of resource
    and checkpoint as it goes (``backends/context.py``). ``identity``: what decides a trial's reports besides its
    configuration and seed (task, code version); it is the curve's address in ``store``. ``pool``: called when something
    has to be trained for the first time, returns the real workers.
    """

    def __init__(
        self,
        function: str,
        *,
        store: CurveStore,
        pool: Callable[[], Workers],
        identity: Mapping[str, Any],
        max_resource_attr: str,
        counts: Counts | None = None,
        **inherited: Any,
    ):
        super().__init__(function, **inherited)
        self.store, self.identity, self.max_resource_attr = store, dict(identity), max_resource_attr
        self.counts = Counts() if counts is None else counts
        self.clock = VirtualClock()
        self._start_pool = pool
        self._pool: Workers | None = None
        self._running: dict[int, _Running] = {}
        self._x: dict[int, dict[str, Any]] = {}  # configurations as the trials were started with
        self._curves: dict[int, Curve] = {}
        self._jobs: dict[int, Job] = {}
        self._trained: set[int] = set()
        self._resent: set[int] = set()  # trials whose job will first repeat the report of its checkpoint
        self._kept: dict[int, float] = {}  # when a trial's checkpoint was last put into the store
        self._lap: dict[int, float] = {}  # when the trial's job made its latest report, in seconds of that job
        self._lost: dict[int, str] = {}  # trials whose real training cannot be finished, and why
        self._returned: set[int] = set()  # trials whose function has no more to report

    def close(self) -> None:
        """Keep what real workers have trained."""
        self._wait_for_halted()

    def busy_trial_ids(self) -> list[tuple[int, str]]:
        return [(trial_id, Status.in_progress) for trial_id in self._running]

    # ---- virtual time

    def _schedule(self, trial_id: int, config: dict[str, Any]) -> None:
        x = {name: value for name, value in config.items() if name != self.max_resource_attr}
        if trial_id in self._curves:
            self._check_unchanged(trial_id, x)
        else:
            self._x[trial_id] = x
            seed = trial_seed(self.seed, trial_id)
            key = {"function": self.function, **self.identity, "config": x, "seed": seed}
            self._curves[trial_id] = self.store.curve(key)
        milestone, received = int(config[self.max_resource_attr]), self._received(trial_id)
        if received >= milestone:
            self._on_returned(trial_id)
            return
        now = self.clock.now
        self._running[trial_id] = _Running(self._curves[trial_id], milestone, now, received, last=now)

    def _check_unchanged(self, trial_id: int, config: dict[str, Any]) -> None:
        """A curve belongs to one configuration: x, or what the trial's own warm start has made of it.
        Errors: ValueError for a scheduler that changes a trial's configuration (as population-based training does)."""
        rows = self._curves[trial_id].rows
        warm = _spent(rows[0]).get("warm_start") if rows else None
        if config != self._x[trial_id] and (warm is None or config != warm["x_prime"]):
            raise ValueError(f"trial {trial_id} was resumed with another configuration: that has no curve to replay")

    def _collect(self, wait: float) -> None:
        """Jump to the next report and deliver all that are due then."""
        if wait == 0.0 or not self._running or not self._look_ahead():
            return
        due = sorted((trial.due or 0.0, trial_id) for trial_id, trial in self._running.items())
        self.clock.advance_to(due[0][0])
        for when, trial_id in due:
            if when <= self.clock.now:
                self._deliver(trial_id, self._running[trial_id])

    def _look_ahead(self) -> bool:
        """Find out when the next report of every running trial is due; False if one is still being trained."""
        waiting = False
        for trial_id, trial in sorted(self._running.items()):
            if trial.due is not None:
                continue
            if not self._known(trial_id, trial):
                self._train(trial_id, trial)
            if self._known(trial_id, trial):
                trial.due = trial.last + self._seconds(trial_id, trial)
                self.counts.trainings += trial.received == 0
            else:
                waiting = True
        if waiting and self._pool is not None:
            self._pool.poll(WAIT)
        return not waiting

    def _known(self, trial_id: int, trial: _Running) -> bool:
        """Whether it is known what comes next: a row, or that there is none."""
        return trial.next_row is not None or trial_id in self._lost or trial_id in self._returned

    def _seconds(self, trial_id: int, trial: _Running) -> float:
        row = self._charged(trial_id, trial)
        if row is None:
            return 0.0
        busy = _spent(row).get("busy")
        return row.seconds if busy is None else sum(busy.values())

    def _charged(self, trial_id: int, trial: _Running) -> Row | None:
        """What comes next, with the busy seconds that it costs in this attempt; None if the trial function returned."""
        row = trial.next_row
        if row is None:
            return Row(None, failure=self._lost[trial_id]) if trial_id in self._lost else None
        spent = _spent(row)
        if "busy" not in spent:
            return row
        busy = dict(spent["busy"])
        if "startup" in busy:
            busy["startup"] = _spent(trial.curve.rows[0])["busy"]["startup"] if trial.begins else 0.0
        if "checkpoint" in busy and trial.received + 1 != trial.milestone:
            busy["checkpoint"] = 0.0
        changed = {**spent, "busy": busy}
        return replace(row, details=changed) if row.report is None else replace(row, report=changed)

    def _deliver(self, trial_id: int, trial: _Running) -> None:
        row = self._charged(trial_id, trial)
        due = trial.due or 0.0
        if row is None or row.report is None:
            del self._running[trial_id]
            if row is None:
                self._on_returned(trial_id)
            else:
                self._on_failed(trial_id, row.failure or "", row.details)
            return
        stamps = {TIMESTAMP: due, SECONDS: due - trial.started, NUMBER: trial.received}
        self._on_report(trial_id, {**row.report, **stamps})
        self.counts.epochs += 1
        trial.received, trial.begins, trial.last, trial.due = trial.received + 1, False, due, None
        if trial.received == trial.milestone:
            del self._running[trial_id]
            self._on_returned(trial_id)

    def _halt(self, trial_id: int) -> None:
        self._running.pop(trial_id, None)
        job = self._jobs.get(trial_id)
        if job is not None and self._pool is not None:
            self._pool.stop(job)
            if job.ended:
                del self._jobs[trial_id]

    def _wait_for_halted(self) -> None:
        while self._jobs and self._pool is not None:
            self._pool.poll(WAIT)

    # ---- real training

    def _train(self, trial_id: int, trial: _Running) -> None:
        """See to it that the next row is trained: by another process meanwhile, by a job that runs, or by a new one."""
        self.store.refresh(trial.curve)
        if trial.next_row is not None or trial_id in self._jobs:
            return
        if self._pool is None:
            self._pool = self._start_pool()
            self._pool.clear()
        if trial_id not in self._trained:
            self._trained.add(trial_id)
            self.counts.trainings_run += 1
        self._lap[trial_id] = 0.0
        if self._provide_checkpoint(trial_id, trial.curve):
            self._resent.add(trial_id)
        # x, not x': training that begins anew, without a checkpoint, begins with the warm start
        config = {**self._x[trial_id], self.max_resource_attr: trial.milestone}
        spec = replace(self._next_attempt(trial_id, config), received=len(trial.curve.rows))
        self._jobs[trial_id] = Job(spec, self._on_message)
        self._pool.submit(self._jobs[trial_id])

    def _provide_checkpoint(self, trial_id: int, curve: Curve) -> bool:
        """Put the store's checkpoint into the trial's folder, unless this experiment has made one itself; is there one
        now?"""
        folder = self.trial_path(trial_id)
        if checkpoint_files(folder, self._oldest(trial_id)):
            return True
        content = self.store.checkpoint(curve)
        if content is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self._stored).write_bytes(content)
        return True

    @property
    def _stored(self) -> str:
        """The store's checkpoint in a trial's folder: older than any attempt's own."""
        return f"{attempt_name(self.run, 0)}.pt"

    def _on_message(self, job: Job, message: dict[str, Any]) -> None:
        trial_id = job.spec.trial_id
        curve = self._curves[trial_id]
        if message["m"] == "report":
            self._on_trained(trial_id, curve, message["report"])
            return
        if self._jobs.get(trial_id) is job:
            del self._jobs[trial_id]
        self._resent.discard(trial_id)
        self._keep_checkpoint(trial_id, curve)
        if job.stop_at is not None and (message["m"] == "lost" or message["kind"] != "failed"):
            return  # it ran ahead of need: how it came to its end says nothing
        if message["m"] == "lost":
            self._retries[trial_id] += 1
            if self._retries[trial_id] > self.max_retries:
                self._lost[trial_id] = f"{message['reason']}; given up after {self.max_retries} retries"
        elif message["kind"] == "failed":
            self.store.append(curve, Row(None, failure=message["reason"], details=message["details"]))
        elif message["kind"] != "returned":  # a bug or a lack of memory is no property of the configuration
            self._lost[trial_id] = message["reason"]
        elif len(curve.rows) <= job.spec.received:
            self._returned.add(trial_id)

    def _on_trained(self, trial_id: int, curve: Curve, report: dict[str, Any]) -> None:
        resent = trial_id in self._resent  # the first report after a checkpoint may be that of an earlier attempt
        self._resent.discard(trial_id)
        seconds = report[SECONDS] - self._lap[trial_id]
        if not resent:
            self._lap[trial_id] = report[SECONDS]
        elif curve.rows:
            seconds = min(seconds, curve.rows[-1].seconds)
        new = report[NUMBER] >= len(curve.rows)  # else trained again to get further, or by another process meanwhile
        self.counts.epochs_run += new or not resent
        if new:
            content = {name: value for name, value in report.items() if name not in (NUMBER, SECONDS, TIMESTAMP)}
            self.store.append(curve, Row(content, seconds=max(0.0, seconds)))
        if time.monotonic() - self._kept.get(trial_id, 0.0) > KEEP_SECONDS:
            self._keep_checkpoint(trial_id, curve)

    def _keep_checkpoint(self, trial_id: int, curve: Curve) -> None:
        """Put the newest checkpoint of the trial's folder into the store."""
        self._kept[trial_id] = time.monotonic()
        files = checkpoint_files(self.trial_path(trial_id), self._oldest(trial_id))
        if files and files[-1].name != self._stored:
            content = files[-1].read_bytes()
            self.store.save_checkpoint(curve, reports_before(content), content)


def _spent(row: Row) -> dict[str, Any]:
    """Where a row's busy seconds are."""
    return row.details if row.report is None else row.report
