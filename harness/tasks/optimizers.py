"""The optimisers of the trials: torch's SGD, Adam and AdamW, in the functional form of their fused kernels.

The classes themselves import torch._dynamo on first use, 4 s for every fresh worker. Weight decay acts on weight
matrices and kernels only. ``param_groups`` is what GradScaler asks of an optimizer.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from backends.context import UserError
from harness.tasks import models


class Optimizer:
    """Parameters in two groups, decayed and not; ``lr`` may be changed before every step. ``state``: tensors that a
    checkpoint holds, zeros before the first step. ``clip``: largest global norm of the gradient, None for no clip."""

    state: list[Tensor]

    def __init__(self, net: nn.Module, config: Mapping[str, Any]):
        self.groups = models.parameters_by_decay(net)
        self.param_groups = [{"params": params} for params in self.groups]
        self.decays = (config["wd"], 0.0)
        self.lr, self.clip = config["lr"], config.get("clip")

    @property
    def parameters(self) -> list[Tensor]:
        return [p for params in self.groups for p in params]

    def step(self) -> None:
        """Update the parameters, all of which must have gradients, with one fused kernel for each kind of decay."""
        raise NotImplementedError

    def clip_gradients(self) -> None:
        """Shrink the (unscaled) gradients to a global norm of ``clip`` at most, if there is one."""
        if self.clip is not None:
            clip_grad_norm_(self.parameters, self.clip)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class Sgd(Optimizer):
    """``torch.optim.SGD``, heavy-ball or Nesterov (``nesterov: true``); ``state``: the momentum."""

    def __init__(self, net: nn.Module, config: Mapping[str, Any]):
        super().__init__(net, config)
        self.momentum = config["momentum"]
        self.nesterov = bool(config["nesterov"]) and self.momentum > 0  # the same thing without momentum
        self.state = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        buffers = iter(self.state)
        for group, decay in zip(self.groups, self.decays, strict=True):
            params: list[Tensor] = list(group)
            gradients = [p.grad for p in params if p.grad is not None]
            sgd(params, gradients, list(islice(buffers, len(params))), fused=True, foreach=False, weight_decay=decay,
                momentum=self.momentum, lr=self.lr, dampening=0, nesterov=self.nesterov, maximize=False)  # fmt: skip


class Adam(Optimizer):
    """``torch.optim.Adam`` (weight decay in the gradient); beta1 is the hyperparameter ``momentum``, beta2 ``beta2``.
    ``state``: of each parameter both moments, then the numbers of steps, one of each group."""

    function: ClassVar[Any] = staticmethod(adam)

    def __init__(self, net: nn.Module, config: Mapping[str, Any]):
        super().__init__(net, config)
        self.eps = config.get("eps", 1e-8)
        self.betas = (config["momentum"], config["beta2"])
        self.averages = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.state = [*self.averages, *self.squares, *self.steps]

    @torch.no_grad()
    def step(self) -> None:
        states = zip(self.averages, self.squares, self.steps, strict=True)
        for group, decay in zip(self.groups, self.decays, strict=True):
            params: list[Tensor] = list(group)
            if not params:
                continue
            gradients = [p.grad for p in params if p.grad is not None]
            averages, squares, steps = (list(kind) for kind in zip(*islice(states, len(params)), strict=True))
            self.function(params, gradients, averages, squares, [], steps, fused=True, foreach=False, amsgrad=False,
                          beta1=self.betas[0], beta2=self.betas[1], lr=self.lr, weight_decay=decay, eps=self.eps,
                          maximize=False)  # fmt: skip


class AdamW(Adam):
    """``torch.optim.AdamW``: weight decay beside the gradient."""

    function: ClassVar[Any] = staticmethod(adamw)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": Sgd, "adam": Adam, "adamw": AdamW}


def optimizer(net: nn.Module, config: Mapping[str, Any]) -> Optimizer:
    """The optimiser that ``config["optimizer"]`` names. Errors: UserError for an unknown name."""
    name = config["optimizer"]
    if name not in OPTIMIZERS:
        raise UserError(f"the hyperparameter optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    return OPTIMIZERS[name](net, config)
