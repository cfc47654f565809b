"""Experiment trackers. One run a cell; a tracker that fails warns once and the experiment goes on without it.

``conf/tracker/<name>.yaml`` names a class here by ``_target_``; its other entries are the constructor's arguments.
The tracker's own package is imported only when a cell starts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from harness.recorder import Progress
from harness.sweep import Cell


class Tracker(Protocol):
    """What a cell tells a tracker."""

    def start(self, cell: Cell, folder: Path) -> None: ...

    def event(self, event: dict[str, Any], progress: Progress) -> None: ...

    def finish(self, summary: dict[str, Any] | None) -> None:
        """``summary`` is None if the cell was interrupted or failed."""


class NoTracker:
    """``tracker=none``."""

    def start(self, cell: Cell, folder: Path) -> None:
        pass

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        pass

    def finish(self, summary: dict[str, Any] | None) -> None:
        pass


class WandbTracker:
    """``tracker=wandb``: one W&B run a cell; offline (``wandb sync`` later) when nobody is logged in, never a prompt.

    :param project: W&B project
    :param entity: W&B team or user; None for the default one
    """

    def __init__(self, project: str = "ohgw", entity: str | None = None):
        self.project, self.entity = project, entity

    def start(self, cell: Cell, folder: Path) -> None:
        import wandb

        logged_in = wandb.Settings().api_key or wandb.api.api_key
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            id=f"{cell.config['name']}-{cell.identity}",
            resume="allow",  # an interrupted cell goes on in its own run
            name=cell.folder,
            group=f"{cell.scheduler}/{cell.task}",
            job_type=cell.variant,
            config=cell.config,
            dir=str(folder),
            mode="online" if logged_in else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        if event["e"] != "report":
            return
        result = event["result"]
        row = {key: value for key, value in result.items() if isinstance(value, int | float)}
        row |= {"trial": event["trial"], "wallclock": event["t"], "gpu_hours": progress.gpu_seconds / 3600}
        self.run.log(row | {"incumbent/validation_score": progress.best, "trials": len(progress.trials)})

    def finish(self, summary: dict[str, Any] | None) -> None:
        if summary:
            self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        self.run.finish(exit_code=0 if summary else 1)


class Guarded:
    """A tracker whose failures are reported once and otherwise ignored."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]):
        self._tracker, self._warn, self._alive = tracker, warn, True

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._tracker, name)

        def call(*arguments: Any) -> None:
            if not self._alive:
                return
            try:
                method(*arguments)
            except Exception as error:
                self._alive = False
                self._warn(f"the tracker failed ({type(error).__name__}: {error}); the experiment goes on without it")

        return call
