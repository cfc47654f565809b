"""``tracker=wandb`` and ``tracker=auto``: one W&B run a cell, online where somebody is logged in, else offline."""

import contextlib
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import record
from harness.record import CellPaths
from harness.recorder import Progress
from harness.sweep import Cell
from harness.tracking import MissingPackage, NoTracker, Outcome, Tracker, account, content
from harness.tracking.content import History, Table

INIT_SECONDS = 30.0  # for W&B to answer when a run starts, else it is kept offline
FINISH_SECONDS = 60.0  # for what is left to be uploaded when a run ends, else it is kept on disk
SERVICE_SECONDS = 10.0  # for W&B's service process to end


def auto(project: str = "ohgw", entity: str | None = None, interval: float = 15.0) -> Tracker:
    """``tracker=auto``: W&B if somebody is logged in (``account.configured``), else no tracker."""
    if not account.configured():
        return NoTracker()
    return WandbTracker(project, entity, interval, chosen=False)


class WandbTracker(Tracker):
    """One W&B run a cell: id ``content.run_id``, group scheduler/task, job type the variant, name the cell's folder.

    Online if there is an API key, else offline; never a prompt. ``WANDB_MODE`` and ``wandb offline`` are obeyed. A
    server that does not answer when a run starts, or does not take its end, makes the runs from then on offline ones.
    All runs keep a copy in ``<results_dir>/<name>/wandb``, from which ``wandb sync`` uploads what never arrived.

    Requests: history goes out once every ``interval`` seconds (``content.History``, with W&B's own transmit interval
    set to the same), 4 a minute and cell by default: 256 a minute from 64 cells at a time, or 4 a second, where W&B
    allows hundreds a second for a project. A run's start and end are about 50 requests more: tables and the artifact
    are sent once, at the end. System metrics, console output, code, requirements and the client's own telemetry are not
    sent.

    A cell that goes on after an interruption goes on in its run. Online, it adds the steps that W&B does not have yet.
    Offline, ``wandb sync`` writes a folder over what it uploaded of the same run before (wandb/wandb issue 3841): the
    folder of the new attempt has the whole history, and those of earlier attempts are removed.

    :param project: W&B project
    :param entity: W&B team or user; None for the default one
    :param interval: seconds between two bursts of history rows
    :param chosen: False: by ``auto``, which tells the user
    """

    def __init__(self, project: str = "ohgw", entity: str | None = None, interval: float = 15.0, chosen: bool = True):
        self.project, self.entity, self.interval, self.chosen = project, entity, interval, chosen
        self._say: Callable[[str], None] = lambda line: None
        self._wandb: Any = None
        self._run: Any = None
        self._mode = ""
        self._data_dir = False  # set by this tracker
        self._offline: dict[Path, None] = {}  # folders that hold offline runs of this command

    def open(self, say: Callable[[str], None]) -> None:
        self._say = say
        if not self.chosen:
            self._say(f"W&B: the cells are shown in your project {self.project}; tracker=none turns this off")

    def start(self, cell: Cell, folder: Path, run: str) -> None:
        self._set_up(folder.parent)
        self._cell, self._folder, self._id = cell, folder, run
        self._history = History(cell, folder, self.interval)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._begin()
        except BaseException:
            self._abandon()
            raise

    def _begin(self) -> None:
        if self._mode == "online":
            try:
                self._run = self._init("online")
            except Exception as error:
                self._mode = "offline"
                end_service(self._wandb)  # its service holds on to the run that did not start
                self._wandb.setup(self._wandb.Settings(silent=True))
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._say(f"warning: W&B cannot be reached ({reason}); runs are kept offline")
        if self._run is None:
            if self._mode == "offline":
                self._remove_earlier()
            self._run = self._init(self._mode)
        if self._mode == "offline":
            self._offline[Path(self._run.dir).parent.parent] = None
        for axis in content.AXES:
            self._run.define_metric(axis)
        for shown in ("incumbent/*", "rung/*", "trials", "failures"):
            self._run.define_metric(shown, step_metric="wallclock")

    def _remove_earlier(self) -> None:
        for attempt in (self._folder.parent / "wandb").glob(f"offline-run-*_*-{self._id}"):
            shutil.rmtree(attempt)

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        self._log(self._history.add(event, progress))

    def finish(self, outcome: Outcome, summary: dict[str, Any] | None) -> None:
        run, self._run = self._run, None
        try:
            self._log(self._history.rest(), run)
            if outcome != "interrupted":  # whoever interrupts does not want to wait, and the cell will go on
                self._log_end(run, outcome, summary)
        finally:
            self._finish(run, 0 if outcome == "finished" else 1)

    def close(self) -> None:
        if self._wandb is None:
            return
        try:
            self._abandon()
        finally:
            for folder in self._offline:
                shown = self._shown(folder)
                runs = f"{shlex.quote(shown)}/offline-run-*"
                self._say(f"W&B: this command's runs are offline, in {shown}; to upload them: wandb sync {runs}")
            end_service(self._wandb)
            if self._data_dir:
                del os.environ["WANDB_DATA_DIR"]

    def _abandon(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._finish(run, 1)

    def _finish(self, run: Any, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self._mode = "offline"
            rest = shlex.quote(self._shown(Path(run.dir).parent))
            self._say(
                f"warning: W&B did not take all of a run within {FINISH_SECONDS:.0f} s; to upload the rest: wandb sync "
                f"{rest}; from now on runs are kept offline"
            )

    @staticmethod
    def _shown(folder: Path) -> str:
        return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)

    def _set_up(self, study: Path) -> None:
        """Import W&B and find out the mode; once a command. W&B's service process serves all runs from then on."""
        if self._wandb is not None:
            return
        try:
            import wandb
        except ImportError as error:
            raise MissingPackage(f"tracker=wandb needs W&B's package ({error}): pip install wandb") from None
        self._wandb = wandb
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its client's own telemetry: as many requests again
        if "WANDB_DATA_DIR" not in os.environ:  # copies that offline runs upload later: beside them
            os.environ["WANDB_DATA_DIR"], self._data_dir = str(study / "wandb"), True
        given = wandb.setup(wandb.Settings(silent=True)).settings.mode
        logged_in = account.configured() and (wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
        self._mode = given if given != "online" else "online" if logged_in else "offline"

    def _init(self, mode: str) -> Any:
        wandb, cell = self._wandb, self._cell
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=self._id,
            resume="allow",
            name=cell.folder,
            group=f"{cell.scheduler}/{cell.task}",
            job_type=cell.variant,
            config=cell.config,
            dir=str(self._folder.parent),  # not the cell's folder: that may be replaced when the cell goes on
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                x_disable_meta=True,  # meta.json has it
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_file_stream_transmit_interval=max(self.interval, 1.0),
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def _log(self, rows: list[content.Row], run: Any = None) -> None:
        run = run or self._run
        try:
            for row in rows:
                if row.step >= run.starting_step:
                    run.log(row.values, step=row.step, commit=True)
        except BaseException:
            self._history.put_back(rows)  # W&B leaves out the steps that it has
            raise

    def _log_end(self, run: Any, outcome: Outcome, summary: Mapping[str, Any] | None) -> None:
        wandb, cell = self._wandb, self._cell
        if summary is not None:
            run.summary.update(content.flat_summary(cell, summary))
        events, _ = record.read_events(CellPaths.of(self._folder).events)
        trials = content.trial_table(events, cell.config["task"].get("mode", "max"))
        rungs = content.rung_table(events, content.levels(cell.config))
        shown = self._table(rungs)
        run.log(
            {
                "trial_table": self._table(trials),
                "rung_table": self._table(rungs),
                "rung_survival": wandb.plot.bar(shown, "level", "trials", title="Trials that reached a rung"),
            }
        )
        artifact = wandb.Artifact(
            f"cell-{self._id}",
            type="cell",
            metadata={"folder": cell.folder, "name": cell.config["name"], "identity": cell.identity},
        )
        for file in content.files(self._folder):  # a failed cell's folder is renamed when it is run again: a copy
            artifact.add_file(str(file), policy="immutable" if outcome == "finished" else "mutable", skip_cache=True)
        run.log_artifact(artifact)

    def _table(self, table: Table) -> Any:
        return self._wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)


def end_service(wandb: Any, seconds: float = SERVICE_SECONDS) -> None:
    """End W&B's service process, waiting for no more than ``seconds``.

    W&B waits at exit for as long as it takes, which with a server that does not answer can be for ever (seen in 0.31);
    the service ends by itself once this process has.
    """

    def end() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(seconds)
