"""Warm starts as a whole: settings, presets, fallbacks, records."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from harness.ohgw import Problem, Settings, WarmStart, count_flops, lookahead_objective, peak_memory, warm_start
from harness.space import Categorical, Integer, Space
from tests.harness.ohgw_problem import SPACE, build, draw, mlp, probe_loss, problem, resnet, sampled, train_loss

RECORD = """requested estimator fallback step n_steps batch_size x x_prime gradient displacement length share loss
            seconds flops peak_memory"""
STUDY = Space(SPACE, {"epochs": 27})
CONF = Path(__file__).parents[2] / "conf" / "ohgw"
PRESETS = {file.stem: yaml.safe_load(file.read_text()) for file in CONF.glob("*.yaml")}


def start(
    p: Problem | None = None, config: Mapping[str, Any] | None = None, seed: int = 0, **settings: Any
) -> WarmStart:
    config = {**sampled(0), "epochs": 27} if config is None else config
    p = problem(build(mlp, nn.GELU, 0)) if p is None else p
    return warm_start(config, STUDY, p, Settings(**settings), np.random.default_rng(seed))


# ---- settings and presets


def test_the_presets_are_those_of_the_study():
    assert sorted(PRESETS) == sorted(
        ["off", "zero", "on", "direct", "normalized", "multistep", "random", "sign", "finite_difference", "masked"]
    )
    table = {name: (p["estimator"], p["step"], p["eta"], p["n_steps"]) for name, p in PRESETS.items() if name != "off"}
    assert table == {
        "zero": ("lookahead", "raw", 0, 1),
        "on": ("lookahead", "raw", 1e-3, 1),
        "direct": ("direct", "raw", 1e-3, 1),
        "normalized": ("lookahead", "normalized", 0.1, 1),
        "multistep": ("lookahead", "normalized", 0.05, 5),
        "random": ("random", "normalized", 0.1, 1),
        "sign": ("lookahead", "sign", 0.05, 1),
        "finite_difference": ("finite_difference", "normalized", 0.1, 1),
        "masked": ("lookahead", "normalized", 0.1, 1),
    }
    assert PRESETS["masked"]["mask"] == ["lr"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_every_key_and_is_valid(name: str):
    assert set(PRESETS[name]) == {item.name for item in dataclasses.fields(Settings)}
    settings = Settings(**PRESETS[name])
    assert all(item.metadata["help"] for item in dataclasses.fields(settings))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("estimator", "oracle", "off, direct, lookahead, finite_difference, random"),
        ("estimator", False, "off"),
        ("step", "newton", "raw, unit, normalized, sign"),
        ("eta", -1e-3, r"a number in \[0"),
        ("eta", math.nan, "a number"),
        ("eta", math.inf, "a number"),
        ("eta", "0.1", "a number"),
        ("n_steps", 0, "an integer"),
        ("n_steps", 1.5, "an integer"),
        ("n_steps", True, "an integer"),
        ("batch_size", 0, "an integer"),
        ("probe", "test", "train, val"),
        ("momentum", "nesterov", "impulse, first_step"),
        ("momentum_space", "log", "linear, log1m"),
        ("mask", "lr", "list"),
        ("mask", [1], "list"),
    ],
)
def test_settings_out_of_range_say_what_is_possible(key: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**{key: value})


# ---- moves


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"off"}))
def test_every_preset_runs_and_its_record_survives_json(name: str):
    result = start(**PRESETS[name])
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["x_prime"] == result.config
    assert record["requested"] == record["estimator"] == PRESETS[name]["estimator"]
    assert record["fallback"] is None
    assert record["length"] == pytest.approx(math.hypot(*record["displacement"].values()))
    assert (record["length"] > 0) == (name != "zero")
    assert sum(record["share"].values()) == pytest.approx(float(name != "zero"))
    assert record["seconds"] > 0
    assert set(record["gradient"]) == set(SPACE) - set(PRESETS[name]["mask"])
    assert list(record) == RECORD.split()


@pytest.mark.parametrize("seed", range(20))
def test_a_zero_step_returns_x_to_the_last_bit(seed: int):
    config = {**sampled(seed), "epochs": 27}
    assert start(config=config, eta=0.0, momentum_space="log1m").config == config


def test_frozen_and_unmoved_hyperparameters_keep_their_value_and_constants_stay():
    result = start(estimator="direct", step="normalized", eta=0.1, mask=["wd"])
    x, after = result.x, result.config
    assert [name for name in x if x[name] != after[name]] == ["augmentation", "label_smoothing"]
    assert result.displacement["lr"] == 0.0
    assert "wd" not in result.displacement
    assert after["epochs"] == 27


def test_integers_choices_and_hyperparameters_unknown_to_the_problem_stay_frozen():
    space = Space(
        {**SPACE, "width": Integer(8, 64), "pool": Categorical(("max", "mean")), "dropout": SPACE["augmentation"]}
    )
    config = {**sampled(0), "width": 32, "pool": "max", "dropout": 0.3}
    result = warm_start(config, space, problem(build(mlp, nn.GELU, 0)), Settings(step="sign", eta=0.05))
    assert {name: result.config[name] for name in ("width", "pool", "dropout")} == {
        "width": 32,
        "pool": "max",
        "dropout": 0.3,
    }
    assert set(result.displacement) == set(SPACE)


def test_everything_masked_moves_nothing():
    assert start(mask=list(SPACE), step="normalized").config == start(eta=0.0).config


def test_a_mask_of_unknown_names_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"learning_rate.*lr, wd, momentum"):
        start(mask=["learning_rate"])


def test_off_is_refused_and_random_needs_a_generator():
    with pytest.raises(ValueError, match="off"):
        start(estimator="off")
    with pytest.raises(ValueError, match="random generator"):
        warm_start(sampled(0), STUDY, problem(build(mlp, nn.GELU, 0)), Settings(estimator="random"))


def test_several_steps_take_fresh_batches_at_the_same_weights():
    drawn = []

    def drawing(step: int) -> Any:
        drawn.append(step)
        return draw(step)

    p = problem(build(mlp, nn.GELU, 0), draw=drawing)
    together = start(p, step="normalized", eta=0.05, n_steps=3)
    assert drawn == [0, 1, 2]
    config = together.x
    for i in range(3):
        one = problem(p.model, draw=lambda step, i=i: draw(i))
        config = start(one, config, step="normalized", eta=0.05).config
    assert together.config == {name: pytest.approx(v, rel=1e-9) for name, v in config.items()}


def test_a_small_step_lowers_the_objective():
    for seed in range(5):
        p, config = problem(build(resnet, nn.GELU, seed)), {**sampled(seed), "epochs": 27}
        result = start(p, config, step="normalized", eta=1e-3)
        batches = p.draw(0)
        assert lookahead_objective(p, result.config, batches) < lookahead_objective(p, config, batches)


@pytest.mark.parametrize("settings", [{"step": "normalized", "eta": 0.1}, {"step": "raw", "eta": 3.0, "n_steps": 2}])
@pytest.mark.parametrize("momentum_space", ["linear", "log1m"])
def test_random_moves_as_far_as_the_lookahead_in_another_direction(settings: dict[str, Any], momentum_space: str):
    for seed in range(5):
        config = {**sampled(seed), "epochs": 27}
        model = start(config=config, momentum_space=momentum_space, **settings)
        control = start(config=config, momentum_space=momentum_space, estimator="random", seed=seed, **settings)
        assert control.record()["length"] == pytest.approx(model.record()["length"], rel=1e-9)
        assert control.gradient == model.gradient
        assert control.config != model.config
        assert all(SPACE[n].lower <= control.config[n] <= SPACE[n].upper for n in SPACE)
        again = start(config=config, momentum_space=momentum_space, estimator="random", seed=seed, **settings)
        assert again.config == control.config


def test_random_directions_are_isotropic_in_unit_coordinates():
    centre = {name: domain.from_unit(0.5) for name, domain in SPACE.items()}
    p = problem(build(mlp, nn.GELU, 0))
    rng = np.random.default_rng(0)
    settings = Settings(estimator="random", step="normalized", eta=0.1)
    moves = [list(warm_start(centre, STUDY, p, settings, rng).displacement.values()) for _ in range(150)]
    second_moment = 5 * np.mean(np.square(moves), axis=0) / 0.01
    assert np.abs(np.mean(moves, axis=0)).max() < 0.1 * 0.15
    assert second_moment == pytest.approx(np.ones(5), abs=0.35)


def test_a_random_move_that_fits_nowhere_is_clipped_and_says_so():
    narrow = Space({"lr": SPACE["lr"]})
    result = warm_start({"lr": 0.03}, narrow, far(), Settings(estimator="random", eta=1.0), np.random.default_rng(0))
    assert result.fallback is None  # the lookahead itself ends on a bound, which is a move that fits
    square = Space({"lr": SPACE["lr"], "momentum": SPACE["momentum"]})
    middle = {name: square.continuous[name].from_unit(0.5) for name in square}
    clipped = warm_start(middle, square, far(), Settings(estimator="random", eta=1e6), np.random.default_rng(0))
    assert clipped.fallback is not None
    assert "clipped" in clipped.fallback
    assert clipped.estimator == "random"


def far() -> Problem:
    """A problem whose lookahead goes into a corner of the box."""
    return problem(
        build(mlp, nn.GELU, 0), train_loss=lambda net, batch, z: probe_loss(net, batch), differentiable=(), linear=()
    )


# ---- fallbacks


class OnceOnly(torch.autograd.Function):
    """A smooth activation that has a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(x)


def test_a_layer_without_second_derivative_goes_to_finite_differences():
    exact = start(problem(build(mlp, nn.Tanh, 0)), step="normalized", eta=0.1)
    result = start(problem(build(mlp, Once, 0)), step="normalized", eta=0.1)
    assert (result.estimator, exact.estimator) == ("finite_difference", "lookahead")
    assert result.fallback is not None
    assert "second derivative" in result.fallback
    assert result.config == {name: pytest.approx(v, rel=1e-4) for name, v in exact.config.items()}


@pytest.mark.parametrize("name", ["augmentation", "label_smoothing"])
@pytest.mark.parametrize("estimator", ["lookahead", "direct"])
def test_a_gradient_that_autograd_cannot_reach_goes_to_finite_differences(name: str, estimator: str):
    def detached(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        return train_loss(net, batch, {**z, name: z[name].detach()})

    exact = start(step="normalized", eta=0.1)
    result = start(
        problem(build(mlp, nn.GELU, 0), train_loss=detached), estimator=estimator, step="normalized", eta=0.1
    )
    assert result.estimator == "finite_difference"
    assert result.fallback is not None
    assert f"no autograd path to {name}" in result.fallback
    assert result.config == {key: pytest.approx(v, rel=1e-4) for key, v in exact.config.items()}


def test_a_hyperparameter_that_shifts_the_loss_alone_has_zero_gradient_without_fallback():
    def shifted(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        return probe_loss(net, batch) + z["label_smoothing"] + z["augmentation"] ** 2

    result = start(problem(build(mlp, nn.GELU, 0), train_loss=shifted), step="normalized")
    assert result.fallback is None
    assert result.gradient["label_smoothing"] == result.gradient["augmentation"] == 0.0


class SquareRootOfZero(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_goes_to_finite_differences():
    def broken(net: Any, batch: Any) -> Tensor:
        return SquareRootOfZero.apply(probe_loss(net, batch))

    result = start(problem(build(mlp, nn.GELU, 0), probe_loss=broken), step="normalized", eta=0.1)
    assert result.estimator == "finite_difference"
    assert result.fallback is not None
    assert "not finite" in result.fallback
    assert all(math.isfinite(v) for v in result.gradient.values())


@pytest.mark.parametrize("estimator", ["lookahead", "direct", "finite_difference", "random"])
def test_a_model_without_finite_loss_keeps_x(estimator: str):
    model = build(mlp, nn.GELU, 0)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    result = start(problem(model), estimator=estimator, step="sign", eta=0.05, n_steps=2)
    assert (result.estimator, result.config) == ("none", result.x)
    assert result.fallback is not None
    assert result.fallback.startswith("step 1: ")
    assert json.loads(json.dumps(result.record(), allow_nan=False))["length"] == 0.0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("derivative for: out of memory"), RuntimeError("mine"), KeyError("y")]
)
def test_other_errors_are_not_swallowed(error: Exception):
    def failing(net: Any, batch: Any) -> Tensor:
        raise error

    with pytest.raises(type(error)):
        start(problem(build(mlp, nn.GELU, 0), probe_loss=failing))


def test_momentum_of_one_is_not_finite_and_keeps_x():
    space = Space({"lr": SPACE["lr"], "momentum": dataclasses.replace(SPACE["momentum"], upper=1.0)})
    p = problem(build(mlp, nn.GELU, 0), train_loss=lambda net, batch, z: probe_loss(net, batch), differentiable=())
    result = warm_start({"lr": 0.1, "momentum": 1.0}, space, p, Settings())
    assert (result.estimator, result.config) == ("none", {"lr": 0.1, "momentum": 1.0})


# ---- cost


def test_flops_of_a_linear_layer_by_hand():
    weight, x = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert count_flops(lambda: x @ weight.T) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (x @ weight.T).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_peak_memory_of_allocations_by_hand():
    def fn() -> None:
        a = torch.zeros(1000, dtype=torch.float64)
        b = torch.zeros(500, dtype=torch.float64)
        del a
        torch.zeros(100, dtype=torch.float64)
        del b

    assert peak_memory(fn, torch.device("cpu")) == 12_000
