"""DyHPO: its deep kernel against gpytorch, what enters the model, and what the scheduler does with its trials."""

import copy
import heapq
import math
import os
import subprocess
import sys
from datetime import datetime
from typing import Any

import dill
import numpy as np
import pytest
import torch
import yaml
from scipy.integrate import quad
from scipy.stats import norm
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, lograndint, loguniform, randint, uniform

from harness.ohgw import OHGW
from harness.schedulers import dyhpo
from harness.schedulers.bo import deep_kernel_gp
from harness.schedulers.bo.deep_kernel_gp import DeepKernelGP, Rows
from harness.schedulers.dyhpo import Data, DyHPO, expected_improvement, incumbents, normal_scores
from harness.schedulers.sampler import RandomSampler
from tests.conftest import ROOT

gpytorch = deep_kernel_gp.gpytorch  # imported there without its warning

SPACE = {
    "lr": loguniform(1e-3, 1),
    "momentum": uniform(0, 0.99),
    "width": lograndint(8, 64),
    "kind": choice(["a", "b", "c"]),
    "tag": "x",
}
NAMES = ["lr", "momentum", "width", "kind", "tag"]


@pytest.fixture(autouse=True)
def _short_fits(monkeypatch):
    monkeypatch.setattr(dyhpo, "FIRST_STEPS", 20)
    monkeypatch.setattr(dyhpo, "WARM_STEPS", 2)
    monkeypatch.setattr(dyhpo, "POOL_SIZE", 128)


def make(space=SPACE, **changes) -> Any:
    arguments: dict[str, Any] = {"max_t": 9, "max_resource_attr": "epochs", "seed": 3}
    return DyHPO(space, "loss", **(arguments | changes))


def loss(config, epoch):
    """Best at lr 0.1, momentum 0.8; falls with the epochs."""
    away = abs(math.log10(config["lr"]) + 1) + abs(config["momentum"] - 0.8) + (config["kind"] == "c")
    return away + 1 / epoch


class Loop:
    """Discrete events: so many workers, trial k takes 1 + (k mod 3) ticks an epoch. ``log`` has (trial, epoch,
    decision), ``origins`` the origin of each suggestion."""

    def __init__(self, scheduler, workers=1, value=loss, failing=()):
        self.scheduler, self.workers, self.value, self.failing = scheduler, workers, value, set(failing)
        self.trials, self.epochs, self.log, self.origins = [], {}, [], []
        self._queue, self._clock, self.ended = [], 0, False

    def run(self, reports):
        end = len(self.log) + reports
        while len(self.log) < end:
            while len(self._queue) < self.workers and not self.ended:
                self._suggest()
            if not self._queue:
                break
            self._report()
        return self

    def _suggest(self):
        suggestion = self.scheduler.suggest()
        self.ended = suggestion is None
        if self.ended:
            return
        self.origins.append(self.scheduler.origin)
        if suggestion.spawn_new_trial_id:
            trial = Trial(len(self.trials), dict(suggestion.config), datetime.now())
            self.trials.append(trial)
            self.epochs[trial.trial_id] = 0
            self.scheduler.on_trial_add(trial)
        else:
            trial = self.trials[suggestion.checkpoint_trial_id]
            trial.config = dict(suggestion.config)
        assert trial.config["epochs"] == self.epochs[trial.trial_id] + 1
        assert trial.trial_id not in {k for _, k in self._queue}
        self._push(trial.trial_id)

    def _push(self, trial_id):
        heapq.heappush(self._queue, (self._clock + 1 + trial_id % 3, trial_id))

    def _report(self):
        self._clock, trial_id = heapq.heappop(self._queue)
        trial, self.epochs[trial_id] = self.trials[trial_id], self.epochs[trial_id] + 1
        if trial_id in self.failing:
            self.scheduler.on_trial_error(trial)
            self.log.append((trial_id, self.epochs[trial_id], "FAILED"))
            return
        result = {"loss": self.value(trial.config, self.epochs[trial_id]), "epoch": self.epochs[trial_id]}
        decision = self.scheduler.on_trial_result(trial, result)
        self.log.append((trial_id, self.epochs[trial_id], decision))
        if decision == "CONTINUE":
            self._push(trial_id)
        else:
            self.scheduler.on_trial_remove(trial)

    def decisions(self):
        return self.log, [[trial.config[name] for name in NAMES] for trial in self.trials]


def some_rows(n=12, dims=3, length=7, seed=0):
    draw = np.random.default_rng(seed)
    budgets = draw.integers(1, length + 1, n)
    curves = draw.normal(size=(n, length)) * (np.arange(1, length + 1) < budgets[:, None])
    return Rows(draw.random((n, dims)), budgets / length, curves), draw.normal(size=n)


def exact_gp(model, features, targets):
    """The same model in gpytorch's own terms, on given features."""

    class Exact(gpytorch.models.ExactGP):  # type: ignore[name-defined]
        def __init__(self):
            super().__init__(features, targets, model.likelihood)
            self.mean, self.kernel = model.mean, model.kernel

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    return Exact()


def double_model(dims=3):
    model = DeepKernelGP(dims, seed=1).double()
    model.likelihood.noise, model.kernel.outputscale = 0.3, 1.7
    torch.nn.init.constant_(model.mean.constant, 0.2)
    return model


# The model


def test_gradient_of_the_marginal_likelihood_is_autograds():
    rows, targets = some_rows()
    model = double_model()
    inputs, y = model.inputs(rows), model.tensor(targets)
    loss = model.backward(inputs, y)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    features = model.extractor(*inputs)
    exact = exact_gp(model, features, y)
    published = -gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, exact)(exact(features), y)
    published.backward()
    assert loss == pytest.approx(published.item(), rel=1e-9)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(ours[name].numpy(), p.grad.numpy(), rtol=1e-6, atol=1e-9, err_msg=name)


def test_posterior_is_gpytorchs():
    rows, targets = some_rows()
    queries, _ = some_rows(n=5, seed=1)
    model = double_model()
    model.fit(rows, targets, steps=3)
    mean, std = model.posterior(rows, targets)(queries)
    with torch.no_grad():
        exact = exact_gp(model, model.extractor(*model.inputs(rows)), model.tensor(targets)).eval()
        published = model.likelihood(exact(model.extractor(*model.inputs(queries))))
    np.testing.assert_allclose(mean, published.mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(std, published.stddev.numpy(), rtol=1e-6)


def test_single_precision_predicts_as_double_does():
    rows, targets = some_rows(n=60)
    model = DeepKernelGP(3, seed=0)
    model.fit(rows, targets, steps=50)
    single = model.posterior(rows, targets)(rows)
    double = model.double().posterior(rows, targets)(rows)
    np.testing.assert_allclose(single, double, atol=1e-3)


def test_features_depend_on_the_row_alone_not_on_padding_or_neighbours():
    rows, _ = some_rows()
    extractor, model = (model := DeepKernelGP(3, seed=1).eval()).extractor, model
    features = extractor(*model.inputs(rows))
    assert features.shape == (12, 128)
    for k in range(12):
        longer = np.concatenate([rows.curves[k : k + 1], np.zeros((1, 4))], axis=1)
        alone = extractor(*model.inputs(Rows(rows.points[k : k + 1], rows.budgets[k : k + 1], longer)))
        torch.testing.assert_close(alone[0], features[k])


def test_batchnorm_predicts_with_the_statistics_of_the_observations():
    rows, targets = some_rows(n=30)
    model = DeepKernelGP(3, seed=1)
    model.fit(rows, targets, steps=5)
    points, windows = model.inputs(rows)
    torch.testing.assert_close(model.extractor.norm.running_mean, model.extractor.point(points).mean(dim=0))
    in_eval = model.extractor(points, windows)
    torch.testing.assert_close(in_eval, model.train().extractor(points, windows), atol=0.05, rtol=0.05)


def test_fit_lowers_the_loss_and_learns_from_the_curve():
    draw = np.random.default_rng(0)
    curves = np.zeros((40, 5))
    curves[:, 0] = draw.random(40)
    rows, targets = Rows(draw.random((40, 2)), np.full(40, 0.4), curves), 3 * curves[:, 0] - 1.5
    model = DeepKernelGP(2, seed=0)
    model.fit(rows, targets, steps=100)
    queries = Rows(np.full((2, 2), 0.5), np.full(2, 0.4), np.array([[0.1, 0, 0, 0, 0], [0.9, 0, 0, 0, 0]]))
    assert model.posterior(rows, targets)(queries)[0] == pytest.approx([-1.2, 1.2], abs=0.4)


def test_initial_weights_come_from_the_seed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = DeepKernelGP(3, seed=5).state_dict()
    torch.manual_seed(1)
    again, other = DeepKernelGP(3, seed=5).state_dict(), DeepKernelGP(3, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["extractor.point.weight"], other["extractor.point.weight"])
    assert state.shape == torch.get_rng_state().shape


def test_a_fit_that_is_not_finite_is_an_error():
    rows, targets = some_rows()
    with pytest.raises(deep_kernel_gp.FIT_ERRORS):
        DeepKernelGP(3, seed=0).fit(rows, targets * math.nan, steps=2)


# What enters it


def test_expected_improvement_is_the_integral():
    for mean, std, best in [(0.3, 0.5, 0.1), (-1.0, 0.2, 0.0), (2.0, 1.0, -1.0)]:
        integral = quad(lambda y, m=mean, s=std, b=best: (y - b) * norm.pdf(y, m, s), best, mean + 12 * std)[0]
        assert expected_improvement(np.array([mean]), np.array([std]), np.array([best]))[0] == pytest.approx(integral)


def test_incumbent_is_the_best_at_the_budget_or_over_all_where_none_was_seen():
    best = incumbents(np.array([1, 1, 2, 4]), np.array([0.3, 0.7, 0.5, 0.6]), max_t=5)
    assert best.tolist() == [0.7, 0.5, 0.7, 0.6, 0.7]


def test_normal_scores_keep_the_order_and_ties_and_take_infinity():
    scores = normal_scores(np.array([3.0, -np.inf, 1e300, 3.0]))
    assert scores[0] == scores[3] == pytest.approx(0)
    assert scores[1] == -scores[2] < 0
    assert np.isfinite(scores).all()


def test_rows_hold_the_curve_below_the_budget_and_then_zeros():
    values = np.array([[0.1, 0.4, 0.3], [0.2, np.nan, np.nan]])
    data = Data(np.array([[0.0], [1.0]]), values, [7, 9])
    above = data.scores - np.nanmin(data.scores)
    rows = data.rows(np.array([0, 0, 0, 1]), np.array([1, 2, 3, 2]))
    assert rows.points.ravel().tolist() == [0, 0, 0, 1]
    assert rows.budgets == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3])
    a = above[0]
    np.testing.assert_array_equal(rows.curves, [[0, 0, 0], [a[0], 0, 0], [a[0], a[1], 0], [above[1, 0], 0, 0]])


def test_of_too_many_observations_the_newest_of_every_trial_are_kept():
    values = np.array([[0.1, 0.4, 0.3], [0.2, np.nan, np.nan], [0.9, 0.8, np.nan]])
    data = Data(np.zeros((3, 1)), values, [0, 1, 2])
    kept = [list(zip(*(part.tolist() for part in data.observed(limit)), strict=True)) for limit in (6, 4, 2)]
    assert kept == [
        [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2)],
        [(0, 3), (1, 1), (2, 1), (2, 2)],
        [(0, 3), (2, 2)],
    ]


def test_a_failure_and_a_value_that_is_not_finite_are_the_worst_observations():
    scheduler = make()
    Loop(scheduler, value=lambda config, epoch: math.nan, failing={1}).run(2)
    data = scheduler._data()
    assert data.values[:, 0].tolist() == [-math.inf, -math.inf]
    assert np.isfinite(data.scores[:, 0]).all()


# The scheduler


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_trains_one_epoch_at_a_time_with_any_number_of_workers(workers):
    loop = Loop(make(max_t=4), workers).run(60 + workers)
    seen: dict[int, int] = {}
    for trial_id, epoch, decision in loop.log:
        assert epoch == seen.get(trial_id, 0) + 1
        assert decision == ("STOP" if epoch == 4 else "PAUSE")
        seen[trial_id] = epoch
    assert max(seen.values()) == 4
    assert len(seen) > 10
    assert [origin.by for origin in loop.origins].count("random") <= workers + 1


def test_first_configuration_is_the_samplers():
    config = make().suggest().config
    assert config == {**RandomSampler(SPACE, seed=3).suggest(), "epochs": 1}


def test_configurations_of_the_pool_are_valid_and_never_repeat():
    loop = Loop(make(), workers=4).run(60)
    configs = loop.decisions()[1]
    assert len({repr(config) for config in configs}) == len(configs)
    for lr, momentum, width, kind, tag in configs:
        assert 1e-3 <= lr <= 1
        assert 0 <= momentum <= 0.99
        assert width in range(8, 65)
        assert (kind in "abc", tag) == (True, "x")


def test_a_small_discrete_space_is_used_up_and_then_sampled_again():
    space = {"a": randint(1, 2), "kind": choice(["x", "y"])}
    loop = Loop(make(space, max_t=2), value=lambda config, epoch: config["a"] / epoch).run(30)
    assert len(loop.log) == 30
    assert len({(t.config["a"], t.config["kind"]) for t in loop.trials[:5]}) >= 4


def test_pending_trials_are_predicted_and_spread_the_workers(monkeypatch):
    scheduler = make()
    loop = Loop(scheduler).run(12)
    calls = []
    posterior = DeepKernelGP.posterior

    def spy(model, rows, targets):
        calls.append((model, rows, targets))
        return posterior(model, rows, targets)

    monkeypatch.setattr(DeepKernelGP, "posterior", spy)
    loop.workers = 3
    for _ in range(3):
        loop._suggest()
    assert [len(rows) for _, rows, _ in calls] == [12, 12, 13, 12, 14]
    model, rows, targets = calls[-1]
    last = Rows(rows.points[12:], rows.budgets[12:], rows.curves[12:])
    np.testing.assert_allclose(posterior(model, *calls[-2][1:])(last)[0], targets[12:], atol=1e-5)


def test_diverged_and_failed_trials_never_go_on():
    def value(config, epoch):
        return math.nan if config["kind"] == "a" else loss(config, epoch)

    loop = Loop(make(max_t=5), workers=4, value=value, failing={2, 5}).run(50)
    diverged = [t.trial_id for t in loop.trials if t.config["kind"] == "a"]
    assert diverged
    for trial_id in [*diverged, 2, 5]:
        assert [d for k, _, d in loop.log if k == trial_id] in (["STOP"], ["FAILED"], [])


def test_a_trial_that_fails_after_it_paused_is_not_resumed():
    scheduler = make(candidates=[{"lr": 0.1 * k, "momentum": 0.5, "width": 8, "kind": "a"} for k in (1, 2, 3)])
    loop = Loop(scheduler).run(6)
    lost = next(iter(sorted(scheduler._paused)))
    scheduler.on_trial_error(loop.trials[lost])
    assert lost not in {k for k, _, _ in loop.run(30).log[6:]}


def test_mode_max_mirrors_min():
    low = Loop(make(), workers=4).run(30)
    high = Loop(make(mode="max"), workers=4, value=lambda config, epoch: -loss(config, epoch)).run(30)
    assert low.decisions() == high.decisions()


def table(n=8):
    draw = RandomSampler(SPACE, seed=11)
    return [draw.suggest() for _ in range(n)]


def test_a_table_is_trained_out_each_row_once():
    rows = table()
    loop = Loop(make(candidates=rows, max_t=3)).run(100)
    assert loop.ended
    assert len(loop.log) == 24
    assert sorted(map(repr, loop.decisions()[1])) == sorted(repr([row[name] for name in NAMES]) for row in rows)


def test_trials_that_run_when_a_table_ends_run_on_to_max_t():
    loop = Loop(make(candidates=table(3), max_t=5), workers=4).run(100)
    assert loop.ended
    assert sorted(k for k, epoch, decision in loop.log if decision == "STOP" and epoch == 5) == [0, 1, 2]


def test_learns_on_the_configuration_after_the_warm_start():
    scheduler = make()
    wrapper: Any = OHGW(scheduler)
    trials: list[Trial] = []
    for _ in range(3):
        trials.append(Trial(len(trials), dict(wrapper.suggest().config), datetime.now()))
        wrapper.on_trial_add(trials[-1])
    for trial in trials:
        moved = {**trial.config, "lr": 0.5 + trial.trial_id / 10}
        report = {"loss": 1.0, "epoch": 1, "warm_start": {"x": trial.config, "x_prime": moved}}
        assert wrapper.on_trial_result(trial, report) == "PAUSE"
        wrapper.on_trial_remove(trial)
    lr = [scheduler.encoder.decode(point)["lr"] for point in scheduler._data().points]
    assert lr == pytest.approx([0.5, 0.6, 0.7])
    assert {row[0] for row in scheduler._keys()} == {"0.5", "0.6", "0.7"}
    assert {row[0] for row in scheduler._used} == {repr(trial.config["lr"]) for trial in trials}
    while (suggestion := wrapper.suggest()).spawn_new_trial_id:
        trials.append(Trial(len(trials), dict(suggestion.config), datetime.now()))
        wrapper.on_trial_add(trials[-1])
        wrapper.on_trial_error(trials[-1])
    k = suggestion.checkpoint_trial_id
    assert (suggestion.config["lr"], suggestion.config["epochs"]) == (0.5 + k / 10, 2)


def test_a_report_beyond_the_milestone_pauses_and_the_next_epoch_follows():
    scheduler = make(candidates=table(1))
    trial = Trial(0, dict(scheduler.suggest().config), datetime.now())
    scheduler.on_trial_add(trial)
    assert scheduler.on_trial_result(trial, {"loss": 1.0, "epoch": 4}) == "PAUSE"
    scheduler.on_trial_remove(trial)
    assert scheduler.suggest().config["epochs"] == 5


def test_a_trial_that_completes_early_is_left_alone():
    scheduler = make()
    loop = Loop(scheduler).run(8)
    loop._suggest()
    _, trial_id = loop._queue.pop()
    scheduler.on_trial_complete(loop.trials[trial_id], {})
    assert trial_id not in {k for k, _, _ in loop.run(20).log[8:]}


def test_a_failed_fit_gives_a_random_configuration_without_a_model_and_the_last_model_after(monkeypatch):
    def broken(model, rows, targets, steps):
        raise torch.linalg.LinAlgError("not positive-definite\nmore")

    good = DeepKernelGP.fit
    monkeypatch.setattr(DeepKernelGP, "fit", broken)
    loop = Loop(make()).run(4)
    failure = loop.origins[-1].failure
    assert failure.endswith("LinAlgError: not positive-definite")
    assert [origin.by for origin in loop.origins] == ["random"] * 4
    monkeypatch.setattr(DeepKernelGP, "fit", good)
    assert [(o.by, o.failure) for o in loop.run(2).origins[-2:]] == [("model", None)] * 2
    monkeypatch.setattr(DeepKernelGP, "fit", broken)
    assert [(o.by, o.failure) for o in loop.run(2).origins[-2:]] == [("last_model", failure)] * 2
    monkeypatch.setattr(DeepKernelGP, "fit", good)
    assert loop.run(1).origins[-1].by == "model"


def test_a_singular_covariance_is_a_failed_fit(monkeypatch):
    monkeypatch.setattr(DeepKernelGP, "covariance", lambda model, a, b: -torch.ones(len(a), len(b)) + 0 * a.sum())
    loop = Loop(make()).run(4)
    assert loop.origins[-1].by == "random"
    assert loop.origins[-1].failure


def test_extreme_values_are_no_failure():
    draw = iter(np.random.default_rng(0).choice([1e308, -1e308, 1e-300, 0.0, 1.0], 40).tolist())
    loop = Loop(make(), value=lambda config, epoch: next(draw)).run(20)
    assert {origin.by for origin in loop.origins[2:]} == {"model"}


def test_beats_random_search():
    """Regret after 60 epochs, 9 epochs a configuration for random search; 3 seeds."""
    best, chance = [], []
    for seed in range(3):
        loop = Loop(make(seed=seed)).run(60)
        best.append(min(loss(loop.trials[k].config, epoch) for k, epoch, _ in loop.log))
        sampler = RandomSampler(SPACE, seed)
        chance.append(min(loss(sampler.suggest(), 9) for _ in range(60 // 9)))
    assert np.mean(best) < 0.7 * np.mean(chance)


def test_a_saved_scheduler_goes_on_as_if_it_had_not_been():
    loop = Loop(make(), workers=2).run(15)
    twin = copy.deepcopy(loop)
    twin.scheduler = dill.loads(dill.dumps(loop.scheduler))
    assert twin.run(15).decisions() == loop.run(15).decisions()


def test_another_process_decides_the_same_and_loads_torch_only_when_needed():
    code = (
        "import sys; from harness.schedulers.dyhpo import DyHPO\n"
        "assert not {'torch', 'gpytorch'} & set(sys.modules)\n"
        "import harness.schedulers.bo.deep_kernel_gp\n"
        "from tests.harness.test_dyhpo import *\n"
        "import harness.schedulers.dyhpo as d; d.FIRST_STEPS, d.WARM_STEPS, d.POOL_SIZE = 20, 2, 128\n"
        "print(Loop(make(), workers=4).run(12).decisions())\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Loop(make(), workers=4).run(12).decisions())
    assert "Warning" not in done.stderr


def test_preset_builds_it():
    preset = yaml.safe_load((ROOT / "conf" / "scheduler" / "dyhpo.yaml").read_text())
    assert preset == {"_target_": "harness.schedulers.DyHPO"}
