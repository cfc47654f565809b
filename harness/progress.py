"""What the user sees while a sweep runs: a live display on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from harness.recorder import Recorder
from harness.sweep import Cell

PLAIN_SECONDS = 15.0  # between two lines about the same cell when the output is not a terminal
LIVE_SECONDS = 0.1  # between two updates of the live display: it must cost nothing beside the training


class Display:
    """Progress of a sweep; a context manager.

    :param console: where to draw; ``console.is_terminal`` decides between the live display and plain lines
    :param total: cells of the sweep
    :param done: cells that were finished before
    """

    def __init__(self, console: Console, total: int, done: int):
        self.console, self.total, self.done = console, total, done
        self._begun, self._ran, self._shown = 0.0, 0, 0.0
        self._cell = ""
        self._budget: float | None = None
        self._live: Progress | None = None
        self._sweep_bar = self._cell_bar = TaskID(0)
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
                TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=console,
                refresh_per_second=2,  # its own thread, so that the clock moves during long epochs
                transient=True,
                expand=True,
            )
            self._sweep_bar = self._live.add_task("cells", total=total, completed=done, note="")
            self._cell_bar = self._live.add_task("epochs", total=None, note="", visible=False)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def message(self, text: str) -> None:
        """A line that stays on the screen."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_cell(self, cell: Cell, resumed: bool) -> None:
        self._budget = cell.config["budget"]["epochs"]
        self._cell = f"{cell.scheduler} {cell.variant} seed {cell.seed}" if self._live else cell.folder
        self._shown = time.monotonic()
        self._begun = self._begun or self._shown  # the workers' start-up says nothing of the time left
        if self._live:
            self._live.reset(self._cell_bar, total=self._budget, note="", visible=True)
        if resumed:
            self.message(f"{cell.folder}: continuing where it stopped")

    def update(self, recorder: Recorder, event: dict[str, Any]) -> None:
        """Called after every recorded event."""
        now = time.monotonic()
        if now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        progress = recorder.progress
        best = "-" if progress.best is None else f"{progress.best:.4f}"
        note = f"{len(progress.trials)} trials  best {best}"
        note = f"{note}  {self._cell}" if self._live else f"{self._cell}  {note}"
        if self._live:
            self._live.update(self._cell_bar, completed=progress.epochs, note=note)
            self._live.update(self._sweep_bar, note=self._time_left())
        else:
            of = f"/{self._budget}" if self._budget else ""
            self.message(f"{self.done}/{self.total} cells  {note}  {progress.epochs}{of} epochs  {self._time_left()}")

    def finish_cell(self, cell: Cell, outcome: str) -> None:
        """``outcome``: one clause for the plain log, such as "best 0.97 in 31 trials"."""
        self.done += 1
        self._ran += 1
        if self._live:
            self._live.update(self._sweep_bar, completed=self.done, note=self._time_left())
        else:
            self.message(f"{self.done}/{self.total} cells  {cell.folder}  {outcome}  {self._time_left()}")

    def _time_left(self) -> str:
        if not self._ran:
            return ""
        seconds = (time.monotonic() - self._begun) / self._ran * (self.total - self.done)
        return f"about {duration(seconds)} left" if seconds else ""


def duration(seconds: float) -> str:
    """``75`` -> ``"1 min 15 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
