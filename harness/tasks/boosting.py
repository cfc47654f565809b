"""Gradient-boosted trees (XGBoost) on tables (``tables.py``): classification and regression.

    task = BoostingTask("cpu", data="digits", metric="accuracy", max_epochs=27, rounds_per_epoch=10, space=..., ...)
    run = task.start({"lr": 0.3, "max_depth": 6}, seed=0)

Resource: boosting rounds, ``rounds_per_epoch`` of them an "epoch". A run keeps its booster, and the booster the
predictions for every part, so that an epoch costs its own rounds and no more; a checkpoint holds the booster as XGBoost
writes it (UBJSON). Missing numbers are XGBoost's own; categorical columns are split by sets of levels; a regression is
fitted to the standardised target.

Bit for bit: XGBoost draws rows and columns from generators that no file keeps. They are begun anew with every epoch
from the seed and the number of the round, in a run that was interrupted and in one that was not.

A warm start has no gradient of trees. It takes central differences (h = 0.05 in unit coordinates) of F, the validation
loss after ``warm_rounds`` rounds (default: those of one epoch) on common random numbers, at a cost of 2 d + 1 such
trainings for d continuous hyperparameters. ``ohgw.batch_size`` and ``ohgw.probe`` mean nothing here. Integers and
categories stay.

Hyperparameters: XGBoost's own, as in HYPERPARAMETERS; its learning_rate is called lr, as in every family, so that
``ohgw=masked`` finds it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from backends.context import TrialFailed, UserError
from harness.seeds import torch_seed
from harness.space import Space
from harness.tasks import tables

if TYPE_CHECKING:
    from harness.ohgw import Objective, Settings

HYPERPARAMETERS = (
    "lr", "subsample", "colsample_bytree", "colsample_bylevel", "colsample_bynode", "reg_lambda", "reg_alpha", "gamma",
    "min_child_weight", "max_delta_step", "max_depth", "max_leaves", "grow_policy", "num_parallel_tree",
    "max_cat_to_onehot", "max_cat_threshold", "scale_pos_weight",
)  # fmt: skip
ANY_NUMBER = 1 << 62  # of examples in a warm start's batches: it has none
SEED_BITS = 31  # XGBoost's seed is a C int


class BoostingTask:
    """A table (``tables.load``) in XGBoost's own form. Keys of the YAML that only the driver reads are ignored.

    Errors: UserError if XGBoost is not installed, for data that are not there, for a hyperparameter that it has not."""

    def __init__(
        self,
        device: str,
        *,
        data: str,
        metric: str,
        max_epochs: int,
        rounds_per_epoch: int,
        space: str,
        spaces: Mapping[str, Any],
        warm_rounds: int | None = None,
        target: str | None = None,
        kind: str = "auto",
        header: bool = True,
        categorical: Sequence[str] = (),
        data_dir: str | None = None,
        label_noise: float = 0.0,
        **_driver: Any,
    ):
        self.xgboost = imported()
        self.device, self.max_epochs, self.rounds_per_epoch = torch.device(device), max_epochs, rounds_per_epoch
        self.warm_rounds = warm_rounds or rounds_per_epoch
        self.space = Space.from_spec(spaces[space])
        self.check([*self.space, *self.space.constants])
        self.table = tables.load(data, metric=metric, target=target, kind=kind, header=header, categorical=categorical,
                                 data_dir=data_dir, label_noise=label_noise)  # fmt: skip
        self.sizes = {name: len(part) for name, part in self.table.parts.items()}
        self.targets = {name: part.target for name, part in self.table.parts.items()}
        self.matrices = {name: self.matrix(name) for name in self.table.parts}

    def matrix(self, part: str) -> Any:
        """A part as XGBoost takes it; the training part in bins already (on a GPU XGBoost makes them itself)."""
        data = self.table.parts[part]
        make = self.xgboost.DMatrix
        if part == "train" and self.device.type == "cpu":
            make = self.xgboost.QuantileDMatrix
        types = ["q"] * len(self.table.numeric) + ["c"] * len(self.table.levels)
        x = np.concatenate([data.numeric.numpy(), data.levels.numpy()], axis=1, dtype=np.float32)
        return make(x, data.target.numpy(), feature_types=types, enable_categorical=True, nthread=threads())

    def check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in HYPERPARAMETERS:
                raise UserError(f"XGBoost has no hyperparameter {name!r} here; it has {', '.join(HYPERPARAMETERS)}")

    def largest_warm_start(self, probe: str) -> int:
        """There are no batches."""
        return ANY_NUMBER

    def start(self, config: Mapping[str, Any], seed: int) -> "BoostingRun":
        return BoostingRun(self, config, seed)

    def parameters(self, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """XGBoost's, of a configuration."""
        self.check(list(config))
        k = len(self.table.classes)
        objective = {0: "reg:squarederror", 2: "binary:logistic"}.get(k, "multi:softprob")
        classes = {"num_class": k} if k > 2 else {}
        named = {"learning_rate" if name == "lr" else name: value for name, value in config.items()}
        return {**named, **classes, "objective": objective, "tree_method": "hist", "device": str(self.device),
                "nthread": threads(), "seed": seed, "seed_per_iteration": True, "verbosity": 1}  # fmt: skip

    def booster(self, parameters: Mapping[str, Any], content: bytes | None = None) -> Any:
        """A new booster, or the one that ``content`` is of."""
        model = bytearray(content) if content else None
        return self.xgboost.Booster(dict(parameters), list(self.matrices.values()), model)

    def scores(self, booster: Any, part: str) -> dict[str, float]:
        """``Table.scores`` of a part. The booster keeps its predictions and adds only its new trees."""
        margin = torch.from_numpy(booster.predict(self.matrices[part], output_margin=True))
        if len(self.table.classes) == 2:
            margin = torch.stack([torch.zeros_like(margin), margin], dim=1)
        output = margin.view(len(margin), -1)
        return self.table.scores(self.table.statistics(output, self.targets[part]), len(margin))


class BoostingRun:
    """One configuration in training."""

    def __init__(self, task: BoostingTask, config: Mapping[str, Any], seed: int):
        self.task, self.seed, self.epoch = task, seed, 0
        self.reconfigure(config)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Train with ``config`` from now on; only before epoch 1."""
        self.config = dict(config)
        self.parameters = self.task.parameters(config, seed(self.seed, "boosting"))
        self.booster = self.task.booster(self.parameters)

    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Add the rounds of an epoch; None (and a run to be thrown away) if ``should_stop`` said so before a round.

        Errors: TrialFailed when the loss is not finite.
        """
        n, train = self.task.rounds_per_epoch, self.task.matrices["train"]
        if self.epoch:
            self.booster.load_config(self.booster.save_config())  # begins the generators of rows and columns anew
        for round in range(self.epoch * n, (self.epoch + 1) * n):
            if should_stop():
                return None
            self.booster.update(train, round)
        self.epoch += 1
        found = self.task.scores(self.booster, "train")
        if not math.isfinite(found["loss"]):
            raise TrialFailed(f"training loss is {found['loss']}")
        return {"train_loss": found["loss"], "train_score": found["score"], "flops": 0}

    def evaluate(self, part: str) -> dict[str, float]:
        return self.task.scores(self.booster, part)

    def problem(self, settings: "Settings") -> "Objective":
        """F of the continuous hyperparameters."""
        from harness.ohgw import Objective

        return Objective(self._loss_after_warm_rounds, tuple(self.task.space.continuous), "trees have none")

    def _loss_after_warm_rounds(self, config: Mapping[str, Any], step: int) -> float:
        task = self.task
        booster = task.booster(task.parameters({**self.config, **config}, seed(self.seed, "warm_start", step)))
        for round in range(task.warm_rounds):
            booster.update(task.matrices["train"], round)
        return task.scores(booster, "validation")["loss"]

    def state_dict(self) -> dict[str, Any]:
        """The booster as bytes and the epoch; hyperparameters belong to the configuration."""
        content = self.booster.save_raw("ubj") if self.epoch else bytearray()
        return {"epoch": self.epoch, "booster": torch.from_numpy(np.frombuffer(content, np.uint8).copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        content: Tensor = state["booster"]
        self.booster = self.task.booster(self.parameters, content.cpu().numpy().tobytes())


def imported() -> Any:
    """The module xgboost."""
    try:
        import xgboost
    except ImportError:
        raise UserError("this task needs XGBoost; install it with: pip install 'ohgw-harness[boosting]'") from None
    return xgboost


def threads() -> int:
    """As many as torch may use: those of the worker."""
    return torch.get_num_threads()


def seed(seed: int, *name: str | int) -> int:
    """A seed of XGBoost, from the stream ``name``."""
    return torch_seed(seed, *name) >> (63 - SEED_BITS)
