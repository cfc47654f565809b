"""Hyper-gradients of a trial at its initial weights theta0: ``direct``, ``lookahead``, ``finite_difference``.

Notation: B, B' two disjoint mini-batches; z the hyperparameters the training loss depends on (label smoothing,
augmentation, ...); g = d train_loss(theta0; B, z) / d theta; u = g + wd * theta0 (where the optimiser decays).

``lookahead`` differentiates F = probe_loss(theta1; B') with theta1 = theta0 - s*u: one update and no unrolling.

    s = lr / (1 - mu)     momentum "impulse": all that one gradient moves the weights, heavy-ball or Nesterov (u is
                          treated as one impulse, its decay term included once: an approximation)
    s = lr, lr * (1 + mu) momentum "first_step": the optimiser's first step, heavy-ball or Nesterov

u follows the trial's optimiser (``UpdateRule``), P being a clip of the global gradient norm if there is one:

    sgd     u = P(g) + wd * theta0
    adam    u = p / (rms(p) + eps) with p = P(g) + wd * theta0
    adamw   u = P(g) / (rms(P(g)) + eps) + wd * theta0

rms is the root mean square over each weight tensor. Adam's own second moment after one gradient is g*g element by
element, which makes the first update lr * sign(g): every z would have a zero derivative almost everywhere. What the
trial really divides by is a running mean over many batches; its mean over the tensor is the estimate that one gradient
gives. It is differentiated through. Under Adam one gradient moves the weights by lr * u in total whatever beta1 is (the
weights (1-beta1) beta1^k of the moving average sum to 1), so that s = lr, the momentum (beta1) has the derivative 0,
and a clip matters only as far as eps does.

With q = dF/dtheta1:   dF/dlr = -ds/dlr <q,u>,  dF/dmu = -ds/dmu <q,u>,  dF/dwd = -s <q,theta0>,  dF/dz = -s <q,dg/dz>
(where u is not linear in g, q gives way to (du/dg)^T q in the last, and for adam's wd in the one before it).
The mixed derivative is reverse over reverse: for a z that enters the loss linearly d/dtheta of dL/dz (the network is
traversed once), for others d/dz of <q,g>. Forward mode is avoided: through native batch normalisation it takes the
batch statistics for constants (torch 2.13).

Everything runs on ``functional_call`` over the model's own weights and clones of its buffers, without autocast, with
dropout off and batch statistics as in training. Weights, ``.grad``, buffers, training flags and torch's RNG states are
afterwards what they were; every pass starts from the same RNG state, so that losses that draw are reproducible too.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.ohgw.coordinates import Coordinates
from harness.ohgw.settings import Momentum

Net = Callable[..., Tensor]
Batch = Any
Kind = Literal["sgd", "adam", "adamw"]
Tensors = Mapping[str, Tensor]  # by the name of the weight
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


class MissingGradient(RuntimeError):
    """The training loss was declared differentiable in a hyperparameter that autograd cannot reach from it."""


@dataclass(frozen=True)
class UpdateRule:
    """The optimiser's update; ``kind`` as in the module's docstring, those of ``torch.optim.SGD``, ``Adam``, ``AdamW``.

    ``lr``, ``wd``, ``momentum`` (under Adam beta1) and ``clip`` (largest global norm of the gradient, as
    ``torch.nn.utils.clip_grad_norm_`` enforces it) are values or names of hyperparameters or constants; wd and momentum
    named but absent from a configuration are 0, a clip that is absent or None is none, an absent lr is a KeyError.
    ``eps``: Adam's.
    """

    kind: Kind = "sgd"
    nesterov: bool = False
    lr: str | float = "lr"
    wd: str | float = "wd"
    momentum: str | float = "momentum"
    clip: str | float | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown update rule {self.kind!r}; possible: {', '.join(get_args(Kind))}")

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters among lr, wd, momentum and clip."""
        return tuple(name for name in (self.lr, self.wd, self.momentum, self.clip) if isinstance(name, str))

    def values(self, config: Mapping[str, Any]) -> tuple[float, float, float]:
        """(lr, wd, mu) in ``config``."""
        lr = config[self.lr] if isinstance(self.lr, str) else self.lr
        wd, mu = (config.get(x, 0.0) if isinstance(x, str) else x for x in (self.wd, self.momentum))
        return float(lr), float(wd), float(mu)

    def largest_norm(self, config: Mapping[str, Any]) -> float:
        """The clip in ``config``, infinite if there is none."""
        clip = config.get(self.clip) if isinstance(self.clip, str) else self.clip
        return math.inf if clip is None else float(clip)

    def linear(self, config: Mapping[str, Any]) -> bool:
        """Whether u is linear in g whatever g is."""
        return self.kind == "sgd" and math.isinf(self.largest_norm(config))

    def gain(self, mu: float, momentum: Momentum) -> tuple[float, float]:
        """(c, dc/dmu) where the weights move by lr * c * u."""
        if self.kind != "sgd":
            return 1.0, 0.0
        if momentum == "first_step":
            return (1.0 + mu, 1.0) if self.nesterov else (1.0, 0.0)
        return (1.0 / (1.0 - mu), 1.0 / (1.0 - mu) ** 2) if mu < 1.0 else (math.inf, math.inf)


@dataclass(frozen=True)
class Problem:
    """What a warm start needs to know of a trial at its initial weights."""

    model: nn.Module
    """At theta0; never modified."""
    train_loss: Callable[[Net, Batch, Mapping[str, Tensor]], Tensor]
    """(net, batch, z) -> mean training loss (0-d); deterministic given the batch (random draws belong into it), without
    autocast. ``z``: 0-d tensors in the model's precision, for the names below that the configuration has."""
    probe_loss: Callable[[Net, Batch], Tensor]
    """(net, batch) -> plain mean loss (0-d): no label smoothing, no augmentation, no autocast."""
    draw: Callable[[int], tuple[Batch, Batch]]
    """step -> (B, B'), disjoint and the same whenever asked."""
    update: UpdateRule
    decayed: Callable[[str], bool] = lambda name: True
    """Parameter name -> does the optimiser decay it."""
    differentiable: tuple[str, ...] = ()
    """Hyperparameters the training loss is differentiable in."""
    linear: tuple[str, ...] = ()
    """Those of them in which it is linear (label smoothing): a third of the cost, no extra memory."""
    finite: tuple[str, ...] = ()
    """Hyperparameters the training loss reads from z but has no gradient in: finite differences are taken. A
    hyperparameter that is in none of these and not in ``update`` stays frozen."""
    h: float | None = None
    """Half the distance of two points of a finite difference, in unit coordinates; None: by the precision."""
    average: Callable[[list[Tensor]], None] | None = None
    """Of a trial on several processes, each with its share of a batch: replaces the (contiguous) tensors by their means
    over them, in place. All processes must then call the same functions."""

    @property
    def movable(self) -> tuple[str, ...]:
        """The hyperparameters that have a hyper-gradient."""
        return (*self.update.names, *self.differentiable, *self.finite)

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def _parameter(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Objective:
    """For a trial without gradients (trees): F itself, of which central differences are taken whatever estimator is
    asked for; the record says so. Integers and categoricals stay where they are, as always."""

    value: Callable[[Mapping[str, Any], int], float]
    """(configuration, step) -> F; with the same random numbers whenever asked for the same step."""
    movable: tuple[str, ...]
    """The hyperparameters to move."""
    reason: str
    """Why there is no gradient."""
    h: float = 0.05
    """Half the distance of the two points, in unit coordinates: F may be a step function."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """``loss``: the objective; ``gradient``: its derivative in psi, for every coordinate asked for."""

    loss: float
    gradient: dict[str, float]

    @property
    def not_finite(self) -> list[str]:
        """What is not finite: "loss" or names of coordinates."""
        return [name for name, v in {"loss": self.loss, **self.gradient}.items() if not math.isfinite(v)]


def lookahead(
    problem: Problem,
    config: Mapping[str, Any],
    batches: tuple[Batch, Batch],
    coordinates: Coordinates,
    momentum: Momentum = "impulse",
) -> Estimate:
    """F after one update on ``batches[0]``, probed on ``batches[1]``, and dF/dpsi for each of ``coordinates``.

    Costs about 2 training steps; 1 more for each linear z, or 3 to 4 more for all z together if one is not linear
    (that takes about twice the memory of a training step). Raises MissingGradient, or what autograd raises where an
    operation has no second derivative."""
    rule = problem.update
    lr, _, mu = rule.values(config)
    c, dc = rule.gain(mu, momentum)
    g, u, q, loss = _update_and_probe(problem, config, batches, lr * c)
    q_u = _inner(q, u)
    del u
    pulled, wd_slope, clip_slope = _pulled_back(problem, config, g, q)
    del g, q
    slopes: dict[Any, float] = {rule.lr: -c * q_u, rule.momentum: -lr * dc * q_u}
    slopes |= {rule.wd: -lr * c * wd_slope, rule.clip: -lr * c * clip_slope}
    z = [name for name in problem.differentiable if name in coordinates]
    slopes |= {name: -lr * c * v for name, v in _mixed_derivatives(problem, config, batches[0], z, pulled).items()}

    def objective(trial: Mapping[str, Any]) -> float:
        return lookahead_objective(problem, trial, batches, momentum)

    return Estimate(loss, _in_psi(slopes, objective, config, coordinates, finite_step(problem)))


def lookahead_objective(
    problem: Problem, config: Mapping[str, Any], batches: tuple[Batch, Batch], momentum: Momentum = "impulse"
) -> float:
    """F: one update on ``batches[0]``, then the probe loss on ``batches[1]``."""
    lr, _, mu = problem.update.values(config)
    u = _direction(problem, config, _gradient(problem, config, batches[0]))
    theta1 = _moved(problem, u, lr * problem.update.gain(mu, momentum)[0])
    del u
    with _quiet(problem.model), torch.no_grad():
        return _average(problem, [problem.probe_loss(_net(problem.model, theta1), batches[1])])[0].item()


def direct(
    problem: Problem, config: Mapping[str, Any], batches: tuple[Batch, Batch], coordinates: Coordinates
) -> Estimate:
    """train_loss(theta0; B, z) + wd/2 |theta0|^2 and its derivative in psi for each of ``coordinates``; zero for lr,
    momentum and clip. ``batches[1]`` is not used. Costs at most 1 training step. Raises MissingGradient."""
    rule = problem.update
    half_square = _half_square(problem)
    slopes: dict[Any, float] = {rule.lr: 0.0, rule.momentum: 0.0, rule.clip: 0.0, rule.wd: half_square}
    free = [name for name in problem.differentiable if name in coordinates]
    with _quiet(problem.model):
        z = _hyperparameters(problem, config, free)
        weights = {name: w.detach() for name, w in _weights(problem.model).items()}
        loss = problem.train_loss(_net(problem.model, weights), batches[0], z)
        if free:
            _require_path(loss, z, free)
            grads = _average(problem, list(torch.autograd.grad(loss, [z[name] for name in free])))
            slopes |= {name: grad.item() for name, grad in zip(free, grads, strict=True)}

    def objective(trial: Mapping[str, Any]) -> float:
        return direct_objective(problem, trial, batches)

    value = _average(problem, [loss.detach()])[0].item() + rule.values(config)[1] * half_square
    return Estimate(value, _in_psi(slopes, objective, config, coordinates, finite_step(problem)))


def direct_objective(problem: Problem, config: Mapping[str, Any], batches: tuple[Batch, Batch]) -> float:
    """train_loss(theta0; B, z) + wd/2 |theta0|^2 over the parameters that the optimiser decays."""
    with _quiet(problem.model), torch.no_grad():
        z = _hyperparameters(problem, config, [])
        loss = problem.train_loss(_net(problem.model, _weights(problem.model)), batches[0], z)
    return _average(problem, [loss])[0].item() + problem.update.values(config)[1] * _half_square(problem)


def finite_difference(
    objective: Callable[[Mapping[str, Any]], float], config: Mapping[str, Any], coordinates: Coordinates, h: float
) -> Estimate:
    """Central differences of ``objective`` (2 evaluations a coordinate, 1 for the loss; the same batches throughout).

    ``h``: half the distance of the two points, in unit coordinates. Points beyond a bound are moved onto it and the
    actual distance is used, so the difference is one-sided at a bound."""
    gradient = {}
    for name, x in coordinates.items():
        psi, (low, high) = x.psi(config[name]), x.bounds
        below, above = max(psi - h * x.width, low), min(psi + h * x.width, high)
        rise = objective({**config, name: x.value(above)}) - objective({**config, name: x.value(below)})
        gradient[name] = rise / (above - below)
    return Estimate(objective(config), gradient)


def finite_step(problem: Problem) -> float:
    """h of the finite differences, in unit coordinates: the problem's own, or the cube root of the precision, which
    balances rounding against truncation (4.9e-3 in fp32, 6.1e-6 in fp64)."""
    return problem.h or torch.finfo(problem.dtype).eps ** (1 / 3)


def _in_psi(
    slopes: Mapping[str, float],
    objective: Callable[[Mapping[str, Any]], float],
    config: Mapping[str, Any],
    coordinates: Coordinates,
    h: float,
) -> dict[str, float]:
    """dF/dpsi from ``slopes`` = dF/dvalue by the chain rule; coordinates without a slope by finite differences."""
    rest = {name: x for name, x in coordinates.items() if name not in slopes}
    differences = finite_difference(objective, config, rest, h).gradient if rest else {}
    return {
        name: differences[name] if name in rest else slopes[name] * x.slope(config[name])
        for name, x in coordinates.items()
    }


# ---- passes through the model


def _update_and_probe(
    problem: Problem, config: Mapping[str, Any], batches: tuple[Batch, Batch], s: float
) -> tuple[Tensors, Tensors, Tensors, float]:
    """g, u, q = dF/dtheta1 (all for the weights that the update moves) and F at theta1 = theta0 - s*u. Where u is
    linear in g, no g: nothing more depends on it, and it is as large as the weights."""
    g = _gradient(problem, config, batches[0])
    u = _direction(problem, config, g)
    if problem.update.linear(config):
        g = {}
    theta1 = _moved(problem, u, s)
    moved = {name: theta1[name].requires_grad_() for name in u}
    with _quiet(problem.model):
        loss = problem.probe_loss(_net(problem.model, theta1), batches[1])
        grads = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    q = {name: grad for name, grad in zip(moved, grads, strict=True) if grad is not None}
    *means, value = _average(problem, [*q.values(), loss.detach()])
    return g, u, dict(zip(q, means, strict=True)), value.item()


def _gradient(problem: Problem, config: Mapping[str, Any], batch: Batch) -> Tensors:
    """g. As in torch.optim, a weight that the loss does not depend on is left out altogether."""
    weights = _weights(problem.model)
    with _quiet(problem.model):
        loss = problem.train_loss(_net(problem.model, weights), batch, _hyperparameters(problem, config, []))
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    g = {name: grad for name, grad in zip(weights, grads, strict=True) if grad is not None}
    return dict(zip(g, _average(problem, list(g.values())), strict=True))


def _direction(problem: Problem, config: Mapping[str, Any], g: Tensors) -> Tensors:
    """u, by the optimiser's rule."""
    rule, weights = problem.update, dict(problem.model.named_parameters())
    _, wd, _ = rule.values(config)
    shrink = _shrink(g, rule.largest_norm(config))[0]

    def decay(tensors: Tensors) -> Tensors:
        decayed = {name for name in tensors if wd and problem.decayed(name)}
        return {n: torch.add(t, weights[n].detach(), alpha=wd) if n in decayed else t for n, t in tensors.items()}

    u = g if shrink == 1.0 else {name: shrink * t for name, t in g.items()}
    if rule.kind == "sgd":
        return decay(u)
    if rule.kind == "adam":
        u = decay(u)
    u = {name: t / (_rms(t) + rule.eps) for name, t in u.items()}
    return decay(u) if rule.kind == "adamw" else u


def _pulled_back(problem: Problem, config: Mapping[str, Any], g: Tensors, q: Tensors) -> tuple[Tensors, float, float]:
    """(du/dg)^T q, <q, du/dwd> and <q, du/dclip>."""
    rule, weights = problem.update, _weights(problem.model)
    _, wd, _ = rule.values(config)
    largest = rule.largest_norm(config)
    shrink, norm = _shrink(g, largest)
    decayed = {name: weights[name] for name in q if problem.decayed(name)}
    wd_slope = _inner(q, decayed)

    def normalised(name: str) -> Tensor:
        """What u divides by its rms."""
        p = g[name] if shrink == 1.0 else shrink * g[name]
        coupled = rule.kind == "adam" and wd and name in decayed
        return torch.add(p, decayed[name].detach(), alpha=wd) if coupled else p

    if rule.kind != "sgd":
        q = {name: _through_rms(v, normalised(name), rule.eps) for name, v in q.items()}
        wd_slope = _inner(q, decayed) if rule.kind == "adam" else wd_slope
    if shrink == 1.0:
        return q, wd_slope, 0.0
    g_q = _inner(g, q)
    factor = shrink * g_q / (norm * (norm + CLIP_EPS)) if norm else 0.0
    pulled = {n: torch.add(shrink * q[n] if n in q else torch.zeros_like(t), t, alpha=-factor) for n, t in g.items()}
    return pulled, wd_slope, g_q / (norm + CLIP_EPS)


def _shrink(g: Tensors, largest: float) -> tuple[float, float]:
    """What ``clip_grad_norm_`` multiplies g by, and the norm of g (0 if there is no clip and nobody asked)."""
    if math.isinf(largest):
        return 1.0, 0.0
    norm = math.sqrt(_inner(g, g))
    return min(1.0, largest / (norm + CLIP_EPS)), norm


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def _through_rms(q: Tensor, p: Tensor, eps: float) -> Tensor:
    """J^T q, J the Jacobian of p -> p / (rms(p) + eps)."""
    rms = _rms(p)
    scale = rms + eps
    inner = (q * p).sum() / (p.numel() * rms * scale * scale)
    return q / scale - torch.where(rms > 0, inner, torch.zeros_like(inner)) * p


def _average(problem: Problem, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors or, if the trial has several processes, their means over them (then the tensors may be overwritten:
    autograd's gradients can be transposed or expanded views, which cannot be sent or written to)."""
    if problem.average is None:
        return tensors
    own = [tensor.contiguous() for tensor in tensors]
    problem.average(own)
    return own


def _moved(problem: Problem, u: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    """theta1 = theta0 - s*u."""
    weights = {name: w.detach() for name, w in _weights(problem.model).items()}
    return {name: torch.add(w, u[name], alpha=-s) if name in u else w for name, w in weights.items()}


def _mixed_derivatives(
    problem: Problem, config: Mapping[str, Any], batch: Batch, names: Sequence[str], q: Mapping[str, Tensor]
) -> dict[str, float]:
    """<q, dg/dz> for each z in ``names``."""
    if not names:
        return {}
    if set(names) <= set(problem.linear):
        slopes = {name: _mixed_linear(problem, config, batch, name, q) for name in names}
    else:
        slopes = _mixed_general(problem, config, batch, names, q)
    values = torch.tensor(list(slopes.values()), dtype=torch.float64)
    return dict(zip(slopes, _average(problem, [values.to(problem.device)])[0].tolist(), strict=True))


def _mixed_general(
    problem: Problem, config: Mapping[str, Any], batch: Batch, names: Sequence[str], q: Mapping[str, Tensor]
) -> dict[str, float]:
    """d/dz of <q, g>."""
    weights = _weights(problem.model)
    with _quiet(problem.model), _recomputed_convolutions():
        z = _hyperparameters(problem, config, names)
        loss = problem.train_loss(_net(problem.model, weights), batch, z)
        _require_path(loss, z, names)
        g = torch.autograd.grad(loss, [weights[name] for name in q], create_graph=True, allow_unused=True)
        del loss
        parts = [(q[name] * v).sum() for name, v in zip(q, g, strict=True) if v is not None]
        del g
        if not (parts and (q_g := torch.stack(parts).sum()).requires_grad):
            return dict.fromkeys(names, 0.0)
        del parts
        _require_second_derivative(q_g)
        grads = torch.autograd.grad(q_g, [z[name] for name in names], allow_unused=True)
        return {name: 0.0 if v is None else v.item() for name, v in zip(names, grads, strict=True)}


def _recomputed_convolutions() -> torch.autograd.graph.saved_tensors_hooks:
    """Operations that keep a convolution's output for their derivatives (batch normalisation, GELU) compute it again
    instead, from the convolution's own inputs, which are kept anyway: a quarter less memory for two derivatives."""

    def pack(kept: Tensor) -> Callable[[], Tensor]:
        node: Any = kept.grad_fn
        if node is None or node.name() != "ConvolutionBackward0" or node.next_functions[2][0] is not None:  # has a bias
            return lambda: kept
        how = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed)
        where = (node._saved_output_padding, node._saved_groups)
        return lambda: torch.convolution(node._saved_input, node._saved_weight, None, *how, *where)

    def unpack(compute: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():  # autograd puts the result in its place in the graph
            return compute()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _mixed_linear(
    problem: Problem, config: Mapping[str, Any], batch: Batch, name: str, q: Mapping[str, Tensor]
) -> float:
    """<q, d/dtheta dL/dz>: dL/dz needs the end of the graph only, so that this is a plain backward pass."""
    weights = _weights(problem.model)
    with _quiet(problem.model):
        z = _hyperparameters(problem, config, [name])
        loss = problem.train_loss(_net(problem.model, weights), batch, z)
        _require_path(loss, z, [name])
        (slope,) = torch.autograd.grad(loss, z[name], create_graph=True)
        del loss
        if not slope.requires_grad:
            return 0.0
        grads = torch.autograd.grad(slope, [weights[key] for key in q], allow_unused=True)
    return _inner(q, {key: g for key, g in zip(q, grads, strict=True) if g is not None})


def _require_path(loss: Tensor, z: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise MissingGradient unless autograd can get from ``loss`` to each z. (A None from autograd does not tell a z
    whose mixed derivative is zero from one that went through ``float(z)``.)"""
    leaves = {id(getattr(node, "variable", None)) for node in _graph(loss)}
    missing = [name for name in names if id(z[name]) not in leaves]
    if missing:
        raise MissingGradient(f"missing gradient: the training loss has no autograd path to {', '.join(missing)}")


def _require_second_derivative(value: Tensor) -> None:
    """Raise MissingGradient if ``value``, made of gradients, comes through a function without second derivative. (Those
    marked once_differentiable end the graph, and ``autograd.grad`` would silently leave their part out.)"""
    if any(node.name().endswith("Error") for node in _graph(value)):
        raise MissingGradient("missing gradient: a function marked once_differentiable has no second derivative")


def _graph(value: Tensor) -> set[Any]:
    """All nodes of the autograd graph that ``value`` comes from."""
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return seen


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters as fresh leaves that share the model's memory."""
    return {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}


def _net(model: nn.Module, weights: Mapping[str, Tensor]) -> Net:
    """The model with other weights; each call updates clones of its buffers."""

    def net(*args: Any, **kwargs: Any) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, {**weights, **buffers}, args, kwargs)

    return net


def _hyperparameters(problem: Problem, config: Mapping[str, Any], free: Sequence[str]) -> dict[str, Tensor]:
    """z as 0-d tensors; those of ``free`` are leaves to differentiate in."""
    names = [name for name in (*problem.differentiable, *problem.finite) if name in config]

    def scalar(name: str) -> Tensor:
        value = float(config[name])
        return torch.tensor(value, dtype=problem.dtype, device=problem.device, requires_grad=name in free)

    return {name: scalar(name) for name in names}


def _half_square(problem: Problem) -> float:
    """|theta0|^2 / 2 over the parameters that the optimiser decays."""
    weights = [w.detach() for name, w in _weights(problem.model).items() if problem.decayed(name)]
    return 0.5 * sum(torch.stack([w.square().sum() for w in weights]).tolist()) if weights else 0.0


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """<a, b> over the names they share."""
    products = [(a[name].detach() * b[name].detach()).sum() for name in a if name in b]
    return math.fsum(torch.stack(products).tolist()) if products else 0.0


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout and without autocast, attention by plain matrix products, gradients on; flags and
    RNG states are restored."""
    flags = [(module, module.training) for module in model.modules()]
    with_rate = (nn.RNNBase, nn.MultiheadAttention)  # drop out by themselves
    rates: list[tuple[Any, float]] = [(m, m.dropout) for m in model.modules() if isinstance(m, with_rate)]
    device = next(model.parameters()).device
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
        for module, _ in rates:
            module.dropout = 0.0
        # fp32, and on a GPU not TF32 either; the same algorithms every time
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        # the fused attention kernels have no second derivative, and their sums another order
        with (
            forked,
            exact,
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(device.type, enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for module, rate in rates:
            module.dropout = rate
