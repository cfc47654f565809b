"""Tasks that go wrong on purpose, for tests of what the harness makes of it."""

from collections.abc import Mapping
from typing import Any

from harness.tasks.supervised import SupervisedRun
from harness.tasks.vision import Digits


class AlwaysRaises(Digits):
    """A broken task: no trial ever reports."""

    def start(self, config: Mapping[str, Any], seed: int) -> SupervisedRun:
        raise ZeroDivisionError("this task is broken")


class Unlucky(Digits):
    """Trials fail in different ways, by the range that their momentum is in."""

    def start(self, config: Mapping[str, Any], seed: int) -> SupervisedRun:
        return _UnluckyRun(self, config, seed)


class _UnluckyRun(SupervisedRun):
    def train_epoch(self, should_stop: Any) -> Any:
        kind = int(self.config["momentum"] / 0.99 * 6)
        print("momentum", self.config["momentum"])
        if kind == 1:
            raise ZeroDivisionError("bad luck")
        if kind == 2:
            raise MemoryError("no memory left")
        if kind == 3:
            self.net.get_parameter("1.weight").data.fill_(float("nan"))
        return super().train_epoch(should_stop)
