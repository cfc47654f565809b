"""Syne Tune's own ``Tuner`` drives each scheduler, on a backend that trains nothing."""

from datetime import datetime
from pathlib import Path

import pytest
from syne_tune import StoppingCriterion, Tuner
from syne_tune.backend.trial_backend import TrialBackend
from syne_tune.backend.trial_status import Status
from syne_tune.config_space import loguniform, uniform
from syne_tune.constants import ST_WORKER_TIMESTAMP
from syne_tune.tuner_callback import TunerCallback

from harness.ohgw import OHGW
from harness.schedulers import ASHA, BOHB, BOIL, PASHA, DyHPO, Hyperband, HyperbandBO, RandomSearch

SPACE = {"lr": loguniform(1e-3, 1), "momentum": uniform(0, 0.99)}


class InstantBackend(TrialBackend):
    """Each poll trains every running trial for one epoch. A trial ends by itself at ``config["epochs"]`` or
    ``ends_at``; trials in ``failing`` raise after their first epoch; with ``warm`` momentum becomes 0.5 in all."""

    def __init__(self, failing=(), ends_at=27, warm=False):
        super().__init__()
        self.failing, self.ends_at, self.clock, self.resumed = set(failing), ends_at, 0, 0
        self.warm = warm

    def _all_trial_results(self, trial_ids):
        trials = [self._trial_dict[trial_id] for trial_id in trial_ids]
        for trial in trials:
            if trial.status == Status.in_progress:
                self._train(trial)
        return trials

    def _train(self, trial):
        epoch, self.clock = len(trial.metrics) + 1, self.clock + 1
        if trial.trial_id in self.failing and epoch > 1:
            trial.status = Status.failed
            return
        loss = abs(trial.config["lr"] - 0.1) + 1 / epoch
        report = {"epoch": epoch, "loss": loss, ST_WORKER_TIMESTAMP: self.clock}
        if self.warm and epoch == 1:
            report["warm_start"] = {"x": dict(trial.config), "x_prime": {**trial.config, "momentum": 0.5}}
        trial.metrics.append(report)
        if epoch >= min(trial.config["epochs"], self.ends_at):
            trial.status = Status.completed
            trial.training_end_time = datetime.now()

    def _schedule(self, trial_id, config):
        pass

    def _resume_trial(self, trial_id):
        self.resumed += 1

    def _pause_trial(self, trial_id, result):
        pass

    def _stop_trial(self, trial_id, result):
        self._trial_dict[trial_id].status = Status.stopped

    def stdout(self, trial_id):
        return []

    def stderr(self, trial_id):
        return []

    def entrypoint_path(self):
        return Path("instant")


class Decisions(TunerCallback):
    def __init__(self):
        self.seen = []

    def on_trial_result(self, trial, status, result, decision):
        self.seen.append((trial.trial_id, result["epoch"], decision))


def tune(scheduler, backend, trials=40, n_workers=4):
    """Run the Tuner until so many trials have started; returns (trial, epoch, decision) of each report."""
    decisions = Decisions()
    Tuner(
        trial_backend=backend,
        scheduler=scheduler,
        stop_criterion=StoppingCriterion(max_num_trials_started=trials),
        n_workers=n_workers,
        sleep_time=0,
        max_failures=100,
        callbacks=[decisions],
        save_tuner=False,
    ).run()
    return decisions.seen


@pytest.fixture(autouse=True)
def _results_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNETUNE_FOLDER", str(tmp_path))


def make(maker, **changes):
    return maker(SPACE, "loss", max_t=27, max_resource_attr="epochs", seed=1, **changes)


@pytest.mark.parametrize(
    ("maker", "changes", "resumes"),
    [
        (ASHA, {}, True),
        (ASHA, {"brackets": 3}, True),
        (ASHA, {"type": "stopping"}, False),
        (PASHA, {}, True),
        (Hyperband, {}, True),
        (RandomSearch, {}, False),
        (HyperbandBO, {}, True),
        (BOHB, {}, True),
        (DyHPO, {}, True),
        (BOIL, {}, False),
    ],
)
def test_tuner_runs_every_scheduler(maker, changes, resumes):
    backend = InstantBackend(failing={2, 5})
    seen = tune(make(maker, **changes), backend)
    assert len(backend.trial_ids) >= 40
    assert (backend.resumed > 0) == resumes
    assert {epoch for trial_id, epoch, _ in seen if trial_id in (2, 5)} == {1}
    for trial_id in backend.trial_ids:
        epochs = [epoch for trial, epoch, _ in seen if trial == trial_id]
        assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("maker", [HyperbandBO, BOHB, DyHPO, BOIL])
def test_many_workers_and_warm_starts(maker):
    """64 workers, reports that carry a warm start: every model learns on x'."""
    scheduler = make(maker)
    backend = InstantBackend(warm=True)
    tune(OHGW(scheduler), backend, trials=100, n_workers=64)
    assert len(backend.trial_ids) >= 100
    reported = [k for k in backend.trial_ids if backend._trial_dict[k].metrics and k in scheduler.curves]
    assert len(reported) >= 64
    assert all(scheduler.configs[k]["momentum"] == 0.5 for k in reported)


@pytest.mark.parametrize("maker", [ASHA, PASHA, Hyperband, RandomSearch, HyperbandBO, BOHB, DyHPO, BOIL])
def test_tuner_survives_trials_that_end_before_their_milestone(maker):
    backend = InstantBackend(ends_at=2)
    tune(make(maker), backend)
    assert len(backend.trial_ids) >= 40
    assert max(len(backend._trial_dict[trial_id].metrics) for trial_id in backend.trial_ids) == 2
