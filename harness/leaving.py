"""How a process that Slurm is about to end learns of it: one exception, raised once, with the time that is left."""

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any


class Leaving(KeyboardInterrupt):
    """The time limit is near, or the job is preempted or cancelled. ``grace``: seconds for workers to checkpoint."""

    def __init__(self, grace: float):
        super().__init__(f"{grace:.0f} s left")
        self.grace = grace


class Notice:
    """Which signal came first, None so far."""

    arrived: signal.Signals | None = None


@contextlib.contextmanager
def leaving_on(graces: Mapping[signal.Signals, float]) -> Iterator[Notice]:
    """Raise ``Leaving`` at the first of these signals, with its grace in seconds; later ones do not disturb the end."""
    notice = Notice()

    def leave(number: int, frame: Any) -> None:
        if notice.arrived is None:
            notice.arrived = signal.Signals(number)
            raise Leaving(graces[notice.arrived])

    before = {number: signal.signal(number, leave) for number in graces}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
