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

from harness.ohgw.cost import count_flops, peak_memory
from harness.ohgw.estimators import (
    Batch,
    Estimate,
    MissingGradient,
    Net,
    Problem,
    UpdateRule,
    direct,
    direct_objective,
    finite_difference,
    lookahead,
    lookahead_objective,
)
from harness.ohgw.scheduler import OHGW
from harness.ohgw.warm_start import Settings, WarmStart, warm_start

__all__ = [
    "OHGW",
    "Batch",
    "Estimate",
    "MissingGradient",
    "Net",
    "Problem",
    "Settings",
    "UpdateRule",
    "WarmStart",
    "count_flops",
    "direct",
    "direct_objective",
    "finite_difference",
    "lookahead",
    "lookahead_objective",
    "peak_memory",
    "warm_start",
]
