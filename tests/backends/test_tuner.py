"""The real Tuner with a plain scheduler on both backends."""

import os
import subprocess
import sys

import pytest
from syne_tune import StoppingCriterion, Tuner
from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialScheduler, TrialSuggestion

from backends.local import LocalTrialBackend
from backends.pool import PoolBackend
from tests.backends.conftest import FUNCTIONS


class Halving(TrialScheduler):
    """Starts six trials, pauses all after epoch 2, resumes the best two to epoch 4; stops trial 5 after epoch 1."""

    def __init__(self):
        super().__init__(random_seed=0)
        self.results: dict[int, list[int]] = {}
        self.ended: list[int] = []
        self.errors: list[int] = []
        self._started = 0
        self._paused: dict[int, float] = {}
        self._resumed: list[int] = []

    def suggest(self):
        if self._started < 6:
            self._started += 1
            return TrialSuggestion.start_suggestion({"x": float(self._started), "epochs": 2, "sleep": 0.001})
        if len(self._paused) + len(self._resumed) >= 3 and len(self._resumed) < 2:
            best = min(self._paused, key=self._paused.__getitem__)
            config = {"x": self._paused.pop(best), "epochs": 4, "sleep": 0.001}
            self._resumed.append(best)
            return TrialSuggestion.resume_suggestion(best, config)
        return None

    def on_trial_result(self, trial: Trial, result):
        seen = self.results.setdefault(trial.trial_id, [])
        seen.append(result["epoch"])
        if trial.trial_id == 5:
            return SchedulerDecision.STOP
        if result["epoch"] == 2:
            self._paused[trial.trial_id] = trial.config["x"]
            return SchedulerDecision.PAUSE
        return SchedulerDecision.CONTINUE

    def on_trial_complete(self, trial, result):
        self.ended.append(trial.trial_id)

    def on_trial_error(self, trial):
        self.errors.append(trial.trial_id)

    def metric_names(self):
        return ["loss"]

    def metric_mode(self):
        return "min"

    def metadata(self):
        return {"metric_names": ["loss"], "metric_mode": "min"}


@pytest.mark.parametrize("kind", ["pool", pytest.param("local", marks=pytest.mark.slow)])
def test_a_run_with_pauses_stops_and_resumes(kind, pool, tmp_path):
    function = f"{FUNCTIONS}.count"
    path = tmp_path / "with space"
    backend = (
        PoolBackend(function, pool=pool, path=path)
        if kind == "pool"
        else LocalTrialBackend(function, path=path, threads=1)
    )
    scheduler = Halving()
    tuner = Tuner(
        trial_backend=backend,
        scheduler=scheduler,
        stop_criterion=StoppingCriterion(max_wallclock_time=100),
        n_workers=2,
        sleep_time=0,
        callbacks=[],
        save_tuner=False,
        suffix_tuner_name=False,
        tuner_name="test",
        trial_backend_path=str(tmp_path / "ignored"),
    )
    tuner.tuner_path = tmp_path / "tuner"
    tuner.run()
    assert scheduler.errors == []
    assert len(scheduler.ended) == 2
    assert scheduler.results[5] == [1]
    for trial_id in range(5):
        assert scheduler.results[trial_id] == ([1, 2, 3, 4] if trial_id in scheduler.ended else [1, 2])
    assert not (tmp_path / "ignored").exists()


def test_importing_the_backends_leaves_thread_limits_alone():
    """Syne Tune's LocalBackend sets OMP_NUM_THREADS for the whole driver when it is imported."""
    code = "import os; import backends.local, backends.pool; print(os.environ.get('OMP_NUM_THREADS'))"
    for given in (None, "3"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if given:
            environment["OMP_NUM_THREADS"] = given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(given)
