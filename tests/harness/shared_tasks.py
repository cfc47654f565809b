"""Tasks for tests of trials on several processes."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.tasks.supervised import SupervisedRun
from harness.tasks.vision import Digits


class DoubleDigits(Digits):
    """Digits in float64; ``model: groupnorm`` is a convolutional network with GroupNorm."""

    def network(self, seed: int) -> nn.Module:
        if self.model != "groupnorm":
            return super().network(seed).double()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**32)
            layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
            return nn.Sequential(*layers).double()

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return super().normalised(images, torch.float64)

    def epoch_draws(self, config: Mapping[str, Any], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        order, draws = super().epoch_draws(config, seed, epoch)
        return order, draws.double()


class Faulty(Digits):
    """``momentum`` chooses what goes wrong in an epoch, and in which process (0: all is well)."""

    def start(self, config: Mapping[str, Any], seed: int) -> SupervisedRun:
        return _FaultyRun(self, config, seed)


class _FaultyRun(SupervisedRun):
    def train_epoch(self, should_stop: Any) -> Any:
        kind, rank = divmod(round(self.config["momentum"] * 100), 10)
        if kind == 1 and self.task.group.rank == rank:
            raise MemoryError("no memory left")
        if kind == 2:
            raise ZeroDivisionError("everywhere")
        return super().train_epoch(should_stop)


class Mortal(Digits):
    """In the second epoch rank 1 is killed, once: while the file is there that the variable ``label`` names."""

    label = "KILL_RANK_ONE"

    def start(self, config: Mapping[str, Any], seed: int) -> SupervisedRun:
        return _MortalRun(self, config, seed)


class _MortalRun(SupervisedRun):
    def train_epoch(self, should_stop: Any) -> Any:
        order = Path(os.environ.get(Mortal.label, "/nonexistent"))
        if self.epoch == 1 and self.task.group.rank == 1 and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_epoch(should_stop)
