"""One-Shot Hyper-Gradient Warm-Starts (OHGW), usable on their own in any PyTorch + Syne Tune script.

In the training script, before the first epoch::

    from harness.ohgw import Problem, Settings, UpdateRule, warm_start
    from harness.space import Space

    problem = Problem(
        model=model,                                                 # at its initial weights; it is not touched
        train_loss=lambda net, batch, z: loss(net(batch[0]), batch[1], z["label_smoothing"]),
        probe_loss=lambda net, batch: loss(net(batch[0]), batch[1], 0.0),
        draw=lambda step: (one_batch(2 * step), one_batch(2 * step + 1)),
        update=UpdateRule(nesterov=True),                            # hyperparameters "lr", "wd", "momentum"
        differentiable=("label_smoothing",),
        linear=("label_smoothing",),
    )
    result = warm_start(config, Space.from_config_space(config_space), problem, Settings(step="normalized", eta=0.1))
    config = result.config                                           # train with this
    report(epoch=1, accuracy=accuracy, warm_start=result.record())   # with the first report

and where the tuning is set up::

    scheduler = OHGW(scheduler)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.ohgw.cost import count_flops as count_flops
    from harness.ohgw.cost import peak_memory as peak_memory
    from harness.ohgw.estimators import Batch as Batch
    from harness.ohgw.estimators import Estimate as Estimate
    from harness.ohgw.estimators import MissingGradient as MissingGradient
    from harness.ohgw.estimators import Net as Net
    from harness.ohgw.estimators import Objective as Objective
    from harness.ohgw.estimators import Problem as Problem
    from harness.ohgw.estimators import UpdateRule as UpdateRule
    from harness.ohgw.estimators import direct as direct
    from harness.ohgw.estimators import direct_objective as direct_objective
    from harness.ohgw.estimators import finite_difference as finite_difference
    from harness.ohgw.estimators import lookahead as lookahead
    from harness.ohgw.estimators import lookahead_objective as lookahead_objective
    from harness.ohgw.one_shot import WarmStart as WarmStart
    from harness.ohgw.one_shot import warm_start as warm_start
    from harness.ohgw.scheduler import OHGW as OHGW
    from harness.ohgw.settings import Settings as Settings

_HOMES = {
    "cost": ("count_flops", "peak_memory"),
    "estimators": (
        *("Batch", "Estimate", "MissingGradient", "Net", "Objective", "Problem", "UpdateRule"),
        *("direct", "direct_objective", "finite_difference", "lookahead", "lookahead_objective"),
    ),
    "one_shot": ("WarmStart", "warm_start"),
    "scheduler": ("OHGW",),
    "settings": ("Settings",),
}

__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Load the module that ``name`` lives in: the tuner's process needs no torch, a trial's process no Syne Tune."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
