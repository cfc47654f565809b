"""Tasks: one file a family, one YAML in ``conf/task/`` a task; nothing outside them knows a data set.

A task is built from its YAML (``_target_`` names the class) and keeps its data on the device.
``task.start(config, seed)`` returns a *run*, the training of one configuration, driven by ``harness/trial.py``:

    epoch                       epochs trained so far
    reconfigure(config)         before epoch 1: x' replaces x
    problem(settings)           what OHGW needs at the initial weights: a Problem; an Objective if there is no gradient
                                but a loss to take differences of; None if the task cannot be warm-started
    train_epoch(should_stop)    {"train_loss", "train_score", "flops"}; None if it was stopped half-way
    evaluate(part)              {"loss", "score"} of "validation" or "test"; more keys, as "f1", are recorded too
    state_dict(), load_state_dict(state)
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from harness.instantiate import instantiate
from harness.space import Space

if TYPE_CHECKING:
    from harness.ohgw import Objective, Problem, Settings


class Run(Protocol):
    """One configuration in training; see the module's docstring."""

    @property
    def epoch(self) -> int: ...
    def reconfigure(self, config: Mapping[str, Any]) -> None: ...
    def problem(self, settings: "Settings") -> "Problem | Objective | None": ...
    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None: ...
    def evaluate(self, part: str) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Task(Protocol):
    """Data, model and search space; ``max_epochs`` is the full training of a trial."""

    space: Space
    max_epochs: int

    def largest_warm_start(self, probe: str) -> int:
        """The most examples a warm start's batches can have, with the second one from "train" or "val"."""

    def start(self, config: Mapping[str, Any], seed: int) -> Run:
        """A run at its initial weights, which depend on ``seed`` alone."""


def load_task(spec: Mapping[str, Any], device: str) -> Task:
    """The task of a YAML's ``task`` entry, its data resident on ``device``; kept for the next trial of this process."""
    return _load(json.dumps(spec, sort_keys=True), device)


@functools.lru_cache(maxsize=2)  # a worker serves one task at a time; the data of many would fill a GPU
def _load(spec: str, device: str) -> Task:
    content = json.loads(spec)
    if content.get("gpus_per_trial", 1) > 1:
        from harness.tasks.distributed import SharedTask

        return SharedTask(content, device)
    return instantiate(content, device=device)
