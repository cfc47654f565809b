"""BOHB: its densities against direct computations, its choices in an event loop."""

import heapq
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
from scipy import integrate, stats
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, lograndint, loguniform, ordinal, randint, uniform

from harness.schedulers import Origin, RandomSampler, RandomSearch
from harness.schedulers.bo.density import Coordinates, KernelDensity
from harness.schedulers.bo.encoding import Encoder
from harness.schedulers.bo.rung_values import rung_values
from harness.schedulers.bohb import BOHB
from harness.space import Space

ROOT = Path(__file__).resolve().parents[2]
SQUARE = {"x": uniform(0, 1), "y": uniform(0, 1)}
MIXED = {
    "lr": loguniform(1e-4, 1),
    "depth": randint(1, 4),
    "width": lograndint(8, 512),
    "kind": choice(["a", "b", "c"]),
    "batch": ordinal([16, 32, 64], kind="equal"),
    "tag": "constant",
}


def bowl(config, epoch):
    """Lowest at (0.3, 0.7), learned at a rate that depends on x."""
    return (config["x"] - 0.3) ** 2 + (config["y"] - 0.7) ** 2 + 0.5 * math.exp(-(0.3 + config["x"]) * epoch)


OPTIMUM = min(bowl({"x": x, "y": 0.7}, 9) for x in np.linspace(0, 1, 1001))


def mixed(config, epoch):
    offset = {"a": 0.0, "b": 0.5, "c": 1.0}[config["kind"]] + abs(config["depth"] - 2) + config["batch"] / 64
    return offset + (math.log10(config["lr"]) + 2) ** 2 / 4 + 1 / epoch


class Loop:
    """Workers that take one unit of time for an epoch; trials report in the order of their ids."""

    def __init__(self, scheduler, curve, workers=4):
        self.scheduler, self.curve, self.workers = scheduler, curve, workers
        self.trials, self.epochs, self.queue, self.origins, self.time = [], [], [], [], 0
        self.dry = False

    def run(self, starts):
        """Until so many trials have started, or the scheduler has nothing left and all trials have ended."""
        while True:
            while len(self.queue) < self.workers and not self.dry:
                if len(self.trials) == starts:
                    return self
                self._suggest()
            if not self.queue:
                return self
            self._report()

    def _suggest(self):
        suggestion = self.scheduler.suggest()
        if suggestion is None:
            self.dry = True
            return
        trial_id = suggestion.checkpoint_trial_id
        if suggestion.spawn_new_trial_id:
            trial_id = len(self.trials)
            self.origins.append(self.scheduler.origin)
            self.trials.append(Trial(trial_id, dict(suggestion.config), datetime.now()))
            self.epochs.append(0)
            self.scheduler.on_trial_add(self.trials[trial_id])
        heapq.heappush(self.queue, (self.time + 1, trial_id))

    def _report(self):
        self.time, trial_id = heapq.heappop(self.queue)
        self.epochs[trial_id] += 1
        trial, epoch = self.trials[trial_id], self.epochs[trial_id]
        value = self.curve(trial.config, epoch)
        if value is None:
            self.scheduler.on_trial_error(trial)
        elif self.scheduler.on_trial_result(trial, {"loss": value, "epoch": epoch}) == "CONTINUE":
            heapq.heappush(self.queue, (self.time + 1, trial_id))
        else:
            self.scheduler.on_trial_remove(trial)

    @property
    def configs(self):
        return [trial.config for trial in self.trials]


def make(space=SQUARE, maker=BOHB, **changes):
    return maker(space, "loss", **{"max_t": 9, "seed": 1} | changes)


# Densities


def test_continuous_density_is_the_mean_of_normals():
    data = np.random.default_rng(0).random((12, 2))
    density = KernelDensity(data, [0, 0])
    bandwidths = 1.06 * data.std(axis=0) * 12 ** (-1 / 6)
    rows = np.random.default_rng(1).random((5, 2))
    expected = [np.mean([np.prod(stats.norm.pdf(row, centre, bandwidths)) for centre in data]) for row in rows]
    assert np.allclose(density.bandwidths, bandwidths)
    assert np.allclose(density.density(rows), expected)


def test_density_integrates_to_one():
    density = KernelDensity(np.array([[0.2, 0], [0.3, 0], [0.7, 2], [0.4, 0]]), [0, 3])
    total = sum(
        integrate.quad(lambda x, c=c: density.density(np.array([[x, c]]))[0], -3, 4, limit=200)[0] for c in range(3)
    )
    assert total == pytest.approx(1, abs=1e-6)


def test_bandwidths_are_clipped():
    same = KernelDensity(np.full((5, 2), 0.5), [0, 0])
    assert np.array_equal(same.bandwidths, [1e-3, 1e-3])
    even = KernelDensity(np.array([[0.0], [1.0]]), [2])  # the rule of thumb gives 0.53 * 2^(-1/5) = 0.46
    assert 0.45 < even.bandwidths[0] <= 0.5
    assert KernelDensity(np.zeros((4, 1)), [1]).density(np.zeros((1, 1))) == 1  # a single choice


def test_bandwidth_of_a_categorical_does_not_depend_on_the_order_of_its_choices():
    data = np.array([[0.0], [0.0], [1.0], [2.0]])
    swapped = np.array([[0.0], [0.0], [2.0], [1.0]])
    relabelled = np.array([[1.0], [1.0], [0.0], [2.0]])
    bandwidths = {float(KernelDensity(d, [3]).bandwidths[0]) for d in (data, swapped, relabelled)}
    assert len(bandwidths) == 1


def test_samples_lie_in_the_cube_and_follow_widened_kernels():
    density = KernelDensity(np.array([[0.0, 1], [0.02, 1], [1.0, 1]]), [0, 3])
    rows = density.sample(20_000, np.random.default_rng(0))
    assert rows[:, 0].min() >= 0
    assert rows[:, 0].max() <= 1
    assert set(rows[:, 1]) == {0, 1, 2}
    wide = 3 * density.bandwidths[0]
    kernels = [stats.truncnorm((0 - m) / wide, (1 - m) / wide, loc=m, scale=wide) for m in (0.0, 0.02, 1.0)]
    mean = np.mean([kernel.mean() for kernel in kernels])
    assert rows[:, 0].mean() == pytest.approx(mean, abs=0.01)
    kept = 1 - density.bandwidths[1] * 2 / 3
    assert np.mean(rows[:, 1] == 1) == pytest.approx(kept, abs=0.01)


def test_coordinates_go_there_and_back():
    encoder = Encoder(Space.from_config_space(MIXED))
    coordinates = Coordinates(encoder)
    sampler = RandomSampler(MIXED, seed=0)
    points = encoder.encode_all(sampler.suggest() for _ in range(20))
    rows = coordinates.narrow(points)
    assert coordinates.choices.tolist() == [0, 0, 0, 3, 0]  # an ordered categorical is a number
    assert rows.shape == (20, 5)
    assert np.array_equal(coordinates.widen(rows), points)


# Data


def test_values_are_those_at_rung_levels_and_failures_the_worst():
    scheduler = make(max_t=27, mode="max")
    scheduler.curves = {
        0: {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4},
        1: {2: 0.5, 10: 0.6, 11: 0.7},  # reports come late
        2: {1: -math.inf},
        3: {1: 0.2, 2: 0.3},
    }
    scheduler.failed = {3, 4}
    scheduler.configs = {trial_id: {"x": 0.5, "y": 0.5} for trial_id in range(5)}
    scheduler.curves[5], scheduler.configs[5] = {1: 0.9}, {"x": 0.5}  # somebody else's: not in this space
    assert rung_values(scheduler, Encoder(Space.from_config_space(SQUARE))) == {
        (0, 1): -0.1, (0, 3): -0.3, (1, 1): -0.5, (1, 9): -0.6, (2, 1): math.inf,
        (3, 1): -0.2, (3, 3): math.inf, (4, 1): math.inf,
    }  # fmt: skip


def test_good_and_bad_are_split_at_the_largest_level_with_enough():
    scheduler = make(max_t=9)
    stream = np.random.default_rng(0)
    scheduler.configs = {k: {"x": stream.random(), "y": stream.random()} for k in range(40)}
    searcher = scheduler.searcher
    # Two hyperparameters: three good and three bad.
    scheduler.curves = {k: {1: float(k)} for k in range(5)}
    assert searcher._densities() is None
    scheduler.curves = {k: {1: float(k)} for k in range(6)}
    assert [len(density.data) for density in searcher._densities()] == [3, 3]
    scheduler.curves = {k: {1: float(k)} for k in range(40)}
    good, bad = searcher._densities()
    assert (len(good.data), len(bad.data)) == (6, 34)
    assert np.allclose(good.data, [[scheduler.configs[k]["x"], scheduler.configs[k]["y"]] for k in range(6)])
    for k in range(6):
        scheduler.curves[k][3] = float(-k)
    assert [len(density.data) for density in searcher._densities()] == [3, 3]  # level 3
    scheduler.curves[5][3] = scheduler.curves[4][3] = scheduler.curves[3][3] = scheduler.curves[2][3] = math.inf
    assert len(searcher._densities()[0].data) == 6  # too few finite values there: level 1 again


# Decisions


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.parametrize(("space", "curve"), [(SQUARE, bowl), (MIXED, mixed)], ids=["square", "mixed"])
def test_any_number_of_workers(workers, space, curve):
    loop = Loop(make(space), curve, workers).run(150)
    assert len(loop.trials) == 150
    assert set(loop.origins) == {Origin("random"), Origin("model")}
    encoded = loop.scheduler.searcher._supply.encoder.encode_all(loop.configs)
    assert encoded.min() >= 0
    assert encoded.max() <= 1


def test_a_third_is_random_and_in_the_order_of_random_search():
    loop = Loop(make(), bowl).run(400)
    random = [k for k, origin in enumerate(loop.origins) if origin.by == "random" and k >= 20]
    assert len(random) / 380 == pytest.approx(1 / 3, abs=0.07)
    sampler = RandomSampler(SQUARE, seed=1)
    drawn = [config for config, origin in zip(loop.configs, loop.origins, strict=True) if origin.by == "random"]
    assert drawn == [sampler.suggest() for _ in drawn]


def test_model_configurations_lie_in_the_good_region():
    loop = Loop(make(), bowl).run(120)
    distance = [math.hypot(config["x"] - 0.4, config["y"] - 0.7) for config in loop.configs]
    late = range(60, 120)
    modelled = np.median([distance[k] for k in late if loop.origins[k].by == "model"])
    random = np.median([distance[k] for k in late if loop.origins[k].by == "random"])
    assert modelled < 0.5 * random


def test_finds_better_configurations_than_random_search():
    space = {f"x{k}": uniform(0, 1) for k in range(5)}

    def distance(config, epoch):
        return sum((value - 0.3) ** 2 for value in config.values()) + 1 / epoch

    def best(maker, seed):
        return min(
            distance(config, math.inf) for config in Loop(make(space, maker, seed=seed), distance).run(120).configs
        )

    modelled, random = ([best(maker, seed) for seed in range(6)] for maker in (BOHB, RandomSearch))
    assert np.mean(modelled) < 0.7 * np.mean(random)


def test_max_mirrors_min():
    low = Loop(make(), bowl).run(80)
    high = Loop(make(mode="max"), lambda config, epoch: -bowl(config, epoch)).run(80)
    assert low.configs == high.configs


def test_candidates_are_used_once_and_then_there_are_none():
    sampler = RandomSampler(MIXED, seed=5)
    rows = [{**sampler.suggest(), "row": k} for k in range(80)]
    loop = Loop(make(MIXED, candidates=rows), mixed).run(100)
    assert loop.dry
    assert sorted(config["row"] for config in loop.configs) == list(range(80))
    assert "model" in {origin.by for origin in loop.origins}


def test_discrete_configurations_are_not_modelled_twice():
    space = {"depth": randint(1, 6), "kind": choice(["a", "b", "c"]), "size": ordinal([1, 2, 4], kind="equal")}
    loop = Loop(make(space), lambda config, epoch: config["depth"] + 1 / epoch, 1).run(100)
    seen = [tuple(config.values()) for config in loop.configs]
    modelled = [k for k, origin in enumerate(loop.origins) if origin.by == "model"]
    assert modelled
    assert all(seen[k] not in seen[:k] for k in modelled)


def test_failed_and_diverged_trials_are_never_good():
    """The half of the square where training crashes or diverges is avoided."""

    def curve(config, epoch):
        if config["x"] > 0.5:
            return None if config["y"] > 0.5 else math.nan
        return bowl(config, epoch)

    loop = Loop(make(), curve).run(120)
    bad = [config["x"] > 0.5 for config, origin in zip(loop.configs, loop.origins, strict=True) if origin.by == "model"]
    assert np.mean(bad) < 0.15


@pytest.mark.parametrize("value", [None, math.nan, 1.0])
def test_nothing_but_failures_or_constants_is_no_reason_to_stop(value):
    assert len(Loop(make(), lambda config, epoch: value).run(60).trials) == 60


def test_warm_started_configurations_are_the_features():
    scheduler = make()
    stream = np.random.default_rng(0)
    scheduler.configs = {k: {"x": stream.random(), "y": stream.random()} for k in range(9)}
    scheduler.curves = {k: {1: float(k)} for k in range(9)}
    scheduler.configs[0] = {"x": 0.123, "y": 0.456}  # what the base scheduler does at the first report
    assert [0.123, 0.456] in scheduler.searcher._densities()[0].data.tolist()


def test_log_hyperparameters_are_modelled_in_the_logarithm():
    scheduler = make({"lr": loguniform(1e-4, 1)})
    scheduler.configs = {k: {"lr": 10.0 ** -(k % 5)} for k in range(10)}
    scheduler.curves = {k: {1: float(k)} for k in range(10)}
    assert np.allclose(scheduler.searcher._densities()[0].data[:, 0], [1, 0.75])


def test_decisions_do_not_depend_on_process_or_hash_seed():
    code = (
        "from tests.harness.test_bohb import *\n"
        "print([sorted(c.items()) for c in Loop(make(MIXED), mixed).run(60).configs])\n"
    )
    outputs = set()
    for hash_seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_a_saved_scheduler_goes_on_as_if_it_had_not_been():
    loop = Loop(make(), bowl).run(40)
    copy = dill.loads(dill.dumps(loop))
    assert copy.run(80).configs == loop.run(80).configs


def test_preset_builds_the_scheduler():
    preset = yaml.safe_load((ROOT / "conf" / "scheduler" / "bohb.yaml").read_text())
    assert preset.pop("_target_") == "harness.schedulers.BOHB"
    assert make(max_resource_attr="epochs", **preset).suggest().config["epochs"] == 1
