"""The lookahead under SGD, Adam, AdamW and a gradient clip; averages over processes; objectives without gradients."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from harness.ohgw import Objective, Problem, Settings, UpdateRule, direct, lookahead, lookahead_objective, warm_start
from harness.ohgw.coordinates import Coordinate, Coordinates
from harness.ohgw.estimators import _direction, _gradient
from harness.ohgw.settings import Momentum
from harness.seeds import rng
from harness.space import Categorical, Float, Integer, Space
from tests.harness.ohgw_problem import SPACE, build, coordinates, mlp, problem, resnet, sampled

CLIP = Float(1e-3, 1e3, log=True)
NAMES = {name: Coordinate(domain) for name, domain in {**SPACE, "clip": CLIP}.items()}
LOG1M = {**NAMES, "momentum": Coordinate(SPACE["momentum"], log1m=True)}
NEVER, ALWAYS = 1e2, 0.05  # clips of gradients whose norm is about 1
STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
RULES = {
    "heavy-ball": UpdateRule(clip="clip"),
    "nesterov": UpdateRule(nesterov=True, clip="clip"),
    "adam": UpdateRule("adam", clip="clip"),
    "adamw": UpdateRule("adamw", clip="clip"),
    # where eps is not small against a gradient, Adam feels its clip
    "adam, large eps": UpdateRule("adam", clip="clip", eps=1e-3),
    "adamw, large eps": UpdateRule("adamw", clip="clip", eps=1e-3),
}


def derivative(objective: Callable[[float], float], psi: float, h: float) -> float:
    """Central difference of fourth order."""
    one, two = (objective(psi + k * h) - objective(psi - k * h) for k in (1, 2))
    return (8 * one - two) / (12 * h)


def assert_gradient_of_objective(
    p: Problem, config: Mapping[str, Any], xs: Coordinates, momentum: Momentum = "impulse", rel: float = 1e-7
) -> dict[str, float]:
    """Each component equals the difference at one of STEPS (bilinear interpolation has kinks between which small ones
    fit) up to ``rel`` of itself or of a hundredth of the gradient; its value is returned."""
    batches = p.draw(0)
    gradient = lookahead(p, config, batches, xs, momentum).gradient
    for name, x in xs.items():

        def objective(psi: float, name: str = name, x: Coordinate = x) -> float:
            return lookahead_objective(p, {**config, name: x.value(psi)}, batches, momentum)

        scale = max(abs(gradient[name]), 0.01 * math.hypot(*gradient.values()))
        errors = (abs(derivative(objective, x.psi(config[name]), h) - gradient[name]) / scale for h in STEPS)
        assert any(error <= rel for error in errors), (name, gradient)
    return gradient


@pytest.mark.parametrize("clip", [NEVER, ALWAYS])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [mlp, resnet])
@pytest.mark.parametrize(
    ("seed", "act", "momentum", "xs"),
    [(0, nn.GELU, "impulse", NAMES), (1, nn.Tanh, "first_step", NAMES), (2, nn.Tanh, "impulse", LOG1M)],
)
def test_gradient_is_that_of_the_objective(make, act, rule, clip, seed, momentum, xs):
    p, config = problem(build(make, act, seed), update=RULES[rule]), {**sampled(seed), "clip": clip}
    gradient = assert_gradient_of_objective(p, config, xs, momentum)
    unfelt = {"momentum"} if "adam" in rule or (rule, momentum) == ("heavy-ball", "first_step") else set()
    unfelt |= {"clip"} if clip == NEVER else set()
    assert {name for name, v in gradient.items() if v == 0.0} == unfelt


@pytest.mark.parametrize("clip", [None, ALWAYS])
@pytest.mark.parametrize("rule", ["nesterov", "adam", "adamw"])
def test_gradient_without_weight_decay_and_with_a_constant_clip(rule, clip):
    update = dataclasses.replace(RULES[rule], wd=0.0, clip=clip)
    xs = {name: x for name, x in NAMES.items() if name not in ("wd", "clip")}
    assert_gradient_of_objective(problem(build(mlp, nn.GELU, 3), update=update), sampled(3), xs)


class TwoHeads(nn.Module):
    """The training loss does not reach ``probed``, the probe loss not ``trained``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.trained, self.probed = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, probing: bool = False) -> Tensor:
        return (self.probed if probing else self.trained)(self.body(x.flatten(1)).tanh())


@pytest.mark.parametrize("clip", [NEVER, ALWAYS])
@pytest.mark.parametrize("rule", ["heavy-ball", "adam, large eps", "adamw, large eps"])
def test_weights_that_only_one_of_the_losses_depends_on(rule, clip):
    torch.manual_seed(0)
    model = TwoHeads().double()
    model.body.bias.requires_grad_(False)
    p = problem(model, update=RULES[rule], probe_loss=lambda net, b: nnf.cross_entropy(net(b[0], probing=True), b[1]))
    config = {**sampled(4), "clip": clip}
    assert_gradient_of_objective(p, config, NAMES)
    g = _gradient(p, config, p.draw(0)[0])
    assert set(_direction(p, config, g)) == {"body.weight", "trained.weight", "trained.bias"}  # no decay of the others


@pytest.mark.parametrize("clip", [1e-9, 0.0, None])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_gradient_of_zero_is_no_division_by_zero(kind, clip):
    model = nn.Linear(4, 2).double()
    p = Problem(model, lambda net, x, z: 0.0 * net(x).sum(), lambda net, x: net(x).square().sum(),
                lambda step: (torch.ones(3, 4).double(),) * 2, UpdateRule(kind, clip="clip"))  # fmt: skip
    config = {"lr": 0.1, "wd": 1e-3, "momentum": 0.5, "clip": clip}
    xs = {name: NAMES[name] for name in ("lr", "wd", "momentum", "clip")[: 3 if not clip else 4]}
    estimate = lookahead(p, config, p.draw(0), xs)
    assert estimate.not_finite == []
    assert estimate.gradient["lr"] != 0.0  # the decay


def test_direct_knows_that_no_clip_is_felt_and_asks_no_differences():
    passes = []

    def loss(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        passes.append(1)
        return nnf.cross_entropy(net(batch[0]), batch[1])

    p = problem(build(mlp, nn.GELU, 0), train_loss=loss, update=RULES["adam"], differentiable=(), linear=())
    xs = {name: NAMES[name] for name in ("lr", "wd", "momentum", "clip")}
    gradient = direct(p, {**sampled(0), "clip": ALWAYS}, p.draw(0), xs).gradient
    assert [name for name, v in gradient.items() if v == 0.0] == ["lr", "momentum", "clip"]
    assert len(passes) == 1


# ---- the update, against torch.optim


def groups(p: Problem, wd: float) -> list[dict[str, Any]]:
    named = p.model.named_parameters()
    return [{"params": [w], "weight_decay": wd if p.decayed(name) else 0.0} for name, w in named]


def backward(p: Problem, config: Mapping[str, Any], clip: float) -> None:
    """``.grad`` as a trial has it: of the training loss, clipped."""
    z = {name: torch.tensor(config[name], dtype=torch.float64) for name in p.differentiable}
    p.train_loss(p.model, p.draw(0)[0], z).backward()
    assert (clip_grad_norm_(p.model.parameters(), clip) > clip) == (clip == ALWAYS)


def assert_moved(p: Problem, optimizer: Any, expected: Mapping[str, Tensor]) -> None:
    """A step of ``optimizer`` moves the weights by ``expected``."""
    theta0 = {name: w.detach().clone() for name, w in p.model.named_parameters()}
    optimizer.step()
    assert set(expected) == set(theta0)
    for name, w in p.model.named_parameters():
        torch.testing.assert_close(w.detach() - theta0[name], expected[name], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("clip", [NEVER, ALWAYS])
@pytest.mark.parametrize("wd", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("make", [mlp, resnet])
def test_the_update_is_torchs_when_its_second_moment_is_the_mean_square_of_the_tensor(make, kind, wd, clip):
    p = problem(build(make, nn.GELU, 1), update=UpdateRule(kind, clip=clip))
    config = {**sampled(1), "wd": wd, "momentum": 0.8}
    first, second = p.draw(0)
    u = _direction(p, config, _gradient(p, config, first))
    expected = lookahead_objective(p, config, (first, second), "impulse")
    backward(p, config, clip)
    make_optimizer: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    optimizer = make_optimizer(groups(p, wd), config["lr"], betas=(0.8, 0.9))
    for name, w in p.model.named_parameters():
        assert w.grad is not None
        fed = w.grad + wd * w.detach() if kind == "adam" and p.decayed(name) else w.grad
        optimizer.state[w] = {  # after 9 steps, such that the 10th has the moments fed and mean(fed^2), bias-corrected
            "step": torch.tensor(9.0),
            "exp_avg": ((1 - 0.8**10) * fed - 0.2 * fed) / 0.8,
            "exp_avg_sq": ((1 - 0.9**10) * fed.square().mean() - 0.1 * fed.square()) / 0.9,
        }
    assert_moved(p, optimizer, {name: -config["lr"] * t for name, t in u.items()})
    assert p.probe_loss(p.model, second).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("clip", [NEVER, ALWAYS])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("make", [mlp, resnet])
def test_a_clipped_first_step_is_torchs(make, nesterov, clip):
    p = problem(build(make, nn.GELU, 2), update=UpdateRule("sgd", nesterov=nesterov, clip=clip))
    config = {**sampled(2), "momentum": 0.7}
    first, second = p.draw(0)
    u = _direction(p, config, _gradient(p, config, first))
    expected = lookahead_objective(p, config, (first, second), "first_step")
    backward(p, config, clip)
    optimizer = torch.optim.SGD(groups(p, config["wd"]), config["lr"], 0.7, nesterov=nesterov)
    gain = 1.7 if nesterov else 1.0
    assert_moved(p, optimizer, {name: -config["lr"] * gain * t for name, t in u.items()})
    assert p.probe_loss(p.model, second).item() == pytest.approx(expected, rel=1e-12)


# ---- several processes


class Meeting(Exception):
    """A process waits in ``average`` with its ``tensors``."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors


Work = Callable[[Callable[[list[Tensor]], None]], Any]


def up_to_meeting(work: Work, means: list[list[Tensor]]) -> Any:
    """The result of ``work(average)``, or the Meeting after those whose ``means`` are known."""
    known = iter(means)

    def average(tensors: list[Tensor]) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors)  # torch.distributed asks for it
        found = next(known, None)
        if found is None:
            raise Meeting([tensor.clone() for tensor in tensors])
        for tensor, mean in zip(tensors, found, strict=True):
            tensor.copy_(mean)

    try:
        return work(average)
    except Meeting as meeting:
        return meeting


def in_step(*works: Work) -> list[Any]:
    """The results of processes that meet in ``average``. They are run in turns, from their beginning to the next
    meeting: two threads would tread on each other's generator and attention kernels, which are global in torch."""
    means: list[list[Tensor]] = []
    while True:
        states = [up_to_meeting(work, means) for work in works]
        meetings = [state for state in states if isinstance(state, Meeting)]
        if not meetings:
            return states
        assert len(meetings) == len(states)  # nobody waits for somebody who has finished
        brought = zip(*(meeting.tensors for meeting in meetings), strict=True)
        means.append([torch.stack(tensors).mean(0) for tensors in brought])


class Shifted(nn.Module):
    """LayerNorm, and a weight whose gradient autograd returns expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.shift = nn.LayerNorm(64), nn.Linear(64, 4), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(1))).sin() * self.shift.sum()


def shifted(act: type[nn.Module]) -> nn.Module:
    return Shifted()


@pytest.mark.parametrize("make", [mlp, shifted])
@pytest.mark.parametrize("rule", ["nesterov", "adam", "adamw"])
@pytest.mark.parametrize("estimator", ["lookahead", "direct", "finite_difference", "random"])
def test_two_processes_with_half_the_batch_each_agree_with_one(make, rule, estimator):
    space, config = Space({**SPACE, "clip": CLIP}), {**sampled(3), "clip": ALWAYS}
    settings = Settings(estimator=estimator, step="normalized", eta=0.1)
    model = build(make, nn.GELU, 3)
    pair = problem(model).draw(0)

    def result(rows: slice, **changes: Any) -> dict[str, float]:
        p = problem(model, update=RULES[rule], h=0.05, draw=lambda step: tuple(tuple(t[rows] for t in b) for b in pair),
                    **changes)  # fmt: skip
        found = warm_start(config, space, p, settings, rng(0, "test"))
        assert (found.estimator, found.fallback) == (estimator, None)
        assert found.loss is not None
        return {**found.gradient, "loss": found.loss} | {f"new {name}": v for name, v in found.config.items()}

    halves = in_step(
        lambda average: result(slice(None, 6), average=average), lambda average: result(slice(6, None), average=average)
    )
    assert halves[0] == halves[1]
    assert halves[0] == pytest.approx(result(slice(None)), rel=1e-10, abs=1e-13)
    assert halves[0] != pytest.approx(result(slice(None, 6)), rel=1e-3)  # the other half matters


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
        assert record["fallback"] == f"{estimator}: missing gradient: trees have none"
    assert result.gradient == pytest.approx({"a": 2 * (0.3 - 1), "b": 1.0})
    assert record["length"] == pytest.approx(0.1)
    assert (result.config["depth"], result.config["kind"]) == (4, "x")
    assert all(result.config[name] != X[name] for name in ("a", "b"))
    assert warm_start(X, MIXED, trees(), dataclasses.replace(settings, mask=("a",)), rng(0, "test")).config["a"] == 0.3


@pytest.mark.parametrize("estimator", ["lookahead", "finite_difference", "random"])
def test_an_objective_of_integers_and_choices_only_moves_nothing(estimator):
    space = Space({name: MIXED[name] for name in ("depth", "kind")})
    result = warm_start(X, space, trees(), Settings(estimator=estimator, step="sign", eta=0.1), rng(0, "test"))
    assert (result.config, result.gradient, result.record()["length"]) == (X, {}, 0.0)


def test_two_points_of_an_objective_are_a_tenth_of_the_range_apart():
    asked: list[float] = []

    def stairs(config: Mapping[str, Any], step: int) -> float:
        asked.append(config["a"])
        return float(math.floor(config["a"] * 20 + 0.5))

    result = warm_start(X, Space({"a": Float(0, 1)}), Objective(stairs, ("a",), "steps"), Settings(eta=1e-3))
    assert sorted(set(asked)) == pytest.approx([0.25, 0.3, 0.35])
    assert result.gradient["a"] == pytest.approx(20)


@pytest.mark.parametrize("estimator", ["lookahead", "finite_difference", "random"])
@pytest.mark.parametrize(
    "value",
    [lambda config, step: math.nan, lambda config, step: math.inf if config["a"] > 0.3 else 1.0,
     lambda config, step: math.nan if step else config["a"]],
)  # fmt: skip
def test_an_objective_that_is_not_finite_leaves_x_alone(value, estimator):
    settings = Settings(estimator=estimator, step="normalized", eta=0.1, n_steps=2)
    result = warm_start(X, MIXED, trees(value), settings, rng(0, "test"))
    assert (result.config, result.estimator) == (X, "none")
    assert "finite_difference: not finite: " in str(result.fallback)


def test_every_step_of_an_objective_has_its_own_number():
    steps: set[int] = set()
    objective = trees(lambda config, step: (steps.add(step), quadratic(config, step))[1])  # type: ignore[func-returns-value]
    warm_start(X, MIXED, objective, Settings(step="normalized", eta=0.01, n_steps=3))
    assert steps == {0, 1, 2}


# ---- attention


class Block(nn.Module):
    """A causal transformer block on token embeddings, and a head; it notes which attention kernels it may use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)
        self.fused: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.fused.append(torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def noisy_loss(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
    """Not linear in the noise."""
    return nnf.cross_entropy(net(batch[0] + z["augmentation"] * batch[2]), batch[1])


def attention_problem(dtype: torch.dtype, kind: Any = "adamw") -> Problem:
    torch.manual_seed(0)
    model, generator = Block().to(dtype), torch.Generator().manual_seed(1)

    def one() -> Any:
        x, noise = torch.randn(2, 6, 10, 16, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(4, (6,), generator=generator), noise

    pair = one(), one()
    return Problem(model, noisy_loss, lambda net, b: nnf.cross_entropy(net(b[0]), b[1]), lambda step: pair,
                   UpdateRule(kind), differentiable=("augmentation",))  # fmt: skip


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_attention_has_second_derivatives_in_a_warm_start(kind):
    p, config = attention_problem(torch.float64, kind), {"lr": 0.1, "wd": 1e-3, "augmentation": 0.4}
    gradient = assert_gradient_of_objective(p, config, coordinates(names=("lr", "wd", "augmentation")), rel=1e-8)
    assert gradient["augmentation"] != 0.0
    assert not any(p.model.fused)  # type: ignore[arg-type]


def test_the_fused_kernel_of_training_has_no_second_derivative():
    p = attention_problem(torch.float32)
    z = {"augmentation": torch.tensor(0.4, requires_grad=True)}
    loss = p.train_loss(p.model, p.draw(0)[0], z)
    g = torch.autograd.grad(loss, list(p.model.parameters()), create_graph=True)
    assert p.model.fused == [True]
    with pytest.raises(RuntimeError, match="derivative for"):
        torch.autograd.grad(torch.stack([t.sum() for t in g]).sum(), z["augmentation"])


def test_the_losses_of_a_warm_start_are_those_of_the_fused_kernel():
    p, config = attention_problem(torch.float32), {"lr": 0.0, "wd": 0.0, "augmentation": 0.4}
    first, second = p.draw(0)
    with torch.no_grad():
        trained = p.train_loss(p.model, first, {"augmentation": torch.tensor(0.4)}).item()
        probed = p.probe_loss(p.model, second).item()
    assert p.model.fused == [True, True]
    assert direct(p, config, (first, second), {}).loss == pytest.approx(trained, rel=1e-6)
    assert lookahead_objective(p, config, (first, second)) == pytest.approx(probed, rel=1e-6)  # theta1 is theta0
    assert p.model.fused[2:] == [False] * 3


def test_h_of_a_problem_takes_the_place_of_the_precisions():
    asked: list[float] = []

    def loss(net: Any, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        asked.append(float(z["dropout"]))
        return nnf.cross_entropy(net(batch[0]), batch[1]) * (1 + z["dropout"])

    p = dataclasses.replace(problem(build(mlp, nn.GELU, 0)), train_loss=loss, differentiable=(), linear=(),
                            finite=("dropout",), h=0.1)  # fmt: skip
    lookahead(p, {"lr": 0.1, "dropout": 0.5}, p.draw(0), {"dropout": Coordinate(Float(0.0, 1.0))})
    assert sorted(set(asked)) == pytest.approx([0.4, 0.5, 0.6])
