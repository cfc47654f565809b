"""Hyper-gradients against central differences of their objective, and what must not change while they are computed."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from harness.ohgw import (
    Problem,
    UpdateRule,
    direct,
    direct_objective,
    finite_difference,
    lookahead,
    lookahead_objective,
)
from harness.ohgw.coordinates import Coordinate
from tests.harness.ohgw_problem import SPACE, build, coordinates, draw, mlp, problem, resnet, sampled, train_loss

STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
Objective = Callable[[Mapping[str, Any]], float]


def central_difference(objective: Objective, config: dict[str, float], name: str, x: Coordinate, h: float) -> float:
    psi = x.psi(config[name])
    return (objective({**config, name: x.value(psi + h)}) - objective({**config, name: x.value(psi - h)})) / (2 * h)


def worst_error(
    objective: Objective, gradient: dict[str, float], config: dict[str, float], xs: dict[str, Coordinate]
) -> float:
    """Largest error over the coordinates at the best h, relative to max(|component|, 1e-3 |gradient|)."""
    norm = math.hypot(*gradient.values())
    errors = []
    for name, x in xs.items():
        differences = [central_difference(objective, config, name, x, h) for h in STEPS]
        scale = max(abs(gradient[name]), 1e-3 * norm)
        errors.append(min(abs(d - gradient[name]) for d in differences) / scale)
    return max(errors)


@pytest.mark.parametrize("momentum", ["impulse", "first_step"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("log1m", [True, False])
@pytest.mark.parametrize(("make", "act"), [(mlp, nn.GELU), (mlp, nn.Tanh), (resnet, nn.GELU), (resnet, nn.Tanh)])
def test_lookahead_equals_central_differences_of_its_objective(
    make: Any, act: Any, log1m: bool, nesterov: bool, momentum: Any
):
    for seed in range(2):
        p, config = problem(build(make, act, seed), update=UpdateRule(nesterov=nesterov)), sampled(seed)
        batches, xs = p.draw(seed), coordinates(log1m=log1m)
        estimate = lookahead(p, config, batches, xs, momentum)

        def objective(trial: Mapping[str, Any], p: Problem = p, batches: Any = batches) -> float:
            return lookahead_objective(p, trial, batches, momentum)

        assert estimate.loss == pytest.approx(objective(config), rel=1e-14)
        assert worst_error(objective, estimate.gradient, config, xs) <= 1e-6


@pytest.mark.parametrize("make", [mlp, resnet])
@pytest.mark.parametrize("act", [nn.GELU, nn.Tanh])
def test_direct_equals_central_differences_of_its_objective(make: Any, act: Any):
    for seed in range(4):
        p, config = problem(build(make, act, seed)), sampled(seed)
        batches, xs = p.draw(seed), coordinates()
        estimate = direct(p, config, batches, xs)

        def objective(trial: Mapping[str, Any], p: Problem = p, batches: Any = batches) -> float:
            return direct_objective(p, trial, batches)

        assert estimate.loss == pytest.approx(objective(config), rel=1e-14)
        assert worst_error(objective, estimate.gradient, config, xs) <= 1e-6
        assert estimate.gradient["lr"] == estimate.gradient["momentum"] == 0.0
        assert estimate.gradient["wd"] != 0.0


@pytest.mark.parametrize("make", [mlp, resnet])
def test_relu_nets_agree_with_central_differences_where_two_h_agree(make: Any):
    compared = 0
    for seed in range(6):
        p, config = problem(build(make, nn.ReLU, seed)), sampled(seed)
        batches, xs = p.draw(seed), coordinates()
        gradient = lookahead(p, config, batches, xs).gradient
        norm = math.hypot(*gradient.values())

        def objective(trial: Mapping[str, Any], p: Problem = p, batches: Any = batches) -> float:
            return lookahead_objective(p, trial, batches)

        for name, x in xs.items():
            a, b = (central_difference(objective, config, name, x, h) for h in (1e-5, 1e-6))
            scale = max(abs(gradient[name]), 1e-3 * norm)
            if abs(a - b) <= 1e-4 * scale:  # no kink between the points
                compared += 1
                assert abs(b - gradient[name]) <= 1e-3 * scale, (seed, name)
    assert compared >= 20


def test_every_coordinate_alone_has_the_same_gradient_as_together():
    p, config = problem(build(resnet, nn.GELU, 0)), sampled(0)
    together = lookahead(p, config, p.draw(0), coordinates()).gradient
    for name in SPACE:
        alone = lookahead(p, config, p.draw(0), coordinates(names=(name,))).gradient
        assert alone == {name: pytest.approx(together[name], rel=1e-9)}


def test_a_hyperparameter_without_a_derivative_is_differentiated_numerically():
    def rounded(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        return train_loss(
            net, batch, {**z, "label_smoothing": torch.tensor(z["label_smoothing"].item(), dtype=torch.float64)}
        )

    model, config = build(mlp, nn.GELU, 0), sampled(0)
    exact = problem(model)
    p = problem(model, train_loss=rounded, differentiable=("augmentation",), linear=(), finite=("label_smoothing",))
    for estimator in (lookahead, direct):
        a = estimator(exact, config, p.draw(0), coordinates()).gradient
        b = estimator(p, config, p.draw(0), coordinates()).gradient
        assert list(a) == list(b)
        assert b == {name: pytest.approx(a[name], rel=1e-5) for name in a}


# ---- the objective itself, against torch.optim


def optimiser(model: nn.Module, p: Problem, config: dict[str, float], nesterov: bool) -> torch.optim.SGD:
    groups = [
        {"params": [w], "weight_decay": config["wd"] if p.decayed(name) else 0.0}
        for name, w in model.named_parameters()
    ]
    return torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"], nesterov=nesterov)


def training_gradient(p: Problem, config: dict[str, float], batch: Any) -> None:
    z = {name: torch.tensor(config[name], dtype=torch.float64) for name in p.differentiable}
    p.train_loss(p.model, batch, z).backward()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("make", [mlp, resnet])
def test_first_step_is_one_step_of_torch_sgd(make: Any, nesterov: bool):
    model, config = build(make, nn.GELU, 0), sampled(3)
    p = problem(model, update=UpdateRule(nesterov=nesterov))
    first, second = p.draw(0)
    expected = lookahead_objective(p, config, (first, second), "first_step")
    optimizer = optimiser(model, p, config, nesterov)
    training_gradient(p, config, first)
    optimizer.step()
    assert p.probe_loss(model, second).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_impulse_is_where_torch_sgd_ends_up_after_one_gradient(nesterov: bool):
    model, config = build(mlp, nn.GELU, 0), {**sampled(3), "momentum": 0.9}
    p = problem(model, update=UpdateRule(nesterov=nesterov))
    first, second = p.draw(0)
    expected = lookahead_objective(p, config, (first, second), "impulse")
    training_gradient(p, config, first)
    for name, w in model.named_parameters():  # the decay is part of the one impulse u
        assert w.grad is not None
        w.grad += config["wd"] * w.detach() if p.decayed(name) else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9, nesterov=nesterov)
    for _ in range(500):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert p.probe_loss(model, second).item() == pytest.approx(expected, rel=1e-12)


def test_absent_weight_decay_and_momentum_are_zero_and_constants_are_taken():
    p = problem(build(mlp, nn.GELU, 0))
    config = sampled(0)
    bare = {name: config[name] for name in ("lr", "augmentation", "label_smoothing")}
    fixed = dataclasses.replace(p, update=UpdateRule(nesterov=True, wd=0.0, momentum=0.0))
    batches = p.draw(0)
    reference = lookahead_objective(p, {**bare, "wd": 0.0, "momentum": 0.0}, batches)
    assert lookahead_objective(p, bare, batches) == reference
    assert lookahead_objective(fixed, config, batches) == reference
    with pytest.raises(KeyError):
        lookahead_objective(p, {"wd": 0.0}, batches)
    with pytest.raises(ValueError, match="possible: sgd, adam, adamw"):
        UpdateRule(kind="lion")  # type: ignore[arg-type]


# ---- what must not change


class Restless(nn.Module):
    """BatchNorm, module and functional dropout, a recurrent layer with dropout, a frozen and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(16, 4)
        self.rnn = nn.GRU(8, 16, num_layers=2, dropout=0.5, batch_first=True)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.drop(self.norm(x)).squeeze(1))[0][:, -1]
        return self.head(nnf.dropout(h, 0.5, self.training)) * self.frozen


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    flags = [(m.training, getattr(m, "dropout", None), getattr(m, "p", None)) for m in model.modules()]
    return [t.detach().clone() for t in tensors] + [torch.get_rng_state()], [t._version for t in tensors], flags  # type: ignore[return-value]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["lookahead", "direct", "finite_difference"])
def test_weights_gradients_buffers_flags_and_rng_are_left_as_they_were(what: str, training: bool):
    torch.manual_seed(0)
    model = Restless().double().train(training)
    model.norm.eval()
    for w in model.head.parameters():
        w.grad = torch.randn_like(w)
    p, config, batches = problem(model), sampled(0), draw(0)
    torch.manual_seed(7)
    tensors, versions, flags = snapshot(model)
    estimates = []
    with torch.no_grad():
        for _ in range(2):
            if what == "finite_difference":
                objective = lambda c: lookahead_objective(p, c, batches)  # noqa: E731
                estimates.append(finite_difference(objective, config, coordinates(), 1e-6))
            else:
                estimates.append({"lookahead": lookahead, "direct": direct}[what](p, config, batches, coordinates()))
    after_tensors, after_versions, after_flags = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(tensors, after_tensors, strict=True))
    assert (versions, flags) == (after_versions, after_flags)
    assert estimates[0] == estimates[1]


def test_losses_that_draw_see_the_same_draws_in_every_pass():
    """Functional dropout cannot be switched off from outside; common random numbers keep the gradient right."""
    torch.manual_seed(0)
    p, config, batches, xs = problem(Restless().double()), sampled(1), draw(1), coordinates()
    gradient = lookahead(p, config, batches, xs).gradient
    assert worst_error(lambda c: lookahead_objective(p, c, batches), gradient, config, xs) <= 1e-6


def test_an_exception_in_a_loss_leaves_the_model_as_it_was():
    model = build(resnet, nn.GELU, 0).eval()
    before = snapshot(model)

    def broken(net: Any, batch: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lookahead(problem(model, probe_loss=broken), sampled(0), draw(0), coordinates())
    after = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_autocast_around_it_changes_nothing():
    model = build(resnet, nn.GELU, 0).float()
    p, config = problem(model), sampled(0)
    batches = draw(0, dtype=torch.float32)
    plain = lookahead(p, config, batches, coordinates())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lookahead(p, config, batches, coordinates()) == plain


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(nnf.scaled_dot_product_attention(q, k, v).flatten(1))


def test_fused_attention_has_a_mixed_derivative_too():
    torch.manual_seed(0)
    p, config, batches, xs = problem(Attention().double()), sampled(1), draw(1), coordinates()
    gradient = lookahead(p, config, batches, xs).gradient
    assert worst_error(lambda c: lookahead_objective(p, c, batches), gradient, config, xs) <= 1e-6
