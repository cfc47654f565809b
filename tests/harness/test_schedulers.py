"""What the schedulers do with trials beyond the recorded traces: sampling, broken metrics, failures, arguments."""

import json
import math
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import dill
import numpy as np
import pytest
import yaml
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, lograndint, loguniform, uniform

import harness.schedulers
from harness.schedulers import ASHA, PASHA, Hyperband, RandomSampler, RandomSearch

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "lr": loguniform(1e-3, 1),
    "momentum": uniform(0, 0.99),
    "width": lograndint(8, 64),
    "kind": choice(["a", "b"]),
    "tag": "x",
}
NAMES = ["lr", "momentum", "width", "kind", "tag"]
MAKERS = {
    "asha": ASHA,
    "asha_stopping": lambda *args, **kwargs: ASHA(*args, **kwargs, type="stopping"),
    "asha_brackets": lambda *args, **kwargs: ASHA(*args, **kwargs, brackets=None, rung_system_per_bracket=True),
    "pasha": PASHA,
    "hyperband": Hyperband,
    "random": RandomSearch,
}
ALL = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())


def make(maker, **changes):
    arguments = {"mode": "min", "max_t": 27, "max_resource_attr": "epochs", "seed": 3} | changes
    return maker(SPACE, "loss", **arguments)


class Driver:
    """Trials that report when told to, with the calls in the Tuner's order."""

    def __init__(self, scheduler):
        self.scheduler, self.trials, self.epochs, self.decisions = scheduler, [], {}, []

    def suggest(self):
        """Start or resume a trial; returns its id."""
        suggestion = self.scheduler.suggest()
        if not suggestion.spawn_new_trial_id:
            trial = self.trials[suggestion.checkpoint_trial_id]
            trial.config = dict(suggestion.config)
            return trial.trial_id
        trial = Trial(len(self.trials), dict(suggestion.config), datetime.now())
        self.trials.append(trial)
        self.epochs[trial.trial_id] = 0
        self.scheduler.on_trial_add(trial)
        return trial.trial_id

    def report(self, trial_id, value):
        """One epoch; returns the decision."""
        self.epochs[trial_id] += 1
        trial = self.trials[trial_id]
        decision = self.scheduler.on_trial_result(trial, {"loss": value, "epoch": self.epochs[trial_id]})
        if decision != "CONTINUE":
            self.scheduler.on_trial_remove(trial)
        self.decisions.append((trial_id, self.epochs[trial_id], decision))
        return decision

    def report_first(self, values):
        """Start so many trials, then let each report its first epoch."""
        for trial_id in [self.suggest() for _ in values]:
            self.report(trial_id, values[trial_id])

    def train(self, trial_id, curve):
        """Report ``curve(epoch)`` until the scheduler ends the trial."""
        while (decision := self.report(trial_id, curve(self.epochs[trial_id] + 1))) == "CONTINUE":
            pass
        return decision

    def run(self, jobs, curve):
        """So many jobs, one after another."""
        for _ in range(jobs):
            trial_id = self.suggest()
            self.train(trial_id, lambda epoch, k=trial_id: curve(k, epoch))
        return self


def noisy(trial_id, epoch):
    return float(np.random.default_rng([trial_id, epoch]).normal(trial_id % 7, 0.5) / epoch)


@ALL
def test_every_scheduler_draws_the_same_configurations(maker):
    sampler = RandomSampler(SPACE, seed=3)
    driver = Driver(make(maker)).run(60, noisy)
    drawn = [{name: trial.config[name] for name in NAMES} for trial in driver.trials]
    assert len(drawn) > 10
    assert drawn == [sampler.suggest() for _ in drawn]


def test_configurations_depend_on_the_seed():
    assert RandomSampler(SPACE, seed=3).suggest() != RandomSampler(SPACE, seed=4).suggest()


def test_everything_is_independent_of_the_hash_seed():
    code = (
        "from tests.harness.test_schedulers import *\n"
        "runs = [Driver(make(maker)).run(40, noisy) for maker in MAKERS.values()]\n"
        "print([(d.decisions, [sorted(t.config.items()) for t in d.trials]) for d in runs])\n"
    )
    outputs = set()
    for hash_seed in ("0", "1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop()) > 1000


@ALL
def test_diverged_trials_are_never_resumed_nor_stop_the_rest(maker):
    driver = Driver(make(maker))
    bad = {0, 3, 4, 9, 10, 11}
    driver.run(80, lambda k, epoch: math.nan if k in bad else noisy(k, epoch))
    ended = [k for k, _, decision in driver.decisions if decision != "CONTINUE"]
    assert all(ended.count(k) == 1 for k in bad)
    assert len(driver.trials) > 12


def test_a_diverged_trial_alone_in_its_rung_is_stopped():
    driver = Driver(make(MAKERS["asha_stopping"]))
    assert driver.report(driver.suggest(), math.inf) == "STOP"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_any_value_that_is_not_finite_is_the_worst(value, mode):
    scheduler = make(ASHA, mode=mode)
    driver = Driver(scheduler)
    driver.report_first([1.0, value, 2.0, 3.0])
    assert [e.trial_id for e in scheduler._systems[0][1].entries][-1] == 1
    assert 1 not in {driver.suggest() for _ in range(4)}


def test_a_trial_that_fails_after_it_paused_is_not_resumed():
    driver = Driver(make(ASHA))
    driver.report_first([0.0, 1.0, 2.0, 3.0])
    driver.scheduler.on_trial_error(driver.trials[0])
    assert driver.suggest() == 1


@pytest.mark.parametrize("end", ["on_trial_error", "on_trial_complete"])
def test_hyperband_does_not_wait_for_a_trial_that_ended_early(end):
    driver = Driver(make(Hyperband, max_t=3))  # first bracket: 3@1, 1@3
    for value in (2.0, 1.0):
        driver.report(driver.suggest(), value)
    lost = driver.trials[driver.suggest()]
    driver.scheduler.on_trial_error(lost) if end == "on_trial_error" else driver.scheduler.on_trial_complete(lost, {})
    assert driver.suggest() == 1


def test_hyperband_goes_on_when_all_of_a_rung_failed():
    driver = Driver(make(Hyperband, max_t=3))
    for _ in range(3):
        driver.scheduler.on_trial_error(driver.trials[driver.suggest()])
    assert driver.suggest() == 3
    assert driver.trials[3].config["epochs"] == 3  # the first bracket is over


def test_hyperband_makes_a_rung_smaller_when_too_few_trials_are_left():
    driver = Driver(make(Hyperband, max_t=9))  # first bracket: 9@1, 3@3, 1@9
    driver.report_first([math.nan, 2.0, math.nan, 1.0, *[math.nan] * 5])
    assert [driver.suggest() for _ in range(3)] == [1, 3, 9]


def test_hyperband_does_not_resume_a_promoted_trial_that_has_failed():
    driver = Driver(make(Hyperband, max_t=3))
    driver.report_first([2.0, 1.0, 3.0])
    driver.scheduler.on_trial_error(driver.trials[1])
    assert driver.suggest() == 3


@ALL
def test_a_trial_that_completes_before_its_milestone_does_no_harm(maker):
    driver = Driver(make(maker))
    driver.run(5, noisy)
    trial = driver.trials[driver.suggest()]
    driver.scheduler.on_trial_complete(trial, {"loss": 1.0, "epoch": 1})
    driver.run(30, noisy)
    assert all(k != trial.trial_id for k, _, _ in driver.decisions[-30:])


@ALL
def test_a_trial_that_is_in_no_book_runs_to_max_t(maker):
    scheduler = make(maker)
    stranger = Trial(7, {"lr": 0.1}, datetime.now())
    decisions = [scheduler.on_trial_result(stranger, {"loss": 1.0, "epoch": r}) for r in range(1, 28)]
    assert decisions == ["CONTINUE"] * 26 + ["STOP"]
    scheduler.on_trial_remove(stranger)
    scheduler.on_trial_complete(stranger, {})
    scheduler.on_trial_error(stranger)
    Driver(make(maker)).run(5, noisy)


@pytest.mark.parametrize("maker", [ASHA, PASHA, Hyperband])
def test_resumes_with_the_configuration_of_the_first_result(maker):
    """What a warm start changes is what the trial goes on with; later changes of ``trial.config`` are not read."""
    scheduler = make(maker, max_t=3)
    driver = Driver(scheduler)
    drawn = [dict(driver.trials[driver.suggest()].config) for _ in range(3)]
    for k, trial in enumerate(driver.trials):
        trial.config = {**trial.config, "lr": 0.5 + k / 10}
        driver.report(k, float(k))
        trial.config = drawn[k]
    assert driver.suggest() == 0
    assert driver.trials[0].config == {**drawn[0], "lr": 0.5, "epochs": 3}


@pytest.mark.parametrize("key", [None, "epochs"])
def test_milestone_is_in_the_configuration_only_if_asked_for(key):
    assert ("epochs" in make(ASHA, max_resource_attr=key).suggest().config) == (key is not None)


@pytest.mark.parametrize(
    ("maker", "milestone"), [(ASHA, 1), (MAKERS["asha_stopping"], 27), (Hyperband, 1), (RandomSearch, 27)]
)
def test_first_milestone(maker, milestone):
    assert make(maker).suggest().config["epochs"] == milestone


def test_promotion_pauses_at_the_first_report_after_a_milestone_that_was_not_reported():
    driver = Driver(make(ASHA, grace_period=2, max_t=8, eta=2))
    driver.epochs[driver.suggest()] = 2
    assert driver.report(0, 1.0) == "PAUSE"


@pytest.mark.parametrize("maker", [ASHA, MAKERS["asha_stopping"], Hyperband])
def test_grace_period_of_max_t_means_no_early_stopping(maker):
    driver = Driver(make(maker, grace_period=27)).run(5, noisy)
    assert [epoch for _, epoch, decision in driver.decisions if decision != "CONTINUE"] == [27] * 5


def test_brackets_are_drawn_once_per_suggestion_in_proportion():
    scheduler = make(ASHA, brackets=3)
    first = [scheduler.suggest().config["epochs"] for _ in range(600)]
    shares = [first.count(level) / 600 for level in (1, 3, 9)]
    assert shares == pytest.approx([0.6, 4 / 15, 2 / 15], abs=0.06)


def test_pasha_grows_its_cap_only_while_the_ranking_is_unsettled():
    settled = Driver(make(PASHA)).run(60, lambda k, epoch: k + 1 / epoch)
    assert settled.scheduler.oracle_state() == {"cap": 3, "eps": 0.0}
    # Rankings at epoch 1 and 3 are opposite, and no pair of curves crosses twice: no noise to excuse it.
    unsettled = Driver(make(PASHA)).run(200, lambda k, epoch: k if epoch < 3 else 1000 - k)
    assert unsettled.scheduler.oracle_state()["cap"] > 3


def test_searcher_that_runs_dry_ends_scheduling():
    class Dry:
        def suggest(self):
            return None

    for maker in MAKERS.values():
        assert make(maker, searcher=Dry()).suggest() is None


@ALL
def test_metadata_is_json_and_names_the_metric(maker):
    scheduler = make(maker)
    metadata = json.loads(json.dumps(scheduler.metadata()))
    assert (metadata["metric_names"], metadata["metric_mode"]) == (scheduler.metric_names(), scheduler.metric_mode())
    assert metadata["seed"] == 3


@ALL
def test_a_saved_scheduler_goes_on_as_if_it_had_not_been(maker):
    driver = Driver(make(maker)).run(20, noisy)
    copy = dill.loads(dill.dumps(driver))
    assert copy.run(20, noisy).decisions == driver.run(20, noisy).decisions


def test_report_without_the_metric_is_named():
    driver = Driver(make(ASHA))
    trial = driver.trials[driver.suggest()]
    with pytest.raises(ValueError, match=r"trial 0 reported no 'loss'; it reported \['epoch', 'score'\]"):
        driver.scheduler.on_trial_result(trial, {"epoch": 1, "score": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "up"}, "mode must be 'min' or 'max', got 'up'"),
        ({"max_t": 0}, "max_t must be an integer >= 1, got 0"),
        ({"max_t": 2.5}, "max_t must be an integer"),
        ({"max_t": True}, "max_t must be an integer"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": "0"}, "seed must be an integer >= 0"),
        ({"grace_period": 0}, r"grace_period must be an integer in \[1, max_t = 27\], got 0"),
        ({"grace_period": 28}, r"grace_period must be an integer in \[1, max_t = 27\], got 28"),
        ({"eta": 1.5}, "eta .* must be a finite number >= 2, got 1.5"),
        ({"eta": math.inf}, "eta .* must be a finite number"),
        ({"eta": math.nan}, "eta .* must be a finite number"),
        ({"eta": "3"}, "eta .* must be a finite number"),
        ({"brackets": 0}, "brackets must be an integer >= 1, or null for all, got 0"),
        ({"brackets": True}, "brackets must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    for maker in (ASHA, PASHA, Hyperband):
        with pytest.raises(ValueError, match=message):
            make(maker, **changes)


def test_wrong_type_and_metric_are_refused():
    with pytest.raises(ValueError, match="type must be 'promotion' or 'stopping', got 'both'"):
        make(ASHA, type="both")
    with pytest.raises(ValueError, match="metric must be the name"):
        RandomSearch(SPACE, "", max_t=3)


@pytest.mark.parametrize("name", ["asha", "pasha", "hyperband", "random"])
def test_presets_build_their_scheduler(name):
    preset = yaml.safe_load((ROOT / "conf" / "scheduler" / f"{name}.yaml").read_text())
    module, _, target = preset.pop("_target_").rpartition(".")
    assert module == "harness.schedulers"
    assert make(getattr(harness.schedulers, target), **preset).suggest() is not None
