"""The usual loop of task=xgboost: ``xgboost.train`` on a DMatrix, without evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.tasks import load_task
from harness.tasks.boosting import BoostingTask

UNIT = "boosting rounds"
ENDLESS = 1_000_000  # rounds


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """A step is a round."""
    return 1


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """A function that boosts a new model until the function it is given says so before a round."""
    task = load_task(spec, str(device))
    assert isinstance(task, BoostingTask)
    xgboost, parameters = task.xgboost, task.parameters(config, 0)

    class Stop(xgboost.callback.TrainingCallback):  # type: ignore[misc, name-defined]
        def __init__(self, finished: Callable[[], bool]):
            self.finished = finished

        def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            return self.finished()

    def train(finished: Callable[[], bool]) -> None:
        xgboost.train(parameters, task.matrices["train"], ENDLESS, callbacks=[Stop(finished)])

    return train
