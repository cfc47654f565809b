"""Virtual time: order, decisions and times against hand-computed traces, and against a live run."""

import os
import signal
from typing import Any

import pytest
from syne_tune import Tuner
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialScheduler, TrialSuggestion

from backends.curve_store import CurveStore
from backends.pool import PoolBackend, WorkerPool
from backends.simulated import SimulatedBackend
from tests.backends.conftest import FUNCTIONS


class Script(TrialScheduler):
    """Starts the given configurations with ``epochs`` = 2; pauses at epoch 2; resumes each paused trial of ``resumed``,
    in this order and as soon as it is paused, to epoch 3; writes down all it sees."""

    def __init__(self, configs: list[dict[str, Any]], resumed: tuple[int, ...] = (), stops: tuple[int, ...] = ()):
        super().__init__(random_seed=0)
        self.configs, self.resumed, self.stops = list(configs), list(resumed), stops
        self.clock: Any = lambda: None
        self.log: list[tuple] = []
        self.paused: dict[int, dict[str, Any]] = {}

    def suggest(self):
        if self.resumed and self.resumed[0] in self.paused:
            trial_id = self.resumed.pop(0)
            self.log.append((self.clock(), "resume", trial_id))
            return TrialSuggestion.resume_suggestion(trial_id, {**self.paused.pop(trial_id), "epochs": 3})
        if not self.configs:
            return None
        return TrialSuggestion.start_suggestion({"x": 1.0, "epochs": 2, **self.configs.pop(0)})

    def on_trial_add(self, trial):
        self.log.append((self.clock(), "start", trial.trial_id))

    def on_trial_result(self, trial, result):
        self.log.append((self.clock(), "report", trial.trial_id, result["epoch"]))
        if trial.trial_id in self.stops:
            return SchedulerDecision.STOP
        if result["epoch"] == 2:
            self.paused[trial.trial_id] = dict(trial.config)
            return SchedulerDecision.PAUSE
        return SchedulerDecision.CONTINUE

    def on_trial_error(self, trial):
        self.log.append((self.clock(), "error", trial.trial_id))

    def on_trial_complete(self, trial, result):
        self.log.append((self.clock(), "complete", trial.trial_id))

    def metric_names(self):
        return ["loss"]

    def metric_mode(self):
        return "min"

    def metadata(self):
        return {"metric_names": ["loss"], "metric_mode": "min"}


def no_pool() -> WorkerPool:
    raise AssertionError("a warm store needs no worker")


def run(scheduler: Script, backend: Any, n_workers: int, tmp_path: Any) -> list[tuple]:
    tuner = Tuner(
        trial_backend=backend, scheduler=scheduler, stop_criterion=lambda status: False, n_workers=n_workers,
        sleep_time=0, max_failures=100, callbacks=[], save_tuner=False, suffix_tuner_name=False, tuner_name="test",
        trial_backend_path=str(tmp_path / "ignored"),
    )  # fmt: skip
    tuner.tuner_path = tmp_path / "tuner"
    tuner.run()
    backend.close()
    return scheduler.log


def simulate(
    scheduler: Script, store: CurveStore, pool: Any, tmp_path: Any, n_workers: int = 2, **options: Any
) -> tuple[list[tuple], SimulatedBackend]:
    backend = SimulatedBackend(
        f"{FUNCTIONS}.timed", store=store, pool=pool, identity={"version": 1}, max_resource_attr="epochs",
        path=tmp_path / f"run{len(list(tmp_path.iterdir()))}", **options,
    )  # fmt: skip
    scheduler.clock = backend.clock
    return run(scheduler, backend, n_workers, tmp_path), backend


@pytest.fixture
def store(tmp_path):
    with CurveStore(tmp_path / "curves.sqlite") as store:
        yield store


def test_the_order_of_a_hand_computed_trace(store, pool, tmp_path):
    """Two workers; epochs of 2, 1, 4 and 1 seconds; trial 0 goes on to its third epoch as soon as it is paused.

    Worker A: trial 0 (reports at 2, 4), then trial 0 again (6), then trial 3 (7, 8).
    Worker B: trial 1 (reports at 1, 2), then trial 2 (6, 10).
    At 2 and at 6 two reports coincide: the lower trial comes first, and workers are filled after both.
    """
    configs = [{"seconds": 2.0}, {"seconds": 1.0}, {"seconds": 4.0}, {"seconds": 1.0}]
    log, cold = simulate(Script(configs, resumed=(0,)), store, lambda: pool, tmp_path)
    assert log == [
        (0.0, "start", 0), (0.0, "start", 1),
        (1.0, "report", 1, 1), (2.0, "report", 0, 1), (2.0, "report", 1, 2), (2.0, "start", 2),
        (4.0, "report", 0, 2), (4.0, "resume", 0),
        (6.0, "report", 0, 3), (6.0, "report", 2, 1), (6.0, "complete", 0), (6.0, "start", 3),
        (7.0, "report", 3, 1), (8.0, "report", 3, 2), (10.0, "report", 2, 2),
    ]  # fmt: skip
    warm, backend = simulate(Script(configs, resumed=(0,)), store, no_pool, tmp_path)
    assert warm == log
    assert vars(backend.counts) == {"trainings": 4, "epochs": cold.counts.epochs, "trainings_run": 0, "epochs_run": 0}
    assert cold.counts.trainings_run == 4


@pytest.mark.parametrize("n_workers", [1, 3, 64])
def test_any_number_of_virtual_workers(n_workers, store, pool, tmp_path):
    configs = [{"seconds": 1.0 + k % 3} for k in range(100)]
    log, _ = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers)
    free = [0.0] * n_workers
    ends = []
    for k in range(100):  # greedy: the next trial goes to the worker that falls free first
        begin = min(free)
        free[free.index(begin)] = begin + 2 * (1.0 + k % 3)
        ends.append((begin + 2 * (1.0 + k % 3), "report", k, 2))
    assert sorted(entry for entry in log if entry[1:2] == ("report",) and entry[3] == 2) == sorted(ends)
    assert [entry[0] for entry in log] == sorted(entry[0] for entry in log)


def test_start_up_and_checkpoints_are_charged_where_they_would_occur(store, pool, tmp_path):
    """Row 1 was measured with a start-up of 1 s, each with a checkpoint of .5 s; a pause and a resume in between."""
    script = Script([{"seconds": 10.0, "kinds": True}], resumed=(0,))
    script.configs.append({"seconds": 1e6})  # keeps the scheduler going
    log, _ = simulate(script, store, lambda: pool, tmp_path, n_workers=2)
    times = {entry[2:]: entry[0] for entry in log if entry[1] == "report" and entry[2] == 0}
    assert times[0, 1] == 1.0 + 10.0  # start-up and training; no pause here, so no checkpoint
    assert times[0, 2] == times[0, 1] + 10.0 + 0.5
    assert times[0, 3] == times[0, 2] + 1.0 + 10.0 + 0.5  # the start-up again, and a milestone


def test_failures_are_kept_with_what_they_cost_and_bugs_are_not(store, pool, tmp_path):
    configs = [{"seconds": 3.0, "fails_at": 2}, {"seconds": 1.0, "breaks_at": 1}, {"seconds": 1.0}]
    log, backend = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers=1)
    assert log == [
        (0.0, "start", 0), (3.0, "report", 0, 1), (6.0, "error", 0), (6.0, "start", 1), (6.0, "error", 1),
        (6.0, "start", 2), (7.0, "report", 2, 1), (8.0, "report", 2, 2),
    ]  # fmt: skip
    assert backend.failure(0) == "failed at 2"
    assert backend.failure_details(0) == {"busy": {"train": 3.0}}
    assert "a bug" in backend.failure(1)
    again, warm = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers=1)
    assert again == log
    assert warm.counts.trainings_run == 1, "only the one with the bug is tried again"


def test_what_the_environment_lacks_is_not_kept(store, pool, tmp_path):
    configs = [{"seconds": 1.0, "needs": str(tmp_path / "data")}]
    log, backend = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers=1)
    assert log == [(0.0, "start", 0), (0.0, "error", 0)]
    assert backend.failure(0) == "the data are not there"
    (tmp_path / "data").touch()
    log, _ = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers=1)
    assert log == [(0.0, "start", 0), (1.0, "report", 0, 1), (2.0, "report", 0, 2)]


def test_a_killed_worker_is_retried_from_the_checkpoint(store, pool, tmp_path):
    log, backend = simulate(Script([{"seconds": 1.0, "dies_at": 2}]), store, lambda: pool, tmp_path, n_workers=1)
    assert log == [(0.0, "start", 0), (1.0, "report", 0, 1), (2.0, "report", 0, 2)]
    assert backend.counts.epochs_run == 2


def test_a_function_that_returns_early_has_completed(store, pool, tmp_path):
    log, _ = simulate(Script([{"seconds": 1.0, "returns_at": 1}]), store, lambda: pool, tmp_path, n_workers=1)
    assert log == [(0.0, "start", 0), (1.0, "report", 0, 1), (1.0, "complete", 0)]


def test_a_dropped_checkpoint_costs_training_again_and_changes_nothing(pool, tmp_path):
    configs = [{"seconds": 1.5}]
    with CurveStore(tmp_path / "kept.sqlite") as kept, CurveStore(tmp_path / "none.sqlite", max_bytes=0) as none:
        logs = []
        for store in (kept, none):
            simulate(Script(configs, stops=(0,)), store, lambda: pool, tmp_path, n_workers=1)
            log, backend = simulate(Script(configs), store, lambda: pool, tmp_path, n_workers=1)
            logs.append(log)
        assert logs[0] == logs[1]
        assert backend.counts.epochs == 2


def test_decisions_do_not_depend_on_the_real_workers(tmp_path):
    configs = [{"seconds": 1.0 + 0.1 * (k % 7), "sleep": False} for k in range(12)]
    logs = []
    for processes in (1, 3):
        with CurveStore(tmp_path / f"{processes}.sqlite") as store, WorkerPool(processes, threads=1) as workers:
            logs.append(simulate(Script(configs), store, lambda w=workers: w, tmp_path, n_workers=4)[0])  # type: ignore[misc]
    assert logs[0] == logs[1]


def test_a_live_run_with_stretched_durations_and_its_twin(store, pool, tmp_path):
    """Epochs of .2 to .9 s, no two reports due within .1 s of each other: live and virtual order must agree."""
    configs = [{"seconds": s, "sleep": True} for s in (0.55, 0.25, 0.8, 0.35, 0.2)]
    live = run(
        Script(configs, resumed=(0,)), PoolBackend(f"{FUNCTIONS}.timed", pool=pool, path=tmp_path / "live"), 2, tmp_path
    )
    twin, _ = simulate(Script(configs, resumed=(0,)), store, lambda: pool, tmp_path, n_workers=2)
    assert [entry[1:] for entry in live] == [entry[1:] for entry in twin]
    assert len(twin) >= 16


def test_an_interrupt_keeps_what_was_trained(store, pool, tmp_path):
    script = Script([{"seconds": 0.3, "sleep": True} for _ in range(4)])
    scheduler_sees = script.on_trial_result

    def interrupt(trial, result):
        if trial.trial_id == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return scheduler_sees(trial, result)

    script.on_trial_result = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        simulate(script, store, lambda: pool, tmp_path, n_workers=1)
    before = store.counts()["rows"]
    assert before >= 3
    _, backend = simulate(Script([{"seconds": 0.3, "sleep": True}] * 4), store, lambda: pool, tmp_path, n_workers=1)
    assert backend.counts.epochs == 8
    assert backend.counts.epochs_run <= 8 - before + 1
