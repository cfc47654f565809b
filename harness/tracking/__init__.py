"""Experiment trackers: one run a cell, in W&B (``wandb.py``) or MLflow (``mlflow.py``); a tracker that fails warns once
and the experiment goes on.

``conf/tracker/<name>.yaml`` names a class (or a function that makes a tracker) by ``_target_``; its other entries are
the arguments. One tracker serves all cells of a command. The tracker's own package is imported when the first cell
starts, never by these modules. ``content.py`` has what all trackers show of a cell.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from harness.instantiate import instantiate
from harness.recorder import Progress
from harness.sweep import Cell
from harness.tracking import content

Outcome = Literal["finished", "failed", "interrupted"]
FAILING_CELLS = 3  # in a row, until the tracker is left out for the rest of the command


class MissingPackage(Exception):
    """A tracker's own package is not installed; the message says how to install it."""


class Tracker:
    """What cells tell a tracker; by itself it does nothing. Any method may raise: see ``Guarded``."""

    def open(self, say: Callable[[str], None]) -> None:
        """Called once, before the first cell; ``say`` shows the user a line, now and later."""

    def start(self, cell: Cell, folder: Path, run: str) -> None:
        """A cell begins or goes on; ``folder`` is where its record is, or will be, written, ``run`` the id of its run
        (``content.run_id``): one that is known already goes on."""

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        """An event that was just recorded, and the cell's running totals including it."""

    def finish(self, outcome: Outcome, summary: dict[str, Any] | None) -> None:
        """The cell has ended; ``summary`` (summary.json) is None unless it is finished."""

    def close(self) -> None:
        """Called once, after the last cell, whatever happened before."""


class NoTracker(Tracker):
    """``tracker=none``."""


class Guarded:
    """A tracker whose failures never reach the experiment.

    The first failure is shown, later ones are not. A cell whose run failed to start, or failed later, is told nothing
    more but its end, so that the run is closed; the next cell tries again, until ``FAILING_CELLS`` in a row failed.

    :param spec: a config's ``tracker`` entry: ``_target_`` and its arguments
    :param say: shows the user a line
    :param now: unix seconds at which the command began, as in meta.json
    """

    def __init__(self, spec: Mapping[str, Any], say: Callable[[str], None], now: float):
        self._say, self._now = say, now
        self._run: tuple[Cell, Path, str] | None = None
        self._tracker = Tracker()
        self._started = self._sound = self._warned = self._off = False
        self._failing = 0  # cells in a row
        try:
            self._tracker = instantiate(spec)
            self._tracker.open(say)
        except Exception as error:
            self._failed(error)
            self._off = True

    def start(self, cell: Cell, folder: Path) -> None:
        self._started = False
        if not self._off:
            self._sound = True
            self._started = self._try(lambda: self._start(cell, folder))

    def _start(self, cell: Cell, folder: Path) -> None:
        self._run = (cell, folder, content.run_id(cell, folder, self._now))
        self._tracker.start(*self._run)

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        if self._started and event.get("run") == 1:
            self._try(self._check_record)
        if self._started and self._sound:
            self._try(lambda: self._tracker.event(event, progress))

    def _check_record(self) -> None:
        """A record is begun; if there was one to continue when the run started, it was set aside: start another run."""
        assert self._run is not None
        cell, folder, run = self._run
        if run != content.run_id(cell, folder, self._now):
            self.finish("interrupted", None)
            self.start(cell, folder)

    def finish(self, outcome: Outcome, summary: dict[str, Any] | None) -> None:
        if self._started:
            self._try(lambda: self._tracker.finish(outcome, summary))
        self._started = False
        if self._off:
            return
        self._failing = 0 if self._sound else self._failing + 1
        if self._failing == FAILING_CELLS:
            self._off = True
            self._say(f"the tracker failed in {FAILING_CELLS} cells in a row: the other cells run without it")

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._sound = False
        if not self._warned:
            kind = "" if isinstance(error, MissingPackage) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            with contextlib.suppress(Exception):
                self._say(f"warning: the tracker failed ({reason}); the experiment goes on without it")
        self._warned = True
        self._off = self._off or isinstance(error, MissingPackage)
