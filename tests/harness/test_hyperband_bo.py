"""Hyperband-BO: its Gaussian process against GPyTorch and closed forms, its decisions in an event loop."""

import math
import os
import subprocess
import sys
import warnings
from datetime import datetime

import dill
import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, randint

from harness.ohgw import OHGW
from harness.schedulers import Origin, RandomSampler, RandomSearch
from harness.schedulers.bo import resource_gp as gp
from harness.schedulers.bo.supply import SpaceSupply, TableSupply
from harness.schedulers.hyperband_bo import HyperbandBO, furthest, targets
from harness.seeds import rng
from tests.harness.test_bohb import MIXED, OPTIMUM, ROOT, SQUARE, Loop, bowl, mixed


def make(space=SQUARE, maker=HyperbandBO, **changes):
    return maker(space, "loss", **{"max_t": 9, "seed": 1} | changes)


def record(monkeypatch, owner, name):
    """The arguments of all calls of a function from now on."""
    calls, original = [], getattr(owner, name)

    def recorded(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, recorded)
    return calls


def sample_data(n=40, dims=2, seed=0):
    """Inputs and targets of a fit: levels 1, 3, 9 of 9."""
    stream = np.random.default_rng(seed)
    x, r = stream.random((n, dims)), stream.choice([1, 3, 9], size=n)
    y = np.sin(4 * x.sum(axis=1)) + np.exp(-r / 3) + 0.05 * stream.standard_normal(n)
    return np.column_stack([x, (r - 0.5) / 9]), (y - y.mean()) / y.std()


# The process


def test_posterior_equals_gpytorchs():
    inputs, targets = sample_data()
    hyperparameters = gp.fit(inputs, targets)
    new = sample_data(15, seed=1)[0]
    means, deviations = gp.Posterior.of(inputs, targets, hyperparameters).predict(new)
    model = gp.CurveGP(torch.as_tensor(inputs), torch.as_tensor(targets))
    model.load(hyperparameters)
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(torch.as_tensor(new))
        assert np.allclose(means[:, 0], expected.mean, atol=1e-8)
        assert np.allclose(deviations**2, expected.variance, atol=1e-8)


def test_resource_kernel_is_the_expectation_over_decay_rates():
    kernel = gp.DecayKernel()
    alpha, beta, spread = 1.7, 0.4, 0.6
    with torch.no_grad():
        kernel.log_alpha_beta_spread.copy_(torch.tensor([alpha, beta, spread]).log())
        r = torch.tensor([[0.05], [0.3], [0.3], [0.95]], dtype=torch.float64)
        matrix = kernel(r, r).to_dense().numpy()
        diagonal = kernel(r, r, diag=True).numpy()
    rates = stats.gamma(alpha, scale=1 / beta)
    for i, j in np.ndindex(4, 4):
        decay = rates.expect(lambda rate, t=float(r[i, 0] + r[j, 0]): math.exp(-rate * t))
        assert matrix[i, j] == pytest.approx(1 + spread * decay, abs=1e-6)
    assert np.allclose(np.diag(matrix), diagonal)


def test_fit_finds_the_hyperparameters_of_its_own_samples():
    """A fit explains data better than the start does, and its noise is near the true one."""
    inputs, _ = sample_data(120, seed=3)
    x = torch.as_tensor(inputs)
    truth = gp.CurveGP(x, torch.zeros(len(x), dtype=torch.float64))
    truth.likelihood.noise = 0.02
    with torch.no_grad():
        covariance = truth.covar_module(x, x).to_dense() + 0.02 * torch.eye(len(x))
        factor = torch.linalg.cholesky(covariance).numpy()
    targets = factor @ np.random.default_rng(0).standard_normal(len(x))
    fitted = gp.CurveGP(x, torch.as_tensor(targets))
    fitted.load(gp.fit(inputs, targets))
    assert 0.005 < fitted.likelihood.noise.item() < 0.08


def test_noise_has_a_floor():
    inputs, _ = sample_data(60)
    targets = inputs[:, 0] - inputs[:, 0].mean()
    model = gp.CurveGP(torch.as_tensor(inputs), torch.as_tensor(targets))
    model.load(gp.fit(inputs, targets / targets.std()))
    assert model.likelihood.noise.item() >= gp.NOISE_FLOOR


def test_expected_improvement_is_that_of_samples_and_the_closed_form():
    means, deviations = torch.tensor([[0.2, -0.1], [1.5, 1.0]]), torch.tensor([0.5, 1.2])
    incumbents = torch.tensor([0.1, 0.0])
    values = gp.expected_improvement(means, deviations, incumbents).numpy()
    normals = np.random.default_rng(0).standard_normal(400_000)
    for i, value in enumerate(values):
        gains = [
            np.maximum(incumbents[f].item() - (means[i, f].item() + deviations[i].item() * normals), 0) for f in (0, 1)
        ]
        assert value == pytest.approx(np.mean(gains), rel=0.02)
        u = (incumbents - means[i]).numpy() / deviations[i].item()
        closed = deviations[i].item() * (u * stats.norm.cdf(u) + stats.norm.pdf(u))
        assert value == pytest.approx(closed.mean(), rel=1e-5)


def test_pending_points_are_fantasised_jointly():
    """A fantasy is the posterior given a drawn value: same variance for all of them, means that differ."""
    inputs, targets = sample_data()
    hyperparameters = gp.fit(inputs, targets)
    posterior = gp.Posterior.of(inputs, targets, hyperparameters)
    pending = np.array([[0.2, 0.2, 0.9], [0.25, 0.2, 0.9]])
    new = sample_data(10, seed=2)[0]
    fantasised = posterior.with_pending(pending, np.random.default_rng(0).standard_normal((2, 20_000)))
    means, deviations = fantasised.predict(new)
    plain_means, plain_deviations = posterior.predict(new)
    assert means.shape == (10, 20_000)
    # The law of total expectation and of total variance.
    assert np.allclose(means.mean(dim=1), plain_means[:, 0], atol=0.02)
    assert np.allclose(means.var(dim=1) + deviations**2, plain_deviations**2, rtol=0.05, atol=1e-4)
    # The variance is that of any values observed there.
    conditioned = gp.Posterior.of(np.vstack([inputs, pending]), np.append(targets, [0.0, 1.0]), hyperparameters)
    assert np.allclose(conditioned.predict(new)[1], deviations, atol=1e-6)


def test_fantasies_lower_the_expected_improvement_near_pending_points():
    inputs, targets = sample_data()
    posterior = gp.Posterior.of(inputs, targets, gp.fit(inputs, targets))
    grid = np.array([[x, y, 8.5 / 9] for x in np.linspace(0, 1, 21) for y in np.linspace(0, 1, 21)])
    incumbents = posterior.predict(inputs)[0].amin(dim=0)
    before = gp.expected_improvement(*posterior.predict(grid), incumbents).numpy()
    best = grid[[np.argmax(before)]]
    fantasised = posterior.with_pending(best, np.random.default_rng(0).standard_normal((1, 20)))
    incumbents = fantasised.predict(np.vstack([inputs, best]))[0].amin(dim=0)
    after = gp.expected_improvement(*fantasised.predict(grid), incumbents).numpy()
    near = np.linalg.norm(grid - best, axis=1) < 0.1
    assert after[near].max() < 0.5 * before[near].max()


# Decisions


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.parametrize(("space", "curve"), [(SQUARE, bowl), (MIXED, mixed)], ids=["square", "mixed"])
def test_any_number_of_workers(workers, space, curve):
    starts = 80 if workers == 64 else 24
    loop = Loop(make(space), curve, workers).run(starts)
    assert len(loop.trials) == starts
    assert {origin.by for origin in loop.origins} == {"random", "model"}
    assert all(origin.failure is None for origin in loop.origins)
    assert all(origin.by == "random" for origin in loop.origins[:6])
    encoded = loop.scheduler.searcher._supply.encoder.encode_all(loop.configs)
    assert encoded.min() >= 0
    assert encoded.max() <= 1


def test_the_first_six_configurations_are_those_of_random_search():
    sampler = RandomSampler(SQUARE, seed=1)
    loop = Loop(make(), bowl).run(12)
    assert loop.configs[:6] == [sampler.suggest() for _ in range(6)]
    assert Origin("random") not in loop.origins[9:]


def test_finds_better_configurations_than_random_search():
    """At equal numbers of started trials, judged by the noise-free value at the end of training."""

    def best(maker, seed):
        loop = Loop(make(maker=maker, seed=seed), bowl).run(30)
        return min(bowl(config, 9) for config in loop.configs) - OPTIMUM

    modelled, random = ([best(maker, seed) for seed in range(3)] for maker in (HyperbandBO, RandomSearch))
    assert np.mean(modelled) < 0.5 * np.mean(random)


def test_max_mirrors_min():
    low = Loop(make(), bowl).run(20)
    high = Loop(make(mode="max"), lambda config, epoch: -bowl(config, epoch)).run(20)
    assert low.configs == high.configs


def test_discrete_spaces_are_not_suggested_twice_until_they_are_used_up():
    space = {"depth": randint(1, 4), "kind": choice(["a", "b", "c"])}
    loop = Loop(make(space), lambda config, epoch: config["depth"] + 1 / epoch, 1).run(20)
    seen = [tuple(config.values()) for config in loop.configs]
    modelled = [k for k, origin in enumerate(loop.origins) if origin.by == "model"]
    assert modelled
    assert all(seen[k] not in seen[:k] for k in modelled)
    assert len(loop.trials) == 20  # more than there are configurations: random ones go on


def test_candidates_are_used_once_and_then_there_are_none():
    sampler = RandomSampler(MIXED, seed=5)
    rows = [{**sampler.suggest(), "row": k} for k in range(30)]
    loop = Loop(make(MIXED, candidates=rows), mixed).run(100)
    assert loop.dry
    assert sorted(config["row"] for config in loop.configs) == list(range(30))
    assert "model" in {origin.by for origin in loop.origins}
    order = rng(1, "candidates").permutation(30).tolist()
    assert [config["row"] for config in loop.configs[:6]] == order[:6]


def test_failed_and_diverged_trials_are_learned_from():
    """The half of the square where training crashes or diverges is avoided."""

    def curve(config, epoch):
        if config["x"] > 0.5:
            return None if config["y"] > 0.5 else math.nan
        return bowl(config, epoch)

    loop = Loop(make(), curve).run(40)
    bad = [config["x"] > 0.5 for config in loop.configs]
    assert sum(bad[:10]) >= 3
    assert sum(bad[20:]) <= 4


@pytest.mark.parametrize("value", [None, math.nan, 1.0])
def test_nothing_but_failures_or_constants_is_no_reason_to_stop(value):
    loop = Loop(make(), lambda config, epoch: value).run(16)
    assert len(loop.trials) == 16


@pytest.mark.parametrize("end", ["on_trial_error", "on_trial_complete"])
def test_an_ended_trial_leaves_only_its_own_pending_evaluation(end, monkeypatch):
    loop = Loop(make(), bowl).run(20)
    running = sorted(loop.scheduler.running)
    assert len(running) >= 3
    ended = loop.trials[running[0]]
    loop.scheduler.on_trial_error(ended) if end == "on_trial_error" else loop.scheduler.on_trial_complete(ended, {})
    seen = record(monkeypatch, gp.Posterior, "with_pending")
    loop.scheduler.searcher.suggest()
    encoder = loop.scheduler.searcher._supply.encoder
    expected = encoder.encode_all(loop.trials[k].config for k in running[1:])
    assert np.array_equal(seen[0][1][:, :2], expected)


def test_warm_started_configurations_are_the_features(monkeypatch):
    """With OHGW around the scheduler the process sees x from the start of a trial, and x' from its first report."""

    def report(scheduler, trial, epoch):
        moved = {"x": trial.config["x"] / 2}
        record = {"warm_start": {"x": {"x": trial.config["x"]}, "x_prime": moved}} if epoch == 1 else {}
        return scheduler.on_trial_result(trial, {"loss": bowl(trial.config, epoch), "epoch": epoch, **record})

    scheduler, fits = OHGW(make()), record(monkeypatch, gp, "fit")
    trials: list[Trial] = []
    for _ in range(9):  # the first rung of the first bracket
        suggestion = scheduler.suggest()
        assert suggestion is not None
        assert suggestion.config is not None
        trials.append(Trial(len(trials), dict(suggestion.config), datetime.now()))
        scheduler.on_trial_add(trials[-1])
        report(scheduler, trials[-1], 1)
        scheduler.on_trial_remove(trials[-1])
    scheduler.scheduler.searcher.suggest()
    encoder = scheduler.scheduler.searcher._supply.encoder
    expected = encoder.encode_all({**t.config, "x": t.config["x"] / 2} for t in trials)
    assert np.array_equal(fits[-1][0][:, :2], expected)
    assert np.array_equal(fits[-1][0][:, 2], np.full(9, 0.5 / 9))


def test_decisions_do_not_depend_on_process_hash_seed_or_threads():
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.harness.test_hyperband_bo import *\n"
        "print([sorted(c.items()) for c in Loop(make(MIXED), mixed).run(16).configs])\n"
        "assert torch.get_num_threads() == 2\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
    here = Loop(make(MIXED), mixed).run(16).configs
    assert done.stdout.strip() == str([sorted(config.items()) for config in here])


def test_a_saved_scheduler_goes_on_as_if_it_had_not_been():
    loop = Loop(make(), bowl).run(15)
    copy = dill.loads(dill.dumps(loop))
    assert copy.run(22).configs == loop.run(22).configs


def test_importing_the_scheduler_imports_no_torch():
    code = "import sys, harness.schedulers.hyperband_bo, harness.schedulers.bohb; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Fits that fail


def failing(*args):
    raise torch.linalg.LinAlgError("singular")


def test_a_failed_first_fit_means_random_configurations(monkeypatch):
    monkeypatch.setattr(gp, "fit", failing)
    sampler = RandomSampler(SQUARE, seed=1)
    loop = Loop(make(), bowl).run(14)
    assert loop.configs == [sampler.suggest() for _ in range(14)]
    assert loop.origins[-1] == Origin("random", "_LinAlgError: singular")


@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_after_a_failed_fit_the_hyperparameters_before_are_used(monkeypatch, fails):
    loop = Loop(make(), bowl).run(14)
    assert loop.origins[-1] == Origin("model")
    monkeypatch.setattr(gp, "fit", failing if fails == "raises" else lambda x, y, start: np.full_like(start, np.nan))
    loop.run(18)
    assert loop.origins[-1].by == "last_model"
    assert loop.origins[-1].failure == {
        "raises": "_LinAlgError: singular", "nan": "NoFit: a covariance matrix is not positive definite"
    }[fails]  # fmt: skip
    monkeypatch.undo()
    assert loop.run(22).origins[-1] == Origin("model")


def test_a_failure_after_the_fit_means_a_random_configuration(monkeypatch):
    loop = Loop(make(), bowl).run(14)
    monkeypatch.setattr(gp.Posterior, "predict", failing)
    assert loop.run(16).origins[-1] == Origin("random", "_LinAlgError: singular")


def test_singular_covariances_and_nan_targets_are_failures_of_the_fit():
    inputs, outputs = sample_data()
    good = gp.fit(inputs, outputs)
    for x, y in ((np.full_like(inputs, np.nan), outputs), (inputs, np.full_like(outputs, np.nan))):
        with pytest.raises(gp.FAILURES):
            gp.Posterior.of(x, y, good)
        with pytest.raises(gp.FAILURES):
            gp.fit(x, y)


# Data


def test_the_space_supply_rounds_to_configurations():
    supply = SpaceSupply(MIXED | {"only": choice(["one"])}, seed=0)
    points, tickets = supply.near(rng(0, "points").random((200, supply.encoder.dims)), np.zeros((0, 8)))
    assert np.allclose(points, supply.encoder.encode_all(supply.give(ticket) for ticket in tickets), atol=1e-9)


def test_fit_is_kept_while_the_data_are_the_same(monkeypatch):
    fits = record(monkeypatch, gp, "fit")
    loop = Loop(make(), bowl, 8).run(20)
    before = len(fits)
    for _ in range(3):
        loop.scheduler.searcher.suggest()
    assert len(fits) <= before + 1


def test_targets_are_normal_scores_of_ranks():
    scores = targets([3.0, 1.0, math.inf, 2.0, math.inf])
    assert np.allclose(scores, stats.norm.ppf([0.5, 0.1, 0.8, 0.3, 0.8]))


def test_of_too_many_observations_those_of_the_furthest_trials_are_kept():
    values = {(k, level): float(k) for k in range(9) for level in ((1, 3, 9) if k in (2, 7) else (1,))}
    assert list(furthest(values, 7)) == [(0, 1), (2, 1), (2, 3), (2, 9), (7, 1), (7, 3), (7, 9)]
    assert furthest(values, 100) == values


def test_the_table_supply_gives_the_nearest_unused_row():
    rows = [{"x": x, "y": 0.5} for x in (0.1, 0.2, 0.9)]
    supply = TableSupply(SQUARE, rows, seed=0)
    assert supply.near(np.array([[0.12, 0.5]]), np.zeros((0, 2)))[1] == [0]
    assert supply.give(0) == rows[0]
    assert supply.near(np.array([[0.12, 0.5], [0.15, 0.5]]), np.zeros((0, 2)))[1] == [1]


def test_the_space_supply_leaves_out_what_was_given_and_what_became_of_it():
    supply = SpaceSupply({"depth": randint(1, 4)}, seed=0)
    given = supply.random()["depth"]
    moved = 1 + given % 4
    points, tickets = supply.near(np.linspace(0, 1, 9)[:, None], supply.encoder.encode_all([{"depth": moved}]))
    assert {supply.give(ticket)["depth"] for ticket in tickets} == {1, 2, 3, 4} - {given, moved}
    assert len(points) == len(tickets)


def test_preset_builds_the_scheduler():
    preset = yaml.safe_load((ROOT / "conf" / "scheduler" / "hyperband_bo.yaml").read_text())
    assert preset.pop("_target_") == "harness.schedulers.HyperbandBO"
    assert make(max_resource_attr="epochs", **preset).suggest().config["epochs"] == 1
