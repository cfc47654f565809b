"""BOIL: its model and acquisition function against their formulas, and the scheduler in small simulations."""

import copy
import functools
import heapq
import json
import math
import os
import subprocess
import sys
from dataclasses import astuple, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, ordinal, randint, uniform

from harness.ohgw import OHGW
from harness.schedulers import RandomSampler, RandomSearch
from harness.schedulers.bo.threads import one_thread
from harness.schedulers.boil import BOIL, MAX_POINTS, _key, unit_scale
from harness.seeds import rng

torch = pytest.importorskip("torch")
from harness.schedulers.bo import cost_acquisition, curve_gp  # noqa: E402
from harness.schedulers.bo.curve_gp import BOUNDS, NOISE, CurveGP, FitError, Hyperparameters, Observations  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"a": uniform(0, 1), "b": uniform(0, 1)}
MIXED = {
    "a": uniform(0, 1),
    "n": randint(1, 4),
    "kind": choice(["p", "q", "r"]),
    "size": ordinal([1, 2, 4]),
    "tag": "x",
}
T = 10


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def bowl(config, epoch):
    """A loss with its minimum 0.1 at (0.7, 0.3), approached as training goes on."""
    return 0.1 + (config["a"] - 0.7) ** 2 + (config.get("b", 0.3) - 0.3) ** 2 + math.exp(-epoch / 3)


class Loop:
    """Discrete events: ``workers`` trials train at a time, an epoch takes ``seconds(trial)``."""

    def __init__(self, scheduler, workers=1, curve=bowl, seconds=lambda trial_id: 1.0, failing=(), ends_at=math.inf):
        self.scheduler, self.curve, self.seconds = scheduler, curve, seconds
        self.failing, self.ends_at = set(failing), ends_at
        self.trials, self.epochs, self.decisions, self.origins, self.events = [], [], [], [], []
        self.best, self.spent = math.inf, 0
        for _ in range(workers):
            self.launch(0.0)

    def launch(self, now):
        suggestion = self.scheduler.suggest()
        if suggestion is None:
            return
        assert suggestion.spawn_new_trial_id
        trial = Trial(len(self.trials), dict(suggestion.config), datetime.now())
        self.trials.append(trial)
        self.epochs.append(0)
        self.origins.append(self.scheduler.origin)
        self.scheduler.on_trial_add(trial)
        heapq.heappush(self.events, (now + self.seconds(trial.trial_id), trial.trial_id))

    def run(self, epochs):
        while self.events and self.spent < epochs:
            now, trial_id = heapq.heappop(self.events)
            self.epoch(now, self.trials[trial_id])
        return self

    def epoch(self, now, trial):
        k = trial.trial_id
        self.epochs[k] += 1
        self.spent += 1
        if k in self.failing and self.epochs[k] == 2:
            self.scheduler.on_trial_error(trial)
            return self.launch(now)
        value = self.curve(trial.config, self.epochs[k])
        self.best = min(self.best, value if math.isfinite(value) else math.inf)
        decision = self.scheduler.on_trial_result(trial, self.report(trial, value))
        self.decisions.append((k, self.epochs[k], decision))
        if decision == "STOP":
            self.scheduler.on_trial_remove(trial)
            return self.launch(now)
        assert decision == "CONTINUE"
        if self.epochs[k] >= self.ends_at:
            self.scheduler.on_trial_complete(trial, {})
            return self.launch(now)
        heapq.heappush(self.events, (now + self.seconds(k), k))

    def report(self, trial, value):
        return {"loss": value, "epoch": self.epochs[trial.trial_id]}


def make(space=SPACE, **changes):
    arguments: dict[str, Any] = {"max_t": T, "max_resource_attr": "epochs", "seed": 5} | changes
    return BOIL(space, "loss", **arguments)


@functools.cache
def _trained():
    return Loop(make()).run(60)


def trained():
    """A loop of 60 epochs, for each test its own."""
    return copy.deepcopy(_trained())


def observations(trials=4, dims=2, max_t=12, seed=0):
    """Rising noisy curves in [0, 1], points at several epochs of each."""
    draw = np.random.default_rng(seed)
    curves = np.clip(
        1 - draw.random((trials, 1)) * np.exp(-np.arange(max_t) / 4) + draw.normal(0, 0.01, (1, max_t)), 0, 1
    )
    trial = np.repeat(np.arange(trials), 3)
    epoch = np.tile([max_t, max_t // 2, max_t // 3], trials)
    x = draw.random((trials, dims))[trial]
    inputs = np.concatenate([x, (epoch[:, None] - 1) / (max_t - 1)], axis=1)
    reported = np.ones((trials, max_t), dtype=bool)
    return Observations(*(torch.from_numpy(a) for a in (inputs, curves, reported, trial, epoch)))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def score_by_hand(curve, max_t, midpoint, growth):
    weights = [1 / (1 + math.exp(-growth * (u - midpoint))) for u in np.linspace(-6, 6, max_t)]
    threshold = int((midpoint + 4) * len(curve) / 12)
    return sum(c * w for c, w in list(zip(curve, weights, strict=False))[threshold:]) / (len(curve) - threshold)


# The model


@pytest.mark.parametrize(("midpoint", "growth"), [(-2.0, 0.5), (0.0, 1.0), (1.7, 1.3), (3.0, 2.0)])
def test_score_is_the_published_formula(midpoint, growth):
    data = observations()
    scores = curve_gp.curve_scores(data, double(midpoint), double(growth))
    by_hand = [
        score_by_hand(data.curves[k, :n].tolist(), 12, midpoint, growth)
        for k, n in zip(data.trial.tolist(), data.epoch.tolist(), strict=True)
    ]
    assert scores.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_score_leaves_out_epochs_without_a_report():
    data = observations()
    reported = data.reported.clone()
    reported[:, ::2] = False  # epochs 1, 3, ...; points are at even ones
    data = replace(data, curves=torch.where(reported, torch.ones_like(data.curves), 0.0), reported=reported)
    scores = curve_gp.curve_scores(data, double(-4.0), double(50.0))
    weights = 1 / (1 + np.exp(-50 * (np.linspace(-6, 6, 12) + 4)))
    assert scores[0].item() == pytest.approx(weights[1::2].mean(), rel=1e-12)


@pytest.mark.parametrize("max_t", [1, 2])
def test_score_of_the_shortest_curves(max_t):
    ones = torch.ones(1, max_t).double()
    last = torch.tensor([max_t])
    data = Observations(torch.zeros(1, 2).double(), ones, ones.bool(), torch.tensor([0]), last)
    score = curve_gp.curve_scores(data, *double([0.0, 1.0]))
    assert score.item() == pytest.approx(score_by_hand([1.0] * max_t, max_t, 0.0, 1.0))


def test_kernel_is_the_papers():
    a, b = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.eye(4).double()
    kernel = curve_gp.product_kernel(3, Hyperparameters(l_x=0.07, l_t=0.35))
    squares = (a[:, None] - b[None]).square()
    expected = torch.exp(-squares[..., :3].sum(-1) / 0.07 - squares[..., 3] / 0.35)
    assert torch.allclose(kernel(a, b).to_dense(), expected, rtol=1e-10)


def test_posterior_is_gpytorchs():
    data, hyperparameters = observations(), Hyperparameters(0.2, 0.5, 1.0, 1.5)
    gp = CurveGP.of(data, hyperparameters)
    model = curve_gp.ScoreGP(gp.inputs, gp.targets, hyperparameters).eval()
    points = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad(), curve_gp.gpytorch.settings.fast_computations(False, False, False):
        expected, noisy = model(points), model.likelihood(model(points))
    mean, std = gp.predict(points)
    assert torch.allclose(mean, expected.mean, atol=1e-9)
    assert torch.allclose(gp.mean(points), expected.mean, atol=1e-9)
    assert torch.allclose(std, noisy.stddev, atol=1e-9)
    assert torch.allclose(gp.covariance(points), expected.covariance_matrix, atol=1e-8)


def test_scores_are_standardised_and_equal_ones_are_zeros():
    scores = curve_gp.standardised(double([1.0, 2.0, 3.0]))
    assert (scores.mean().item(), scores.square().mean().item()) == pytest.approx((0.0, 1.0))
    assert curve_gp.standardised(torch.full((4,), 0.3).double()).abs().max() < 1e-3


def test_gradient_of_the_likelihood():
    loss = curve_gp.NegativeLogLikelihood(observations())
    at = np.array([0.1, 0.4, 0.313, 1.1])
    value, gradient = loss.gradient(at)
    assert value == pytest.approx(loss.value(at).item())
    for k in range(4):
        step = 1e-6 * np.eye(4)[k]
        numeric = (loss.value(at + step).item() - loss.value(at - step).item()) / 2e-6
        assert gradient[k] == pytest.approx(numeric, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_have_a_finite_gradient(value):
    data = observations()
    data = replace(data, curves=torch.full_like(data.curves, value), epoch=torch.full_like(data.epoch, 12))
    data = replace(data, inputs=torch.rand(12, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    fitted = curve_gp.fit(data, Hyperparameters(), rng(0, "test"))
    assert all(low <= h <= high for h, (low, high) in zip(astuple(fitted), BOUNDS, strict=True))


def test_a_gradient_that_is_not_finite_ends_the_fit(monkeypatch):
    loss = curve_gp.NegativeLogLikelihood(observations())
    monkeypatch.setattr(curve_gp, "standardised", lambda scores: scores * math.nan)
    with pytest.raises(FitError):
        loss.gradient(np.array([0.1, 0.4, 0.3, 1.1]))


@pytest.mark.parametrize("seed", range(3))
def test_hyperparameters_stay_in_their_bounds_and_get_better(seed):
    data, start = observations(trials=6, seed=seed), Hyperparameters()
    fitted = curve_gp.fit(data, start, rng(seed, "test"))
    assert all(low <= value <= high for value, (low, high) in zip(astuple(fitted), BOUNDS, strict=True))
    loss = curve_gp.NegativeLogLikelihood(data)
    assert loss.value(astuple(fitted)).item() <= loss.value(astuple(start)).item()


def test_points_that_are_not_numbers_are_a_fit_error():
    data = observations()
    broken = replace(data, curves=data.curves * math.nan)
    with pytest.raises(FitError):
        CurveGP.of(broken, Hyperparameters())
    with pytest.raises(FitError):
        curve_gp.fit(broken, Hyperparameters(), rng(0, "test"))


def test_pending_points_keep_the_mean_and_shrink_the_deviation():
    gp = CurveGP.of(observations(), Hyperparameters())
    points = torch.rand(7, 3, generator=torch.Generator().manual_seed(2)).double()
    believed = gp.with_pending(points[:2])
    assert torch.allclose(believed.mean(points), gp.mean(points), atol=1e-8)
    assert (believed.predict(points)[1] <= gp.predict(points)[1] + 1e-9).all()
    assert (believed.predict(points[:2])[1] < 0.05).all()
    assert gp.with_pending(points[:0]) is gp


# Virtual points


def gp_at(*points):
    inputs = double(points)
    return CurveGP(inputs, torch.zeros(len(inputs)).double(), Hyperparameters())


TIMES = torch.linspace(0, 1, 27).double()
X = double([0.5])


def test_virtual_points_are_the_most_uncertain_ones_one_after_the_other():
    gp = gp_at([0.5, 1.0])
    chosen: list[int] = []
    for _ in range(10):
        std = gp.predict(curve_gp._at(X, TIMES))[1]
        k = int(std.argmax())
        if k in (26, *chosen):
            break
        chosen.append(k)
        gp = gp.with_pending(curve_gp._at(X, TIMES[[k]]))
    assert chosen[0] == 0
    assert len(chosen) >= 3
    assert curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES) == sorted(chosen)


@pytest.mark.parametrize("last", range(1, 27))
def test_virtual_points_are_at_most_ten_times_t_and_never_repeat(last):
    times = TIMES[: last + 1]
    chosen = curve_gp.virtual_points(gp_at([0.5, times[-1].item()]), X, times)
    assert len(chosen) <= int(10 * times[-1].item())
    assert len(set(chosen)) == len(chosen)
    assert last not in chosen


def test_virtual_points_stop_where_the_model_is_certain(monkeypatch):
    free = curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES)
    monkeypatch.setattr(curve_gp, "MIN_STD", 0.5)
    assert 0 < len(curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES)) < len(free)
    monkeypatch.setattr(curve_gp, "MIN_STD", 1.0)
    assert curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES) == []


def test_virtual_points_stop_when_the_matrix_is_ill_conditioned(monkeypatch):
    free = curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES)
    monkeypatch.setattr(
        curve_gp, "MAX_LOG_CONDITION", 7.6
    )  # two points far apart have ln cond near 0, the third does it
    some = curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES)
    assert len(some) < len(free)
    monkeypatch.setattr(curve_gp, "MAX_LOG_CONDITION", -1.0)
    assert curve_gp.virtual_points(gp_at([0.5, 1.0]), X, TIMES) == []


def test_condition_number(monkeypatch):
    gp, more = gp_at([0.5, 1.0], [0.5, 0.9]), double([[0.5, 0.95]])
    monkeypatch.setattr(curve_gp, "MAX_LOG_CONDITION", 0.0)  # no bound is good enough
    inputs = torch.cat([gp.inputs, more])
    matrix = curve_gp.product_kernel(1, Hyperparameters())(inputs).to_dense() + NOISE * torch.eye(3)
    assert curve_gp.log_condition(gp, more) == pytest.approx(
        math.log(np.linalg.cond(matrix.detach().numpy())), rel=1e-6
    )
    monkeypatch.undo()
    assert curve_gp.log_condition(gp, more) >= math.log(np.linalg.cond(matrix.detach().numpy()))


# Cost and acquisition


def test_cost_model_is_least_squares():
    draw = np.random.default_rng(0)
    inputs, costs = draw.random((20, 3)), draw.random(20) * 40 + 5
    scaled = (costs - costs.min()) / (costs.max() - costs.min())
    solution = np.linalg.lstsq(np.c_[inputs, np.ones(20)], scaled, rcond=None)[0]
    model = cost_acquisition.CostModel(torch.from_numpy(inputs), torch.from_numpy(costs))
    points = draw.random((5, 3))
    assert model.predict(torch.from_numpy(points)).numpy() == pytest.approx(np.c_[points, np.ones(5)] @ solution)


def test_cost_model_of_few_or_equal_costs_is_finite():
    inputs = double([[0.1, 0.2, 0.0], [0.1, 0.2, 1.0]])
    costs = double([4.0, 10.0])
    assert cost_acquisition.CostModel(inputs, costs).predict(inputs).tolist() == pytest.approx([0.0, 1.0])
    assert cost_acquisition.CostModel(inputs, costs * 0 + 7).predict(inputs).tolist() == [0.0, 0.0]


def test_log_expected_improvement():
    from scipy.stats import norm

    mean, std = torch.linspace(-8, 8, 33).double(), torch.full((33,), 0.7).double()
    z = (mean.numpy() - 0.5) / 0.7
    direct = np.log(0.7 * (norm.pdf(z) + z * norm.cdf(z)))
    ours = cost_acquisition.log_expected_improvement(mean, std, double(0.5))
    assert ours.numpy()[z > -6] == pytest.approx(direct[z > -6], rel=1e-6)
    far = double([-50.0, -2000.0]).requires_grad_(True)
    tail = cost_acquisition.log_expected_improvement(far, torch.ones(2).double(), double(0.0))
    assert tail.tolist() == pytest.approx(
        [-(z**2) / 2 - 0.5 * math.log(2 * math.pi) - 2 * math.log(z) for z in (50, 2000)], rel=1e-3
    )
    tail.sum().backward()
    assert far.grad.tolist() == pytest.approx([50, 2000], rel=1e-2)


def test_acquisition_is_improvement_per_cost():
    from scipy.stats import norm

    data = observations()
    gp, cost = CurveGP.of(data, Hyperparameters()), cost_acquisition.CostModel(data.inputs, data.epoch.double())
    points = torch.rand(8, 3, generator=torch.Generator().manual_seed(3)).double()
    incumbent = double(0.4)
    mean, std = (p.numpy() for p in gp.predict(points))
    z = (mean - 0.4) / std
    improvement = std * (z * norm.cdf(z) + norm.pdf(z))
    expected = np.log(improvement) - np.log(np.maximum(0, cost.predict(points).numpy()) + 0.1)
    assert cost_acquisition.Acquisition(gp, cost, incumbent)(points).numpy() == pytest.approx(expected, rel=1e-6)


def test_ascend_finds_maxima_inside_and_at_the_bounds():
    peak = double([0.3, 1.4])
    ends = cost_acquisition.ascend(lambda p: -(p - peak).square().sum(dim=1), torch.rand(4, 2).double())
    assert ends.numpy() == pytest.approx(np.tile([0.3, 1.0], (4, 1)), abs=1e-4)


def test_scale_of_curves():
    assert unit_scale(np.array([[0.0, 1.0], [0.5, np.nan], [0.2, 0.4]])) == (0.0, 1.0)
    low, high = unit_scale(-np.array([[1e6], [1.0], [0.9], [0.8], [0.7]]))
    assert high == -0.7
    assert -2 < low < -1
    assert unit_scale(np.full((2, 3), np.nan)) == (0.0, 0.0)
    assert unit_scale(np.ones((2, 3))) == (1.0, 1.0)


# The scheduler


def test_first_three_are_random_searchs_to_max_t_and_the_rest_the_models():
    loop = trained()
    sampler = RandomSampler(SPACE, seed=5)
    assert [trial.config for trial in loop.trials[:3]] == [{**sampler.suggest(), "epochs": T} for _ in range(3)]
    assert [origin.by for origin in loop.origins[:3]] == ["random"] * 3
    assert {origin.by for origin in loop.origins[3:]} == {"model"}
    assert all(origin.failure is None for origin in loop.origins)


def test_trials_stop_at_their_milestone_and_no_sooner():
    loop = Loop(make()).run(110)
    for trial in loop.trials[:-1]:
        decisions = [decision for k, _, decision in loop.decisions if k == trial.trial_id]
        assert decisions == ["CONTINUE"] * (trial.config["epochs"] - 1) + ["STOP"]
        assert 4 <= trial.config["epochs"] <= T  # 0.4 max_t
    assert len({trial.config["epochs"] for trial in loop.trials}) > 1


def test_better_than_random_search_at_equal_epochs():
    def final(maker):
        return [Loop(maker(seed=seed, max_t=9)).run(90).best for seed in range(3)]

    boil = final(make)
    random = final(lambda seed, max_t: RandomSearch(SPACE, "loss", max_t=max_t, max_resource_attr="epochs", seed=seed))
    assert np.mean(boil) < np.mean(random)
    assert np.median(boil) - 0.1 - math.exp(-3) < 5e-3  # close to the best there is


def test_max_mirrors_min():
    low = trained()
    high = Loop(make(mode="max"), curve=lambda config, epoch: -bowl(config, epoch)).run(60)
    assert low.decisions == high.decisions
    assert [trial.config for trial in low.trials] == [trial.config for trial in high.trials]


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_any_number_of_workers(workers):
    scheduler = make(max_t=5)
    loop = Loop(scheduler, workers, seconds=lambda k: 1 + (k % 7) / 10).run(20 + 5 * workers)
    assert len(loop.trials) > workers
    assert any(origin.by == "model" for origin in loop.origins)
    assert all(origin.failure is None for origin in loop.origins)
    assert len({json.dumps(trial.config) for trial in loop.trials}) == len(loop.trials)
    assert len(scheduler.running) == workers


def test_pending_evaluations_are_less_worth_repeating():
    loop = trained()
    scheduler = loop.scheduler
    scheduler._update()
    model = scheduler._model
    points = scheduler._inputs([(k, job.milestone) for k, job in scheduler.running.items()])
    alone = cost_acquisition.Acquisition(model.gp, model.cost, model.incumbent)(points)
    believed = cost_acquisition.Acquisition(model.gp.with_pending(points), model.cost, model.incumbent)(points)
    assert (believed < alone).all()
    for _ in range(4):
        loop.launch(1000.0)
    x = scheduler.encoder.encode_all(scheduler.configs[k] for k in scheduler.running)
    assert len(np.unique(x, axis=0)) == 5
    assert x.std(axis=0).max() > 0.05


def test_model_is_fitted_once_for_workers_that_are_free_together(monkeypatch):
    loop = trained()
    scheduler = loop.scheduler
    scheduler._update()
    monkeypatch.setattr(scheduler, "_fit", lambda: pytest.fail("nothing is new"))
    loop.launch(1000.0)


def test_failed_and_diverged_trials_are_avoided():
    """The region a > 0.6, which holds the minimum, always fails: the best left is at 0.6."""

    def curve(config, epoch):
        return math.nan if config["a"] > 0.6 else bowl(config, epoch)

    scheduler = make()
    loop = Loop(scheduler, curve=curve, failing={1}).run(110)
    assert all(origin.failure is None for origin in loop.origins)
    scheduler._update()
    bad = [trial_id for trial_id in scheduler._ended if not scheduler._has_score(trial_id)]
    near = scheduler._inputs([(trial_id, T) for trial_id in bad])
    assert len(bad) > 2
    assert (scheduler._model.gp.mean(near) < scheduler._model.incumbent - 0.5).all()
    assert loop.best < 0.1 + 0.01 + math.exp(-T / 3) + 0.02


def test_failed_trials_score_least_and_get_no_virtual_points():
    scheduler = make()
    Loop(scheduler, failing={1, 4}).run(60)
    scheduler._update()
    scheduler._fit()
    data = scheduler._observations()
    scores = curve_gp.curve_scores(data, *double([0.0, 1.0]))
    rows = [row for row, trial_id in enumerate(reversed(scheduler._ended)) if trial_id in scheduler.failed]
    assert len(rows) == 2
    for row in rows:
        assert scores[data.trial == row].tolist() == [0.0]
    assert not {1, 4} & set(scheduler._virtual)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_all_trials_diverge(value):
    loop = Loop(make(), curve=lambda config, epoch: value).run(80)
    assert {origin.by for origin in loop.origins} == {"random"}
    assert len(loop.trials) == 8 + 1


def test_equal_values_everywhere():
    loop = Loop(make(), curve=lambda config, epoch: 1.0).run(80)
    assert all(origin.failure is None for origin in loop.origins)


def test_only_diverged_and_hopeless_trials_at_first():
    """Until the fifth trial all curves lie at the lower end of the scale, or fail."""
    seen: list[float] = []

    def curve(config, epoch):
        seen.append(config["a"])
        return bowl(config, epoch) if len(set(seen)) > 5 else (math.nan if len(set(seen)) % 2 else 1e9 + epoch)

    loop = Loop(make(), curve=curve).run(110)
    assert all(origin.failure is None for origin in loop.origins)


def test_enormous_values_do_not_hide_the_others():
    def curve(config, epoch):
        return 1e30 if config["a"] < 0.3 else bowl(config, epoch)

    loop = Loop(make(), curve=curve).run(100)
    assert loop.best < 0.1 + math.exp(-10 / 3) + 2e-2


@pytest.mark.parametrize("ends_at", [1, 6])
def test_trials_that_complete_early_count_as_far_as_they_came(ends_at):
    scheduler = make()
    loop = Loop(scheduler, ends_at=ends_at).run(12 * ends_at)
    scheduler._fit()
    assert scheduler._observations().epoch.max() == ends_at
    assert any(origin.by == "model" for origin in loop.origins)
    assert all(origin.failure is None for origin in loop.origins)


def test_a_trial_that_completes_without_a_report_scores_least():
    loop = trained()
    scheduler = loop.scheduler
    scheduler.on_trial_complete(loop.trials[-1], {})
    k = loop.trials[-1].trial_id
    if k in scheduler.curves:
        del scheduler.curves[k]
    loop.launch(1000.0)
    assert loop.origins[-1].failure is None


def test_reports_with_gaps_are_scored():
    class Gaps(Loop):
        def epoch(self, now, trial):
            self.epochs[trial.trial_id] += 1
            super().epoch(now, trial)

    loop = Gaps(make(max_t=20)).run(60)
    assert len(loop.trials) > 4
    assert all(origin.failure is None for origin in loop.origins)


def test_reports_beyond_max_t_are_left_out():
    class Steps(Loop):
        def epoch(self, now, trial):
            self.epochs[trial.trial_id] += 3  # 4, 8, 12
            super().epoch(now, trial)

    loop = Steps(make()).run(30)
    assert {origin.by for origin in loop.origins} == {"random", "model"}
    assert all(origin.failure is None for origin in loop.origins)
    assert loop.scheduler._observations().epoch.max() == 8


def test_integers_and_categoricals():
    def curve(config, epoch):
        return (config["a"] - 0.5) ** 2 + 0.2 * abs(config["n"] - 2) + 0.3 * (config["kind"] != "q") + 1 / epoch

    scheduler = make(MIXED)
    loop = Loop(scheduler, curve=curve).run(120)
    for trial in loop.trials:
        config = trial.config
        assert config["n"] in (1, 2, 3, 4)
        assert config["kind"] in ("p", "q", "r")
        assert config["size"] in (1, 2, 4)
        assert config["tag"] == "x"
    late = [trial.config for trial in loop.trials[len(loop.trials) // 2 :]]
    assert np.mean([config["kind"] == "q" for config in late]) > 0.5


def test_rounded_points_enter_the_model():
    scheduler = make(MIXED)
    Loop(scheduler).run(60)
    scheduler._update()
    known = {row.tobytes() for row in scheduler.encoder.encode_all(scheduler.configs.values())}
    assert {row.tobytes() for row in scheduler._model.gp.inputs[:, :-1].contiguous().numpy()} <= known


def test_a_configuration_is_suggested_again_only_to_train_further():
    scheduler = make({"n": randint(1, 5), "kind": choice(["p", "q"])})
    loop = Loop(scheduler, curve=lambda config, epoch: config["n"] / epoch).run(60)
    most: dict[tuple[int, str], int] = {}
    for trial, origin in zip(loop.trials, loop.origins, strict=True):
        key = (trial.config["n"], trial.config["kind"])
        if origin.by == "model" and len(most) < 10:
            assert trial.config["epochs"] > most.get(key, 0)
        most[key] = max(trial.config["epochs"], most.get(key, 0))


def test_a_small_space_never_runs_dry():
    loop = Loop(make({"kind": choice(["p", "q"])}), curve=lambda config, epoch: 1 / epoch).run(100)
    assert loop.spent == 100


@pytest.mark.parametrize("max_t", [1, 2])
def test_shortest_trainings(max_t):
    loop = Loop(make(max_t=max_t)).run(12)
    assert any(origin.by == "model" for origin in loop.origins)
    assert all(origin.failure is None for origin in loop.origins)


def table(size=40):
    draw = np.random.default_rng(0)
    return [{"a": float(a), "b": float(b)} for a, b in draw.random((size, 2))]


def test_candidates_are_used_once_each_and_then_scheduling_ends():
    rows = table(15)
    loop = Loop(make(candidates=rows), workers=2).run(10_000)
    used = [{"a": trial.config["a"], "b": trial.config["b"]} for trial in loop.trials]
    assert sorted(used, key=str) == sorted(rows, key=str)
    assert loop.scheduler.suggest() is None


def test_candidates_are_chosen_by_the_model():
    rows = table(200)
    loop = Loop(make(candidates=rows)).run(130)
    best = sorted(bowl(row, T) for row in rows)
    assert loop.best <= best[2]
    assert sum(origin.by == "model" for origin in loop.origins) > 10


def test_more_candidates_than_are_scored(monkeypatch):
    scheduler = make(candidates=table(700))
    assert len(scheduler._candidate_points(scheduler._table)[1]) < 700
    assert Loop(scheduler).run(60).origins[-1].by == "model"


def test_under_a_warm_start_the_model_sees_x_prime():
    class Warm(Loop):
        def report(self, trial, value):
            record = {"x": dict(trial.config), "x_prime": {"a": trial.config["a"] * 0.9}}
            return super().report(trial, value) | ({"warm_start": record} if self.epochs[trial.trial_id] == 1 else {})

    scheduler = make()
    loop = Warm(OHGW(scheduler)).run(70)
    scheduler._update()
    seen = {round(a, 9) for a in scheduler._model.gp.inputs[:, 0].tolist()}
    assert seen == {round(loop.trials[k].config["a"] * 0.9, 9) for k in scheduler._ended}
    known = scheduler._known()
    for k in scheduler._ended:
        assert _key(scheduler.encoder.encode(loop.trials[k].config)) in known
        assert _key(scheduler.encoder.encode(scheduler.configs[k])) in known


def test_scores_are_computed_anew_when_the_sigmoid_changes():
    scheduler = trained().scheduler
    scheduler._update()
    hyperparameters = scheduler._model.gp.hyperparameters
    data = scheduler._observations()
    expected = curve_gp.curve_scores(data, *double([hyperparameters.midpoint, hyperparameters.growth]))
    assert hyperparameters != Hyperparameters()
    assert torch.equal(scheduler._model.gp.targets, curve_gp.standardised(expected))
    other = replace(hyperparameters, midpoint=hyperparameters.midpoint / 2 + 1, growth=0.7)
    assert not torch.allclose(CurveGP.of(data, other).targets, scheduler._model.gp.targets)


def test_virtual_points_are_reports_between_the_shortest_training_and_the_last_epoch():
    scheduler = trained().scheduler
    scheduler._update()
    assert sum(len(epochs) for epochs in scheduler._virtual.values()) > 5
    for trial_id, epochs in scheduler._virtual.items():
        last = max(scheduler.curves[trial_id])
        assert all(scheduler.min_t <= epoch < last for epoch in epochs)
        assert len(epochs) <= 10 * (last - scheduler.min_t) / (T - scheduler.min_t)


def test_number_of_points_is_bounded_and_virtual_ones_go_first(monkeypatch):
    monkeypatch.setattr("harness.schedulers.boil.MAX_POINTS", 20)
    scheduler = make()
    loop = Loop(scheduler).run(130)
    scheduler._update()
    points = scheduler._points(list(scheduler._ended))
    assert len(points) == len(scheduler._model.gp.inputs) == 20
    assert {trial_id for trial_id, _ in points} == set(list(scheduler._ended)[-20:])
    assert all(origin.failure is None for origin in loop.origins)
    assert MAX_POINTS == 500


# Failures of the model


def broken(*args, **kwargs):
    raise torch.linalg.LinAlgError("singular")


def test_random_when_the_first_fit_fails(monkeypatch):
    monkeypatch.setattr(curve_gp, "fit", broken)
    loop = Loop(make()).run(45)
    assert [origin.by for origin in loop.origins] == ["random"] * len(loop.origins)
    assert all("singular" in origin.failure for origin in loop.origins[3:])


def test_last_good_model_when_a_later_fit_fails(monkeypatch):
    loop = trained()
    monkeypatch.setattr(curve_gp, "CurveGP", broken)
    loop.run(80)
    assert loop.origins[-1].by == "last_model"
    assert loop.origins[-1].failure.endswith("singular")
    monkeypatch.undo()
    loop.run(100)
    assert loop.origins[-1].by == "model"
    assert loop.origins[-1].failure is None


@pytest.mark.parametrize("name", ["ascend", "evaluate"])
def test_random_when_the_acquisition_function_fails(monkeypatch, name):
    loop = trained()
    monkeypatch.setattr(cost_acquisition, name, broken)
    loop.scheduler._update()
    loop.launch(1000.0)
    assert loop.origins[-1].by in ("random", "last_model")
    assert loop.origins[-1].failure is not None


def test_values_that_are_not_finite_are_no_suggestion(monkeypatch):
    loop = trained()
    monkeypatch.setattr(CurveGP, "predict", lambda self, points: (points[:, 0] * math.nan, points[:, 0]))
    loop.launch(1000.0)
    assert loop.origins[-1].by == "random"
    assert "finite" in loop.origins[-1].failure


# Reproducibility and arguments


def fingerprint():
    loop = Loop(make(MIXED), workers=2, curve=lambda config, epoch: config["a"] + 1 / epoch).run(60)
    return json.dumps([loop.decisions, [sorted(trial.config.items()) for trial in loop.trials]])


def test_same_decisions_in_every_process_and_with_any_number_of_threads():
    env = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    env |= {"OPENBLAS_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    code = "from tests.harness.test_boil import fingerprint; print(fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint()
    assert len(done.stdout) > 500


def test_global_random_states_do_not_matter():
    first = trained()
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    second = Loop(make()).run(60)
    assert [t.config for t in first.trials] == [t.config for t in second.trials]


def test_seeds_differ():
    assert trained().trials[-1].config != Loop(make(seed=6)).run(40).trials[-1].config


def test_a_saved_scheduler_goes_on_as_if_it_had_not_been():
    import dill

    loop = trained()
    saved = dill.loads(dill.dumps(loop.scheduler))
    assert saved.suggest().config == loop.scheduler.suggest().config


def test_importing_the_scheduler_loads_no_torch():
    code = "import sys, harness.schedulers.boil; print('torch' in sys.modules, 'gpytorch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_arguments():
    for changes, message in (({"mode": "up"}, "mode"), ({"max_t": 0}, "max_t"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=message):
            make(**changes)
    preset = yaml.safe_load((ROOT / "conf" / "scheduler" / "boil.yaml").read_text())
    assert preset == {"_target_": "harness.schedulers.BOIL"}
    assert json.loads(json.dumps(make().metadata()))["scheduler_name"] == "BOIL"
