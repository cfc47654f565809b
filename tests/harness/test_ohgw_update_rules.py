"""The lookahead under SGD, Adam, AdamW and a gradient clip; averages over processes; objectives without gradients."""

import dataclasses
import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from harness.ohgw import Objective, Problem, Settings, UpdateRule, lookahead, lookahead_objective, warm_start
from harness.ohgw.coordinates import Coordinate
from harness.ohgw.estimators import Kind, _direction, _gradient
from harness.seeds import rng
from harness.space import Categorical, Float, Integer, Space
from tests.harness.ohgw_problem import SPACE, build, coordinates, mlp, problem, resnet, sampled

KINDS: tuple[Kind, ...] = ("sgd", "adam", "adamw")
CLIP = Float(1e-3, 1e3, log=True)
NAMES = {name: Coordinate(domain) for name, domain in {**SPACE, "clip": CLIP}.items()}


def central_difference(p: Problem, config: Mapping[str, Any], batches: Any, name: str) -> float:
    coordinate = NAMES[name]
    psi, h = coordinate.psi(config[name]), 3e-6 * coordinate.width
    ends = [{**config, name: coordinate.value(psi + d)} for d in (h, -h)]
    above, below = (lookahead_objective(p, end, batches) for end in ends)
    return (above - below) / (2 * h)


@pytest.mark.parametrize("clip", [1e3, 0.05])  # never and always active
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [mlp, resnet])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_objective(make, kind, clip, seed):
    p = problem(build(make, nn.GELU, seed), update=UpdateRule(kind, nesterov=True, clip="clip"))
    config, batches = {**sampled(seed), "clip": clip}, p.draw(0)
    estimate = lookahead(p, config, batches, NAMES)
    for name in NAMES:
        expected = central_difference(p, config, batches, name)
        # bilinear interpolation has kinks, hence no more digits for the augmentation
        assert estimate.gradient[name] == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_update_does_not_feel_has_a_gradient_of_exactly_zero(kind):
    p = problem(build(mlp, nn.GELU, 0), update=UpdateRule(kind, clip="clip"))
    gradient = lookahead(p, {**sampled(0), "clip": 100.0}, p.draw(0), NAMES).gradient
    assert gradient["clip"] == 0.0
    assert (gradient["momentum"] == 0.0) == (kind != "sgd")


@pytest.mark.parametrize("wd", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_update_is_torchs_when_its_second_moment_is_the_mean_square_of_the_tensor(kind, wd):
    model = build(resnet, nn.GELU, 1)
    p = problem(model, update=UpdateRule(kind), decayed=lambda name: True)
    config = {**sampled(1), "wd": wd, "momentum": 0.8}
    g = _gradient(p, config, p.draw(0)[0])
    u = _direction(p, config, g)
    theta0 = {name: w.detach().clone() for name, w in model.named_parameters()}
    optimizer: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](
        model.parameters(), config["lr"], betas=(0.8, 0.9), weight_decay=wd
    )
    for name, w in model.named_parameters():
        w.grad = g[name].clone()
        fed = g[name] + wd * w.detach() if kind == "adam" else g[name]  # what the moments are made of
        mean_square = fed.square().mean()
        optimizer.state[w] = {  # after 9 steps, such that the 10th has the moments `fed` and `mean_square`
            "step": torch.tensor(9.0),
            "exp_avg": ((1 - 0.8**10) * fed - 0.2 * fed) / 0.8,
            "exp_avg_sq": ((1 - 0.9**10) * mean_square - 0.1 * fed.square()) / 0.9,
        }
    optimizer.step()
    for name, w in model.named_parameters():
        torch.testing.assert_close(theta0[name] - w.detach(), config["lr"] * u[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_clipped_first_step_is_torchs(nesterov):
    model = build(mlp, nn.GELU, 2)
    p = problem(model, update=UpdateRule("sgd", nesterov=nesterov, clip=0.05), decayed=lambda name: True)
    config = {**sampled(2), "momentum": 0.7}
    g = _gradient(p, config, p.draw(0)[0])
    u = _direction(p, config, g)
    theta0 = {name: w.detach().clone() for name, w in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], 0.7, weight_decay=config["wd"], nesterov=nesterov)
    for name, w in model.named_parameters():
        w.grad = g[name].clone()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
    optimizer.step()
    gain = p.update.gain(0.7, "first_step")[0]
    for name, w in model.named_parameters():
        torch.testing.assert_close(theta0[name] - w.detach(), config["lr"] * gain * u[name], rtol=1e-9, atol=1e-14)


def test_a_gradient_of_zero_gives_no_nan():
    model = nn.Linear(4, 2).double()
    nn.init.zeros_(model.weight)
    p = Problem(model, lambda net, x, z: 0.0 * net(x).sum(), lambda net, x: net(x).square().sum(),
                lambda step: (torch.ones(3, 4).double(),) * 2, UpdateRule("adam", wd=0.0))  # fmt: skip
    estimate = lookahead(p, {"lr": 0.1}, p.draw(0), {"lr": NAMES["lr"]})
    assert math.isfinite(estimate.gradient["lr"])


# ---- several processes


class Meeting:
    """``average`` of two threads that call it in step."""

    def __init__(self) -> None:
        self.barrier, self.brought = threading.Barrier(2), {}  # type: ignore[var-annotated]

    def average(self, rank: int, tensors: list[Tensor]) -> None:
        self.brought[rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(30)
        for tensor, *both in zip(tensors, self.brought[0], self.brought[1], strict=True):
            tensor.copy_((both[0] + both[1]) / 2)
        self.barrier.wait(30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["lookahead", "direct", "finite_difference"])
def test_two_processes_with_half_the_batch_each_agree_with_one(kind, estimator):
    space, config = Space(SPACE), sampled(3)
    settings = Settings(estimator=estimator, step="normalized", eta=0.1)

    models = [build(mlp, nn.GELU, 3) for _ in range(3)]  # not in the threads: they would share torch's generator

    def result(rank: int, **changes: Any) -> dict[str, float]:
        p = problem(models[rank], update=UpdateRule(kind, clip=0.1), **changes)
        found = warm_start(config, space, p, settings)
        assert found.fallback is None
        return {**found.gradient, "loss": float(found.loss or 0), "lr": found.config["lr"]}

    whole = problem(models[2]).draw(0)
    meeting, results = Meeting(), {}
    halves = [[tuple(part[rank * 6 : rank * 6 + 6] for part in batch) for batch in whole] for rank in (0, 1)]

    def process(rank: int) -> None:
        average = lambda tensors: meeting.average(rank, tensors)  # noqa: E731
        results[rank] = result(rank, draw=lambda step: tuple(halves[rank]), average=average)

    other = threading.Thread(target=process, args=(1,))
    other.start()
    process(0)
    other.join()
    assert results[0] == results[1]
    rel = 1e-6 if estimator == "finite_difference" else 1e-9  # whose small denominators amplify rounding
    assert results[0] == pytest.approx(result(2), rel=rel, abs=1e-9)


# ---- objectives without gradients

MIXED = Space(
    {"a": Float(0, 1), "b": Float(1e-2, 1e2, log=True), "depth": Integer(1, 9), "kind": Categorical(("x", "y"))}
)
X = {"a": 0.3, "b": 1.0, "depth": 4, "kind": "x"}


def quadratic(config: Mapping[str, Any], step: int) -> float:
    return (config["a"] - 1) ** 2 + math.log(config["b"]) * (step + 1) + 100 * config["depth"]


def trees(value: Any = quadratic) -> Objective:
    return Objective(value, ("a", "b", "depth"), "trees have none")


@pytest.mark.parametrize("estimator", ["lookahead", "direct", "finite_difference", "random"])
def test_an_objective_is_differenced_whatever_is_asked_for(estimator):
    settings = Settings(estimator=estimator, step="normalized", eta=0.1)
    result = warm_start(X, MIXED, trees(), settings, rng(0, "test"))
    record = result.record()
    assert record["estimator"] == (estimator if estimator == "random" else "finite_difference")
    assert (record["fallback"] is None) == (estimator == "finite_difference")
    if record["fallback"]:
        assert "trees have none" in record["fallback"]
    assert result.gradient == pytest.approx({"a": 2 * (0.3 - 1), "b": 1.0})
    assert record["length"] == pytest.approx(0.1)
    assert (result.config["depth"], result.config["kind"]) == (4, "x")


def test_two_points_of_an_objective_are_a_tenth_of_the_range_apart():
    asked: list[float] = []

    def stairs(config: Mapping[str, Any], step: int) -> float:
        asked.append(config["a"])
        return float(math.floor(config["a"] * 20 + 0.5))

    result = warm_start(X, Space({"a": Float(0, 1)}), Objective(stairs, ("a",), "steps"), Settings(eta=1e-3))
    assert sorted(set(asked)) == pytest.approx([0.25, 0.3, 0.35])
    assert result.gradient["a"] == pytest.approx(20)


def test_an_objective_that_is_not_finite_leaves_x_alone():
    result = warm_start(X, MIXED, trees(lambda config, step: math.nan), Settings(step="normalized", eta=0.1))
    assert result.config == X
    assert result.estimator == "none"
    assert "not finite" in str(result.fallback)


def test_every_step_of_an_objective_has_its_own_number():
    steps: set[int] = set()
    objective = trees(lambda config, step: (steps.add(step), quadratic(config, step))[1])  # type: ignore[func-returns-value]
    warm_start(X, MIXED, objective, Settings(step="normalized", eta=0.01, n_steps=3))
    assert steps == {0, 1, 2}


# ---- attention


class Attention(nn.Module):
    """A causal transformer layer on token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = nnf.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((x + y).mean(1))


def attention_problem(dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def one() -> Any:
        x = torch.randn(6, 10, 16, generator=generator).to(dtype)
        return x, torch.randint(4, (6,), generator=generator), torch.randn(6, 10, 16, generator=generator).to(dtype)

    pair = one(), one()

    def loss(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        return nnf.cross_entropy(net(batch[0] + z["augmentation"] * batch[2]), batch[1])

    return Problem(Attention().to(dtype), loss, lambda net, b: nnf.cross_entropy(net(b[0]), b[1]), lambda step: pair,
                   UpdateRule("adamw"), differentiable=("augmentation",))  # fmt: skip


def test_attention_has_second_derivatives_in_a_warm_start():
    p, config = attention_problem(torch.float64), {"lr": 0.1, "wd": 1e-3, "augmentation": 0.4}
    gradient = lookahead(p, config, p.draw(0), coordinates(names=("lr", "wd", "augmentation"))).gradient
    for name, value in gradient.items():
        assert value == pytest.approx(central_difference(p, config, p.draw(0), name), rel=1e-6, abs=1e-9), name


def test_the_loss_of_a_warm_start_is_that_of_the_fused_kernel():
    p, config = attention_problem(torch.float32), {"lr": 0.0, "augmentation": 0.4}
    first, second = p.draw(0)
    with torch.no_grad():
        fused = p.probe_loss(p.model, second).item()  # at lr = 0 theta1 is theta0
    assert lookahead_objective(p, config, (first, second)) == pytest.approx(fused, rel=1e-5)


def test_h_of_a_problem_takes_the_place_of_the_precisions():
    asked: list[float] = []

    def loss(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        asked.append(float(z["dropout"]))
        return nnf.cross_entropy(net(batch[0]), batch[1]) * (1 + z["dropout"])

    p = dataclasses.replace(problem(build(mlp, nn.GELU, 0)), train_loss=loss, differentiable=(), linear=(),
                            finite=("dropout",), h=0.1)  # fmt: skip
    lookahead(p, {"lr": 0.1, "dropout": 0.5}, p.draw(0), {"dropout": Coordinate(Float(0.0, 1.0))})
    assert sorted(set(asked)) == pytest.approx([0.4, 0.5, 0.6])
