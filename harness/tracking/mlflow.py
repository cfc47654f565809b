"""``tracker=mlflow``: one MLflow run a cell, on a server or in a SQLite file beside the results."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from harness import record
from harness.record import CellPaths
from harness.recorder import Progress
from harness.sweep import Cell
from harness.tracking import MissingPackage, Outcome, Tracker, content
from harness.tracking.content import History, Row

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
PARAMS_A_BATCH, METRICS_A_BATCH = 100, 1000  # MLflow's limits for a request
PARAM_LENGTH, TAG_LENGTH = 6000, 8000  # and for a value, in characters
SETTINGS = {  # of MLflow's client, unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # when a cell starts or ends, the experiment waits meanwhile
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # which of its pages MLflow shows

T = TypeVar("T")


class MlflowTracker(Tracker):
    """One MLflow run a cell, in the experiment ``project``; its tag ``cell_id`` (``content.run_id``) says to which
    record it belongs, and a cell that goes on after an interruption finds its run by it. Ends FINISHED, FAILED or
    KILLED.

    Parameters are the flattened config, metrics the history (``content.History``: one request every ``interval``
    seconds, sent by a thread, so that a slow server holds no cell up) and the numbers of summary.json, tags its texts;
    the record's files are artifacts under ``cell/``, the trial table and the rung table ``trial_table.json`` and
    ``rung_table.json``. ``rung_survival`` is a metric whose step is the rung level.

    :param project: MLflow experiment
    :param uri: tracking server (``http://...``) or database; None: ``sqlite:///<results_dir>/mlflow.db``, files in
        ``<results_dir>/mlflow-artifacts``; look at it with ``mlflow ui --backend-store-uri <uri>``
    :param interval: seconds between two bursts of metrics
    """

    def __init__(self, project: str = "ohgw", uri: str | None = None, interval: float = 15.0):
        self.project, self.uri, self.interval = project, uri, interval
        self._say: Callable[[str], None] = lambda line: None
        self._mlflow: Any = None
        self._client: Any = None
        self._experiment = ""
        self._run: str | None = None
        self._thread = ThreadPoolExecutor(1, "mlflow")  # started by the first burst
        self._sending: tuple[Future[None], Sequence[Row]] | None = None

    def open(self, say: Callable[[str], None]) -> None:
        self._say = say

    def start(self, cell: Cell, folder: Path, run: str) -> None:
        self._set_up(Path(cell.config["results_dir"]).absolute())
        self._cell, self._folder, self._step = cell, folder, 0
        self._history = History(cell, folder, self.interval)
        known = self._client.search_runs([self._experiment], f"tags.cell_id = '{run}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
            self._step = int(known[0].data.metrics.get("epochs", 0))
            self._client.update_run(self._run, status="RUNNING")
        else:
            group = f"{cell.scheduler}/{cell.task}"
            tags = {"cell_id": run, "group": group, "job_type": cell.variant, "variant": cell.variant,
                    "seed": str(cell.seed)}  # fmt: skip
            self._run = self._client.create_run(self._experiment, tags=tags, run_name=cell.folder).info.run_id
        try:
            if not known or not known[0].data.params:  # MLflow refuses to change a parameter
                self._log_params()
        except BaseException:
            self._end("failed")
            raise

    def event(self, event: dict[str, Any], progress: Progress) -> None:
        rows = self._history.add(event, progress)
        if not rows:
            return
        if self._sending is not None and not self._sending[0].done():
            self._history.put_back(rows)  # they go with the next burst
            return
        self._wait()
        self._sending = self._thread.submit(self._log_rows, rows), rows

    def _wait(self) -> None:
        """Wait until the last burst is sent. Raises what prevented it; its rows are then among the rest."""
        sending, self._sending = self._sending, None
        if sending is not None:
            try:
                sending[0].result()
            except BaseException:
                self._history.put_back(sending[1])
                raise

    def finish(self, outcome: Outcome, summary: dict[str, Any] | None) -> None:
        try:
            with contextlib.suppress(Exception):  # it is tried again here
                self._wait()
            self._log_rows(self._history.rest())
            if outcome != "interrupted":  # whoever interrupts does not want to wait, and the cell will go on
                self._log_end(summary)
        finally:
            self._end(outcome)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._run is not None:
            self._end("interrupted")
        if self._client is not None and self.uri is None:
            command = f"mlflow ui --backend-store-uri {self._uri}"
            self._say(f"MLflow: this command's runs are in {self._uri}; to look at them: {command}")

    def _set_up(self, results_dir: Path) -> None:
        """Import MLflow and find or make the experiment; once a command."""
        if self._client is not None:
            return
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
        except ImportError as error:
            install = "pip install 'ohgw-harness[mlflow]'"
            raise MissingPackage(f"tracker=mlflow needs MLflow ({error}): {install}") from None
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self._mlflow = mlflow
        self._uri = self.uri or f"sqlite:///{results_dir / 'mlflow.db'}"
        client = mlflow.MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        artifacts = None if self.uri else (results_dir / "mlflow-artifacts").as_uri()
        experiment = client.get_experiment_by_name(self.project)
        if experiment is None:
            try:
                self._experiment = client.create_experiment(self.project, artifacts, EXPERIMENT_TAGS)
            except mlflow.exceptions.MlflowException:  # another command has just made it
                experiment = client.get_experiment_by_name(self.project)
                if experiment is None:
                    raise
        if experiment is not None:
            self._experiment = experiment.experiment_id
        self._client = client

    def _end(self, outcome: Outcome) -> None:
        run, self._run = self._run, None
        self._client.set_terminated(run, STATUS[outcome])

    def _log_params(self) -> None:
        make = self._mlflow.entities.Param
        params = [make(key, str(value)[:PARAM_LENGTH]) for key, value in content.flat(self._cell.config).items()]
        for batch in _batches(params, PARAMS_A_BATCH):
            self._client.log_batch(self._run, params=batch)

    def _log_rows(self, rows: Sequence[Row]) -> None:
        rows = [row for row in rows if row.step > self._step]
        self._log_metrics([(key, value, row.step) for row in rows for key, value in row.values.items()])
        self._step = max([self._step, *(row.step for row in rows)])

    def _log_metrics(self, numbers: Iterable[tuple[str, float, int]]) -> None:
        now, make = int(time.time() * 1000), self._mlflow.entities.Metric
        metrics = [make(key, float(value), now, step) for key, value, step in numbers if math.isfinite(value)]
        for batch in _batches(metrics, METRICS_A_BATCH):
            self._client.log_batch(self._run, metrics=batch)

    def _log_end(self, summary: dict[str, Any] | None) -> None:
        client, cell, run = self._client, self._cell, self._run
        events, _ = record.read_events(CellPaths.of(self._folder).events)
        trials = content.trial_table(events, cell.config["task"].get("mode", "max"))
        rungs = content.rung_table(events, content.levels(cell.config))
        self._log_metrics([("rung_survival", count, level) for level, count in rungs.rows])
        if summary is not None:
            values = content.flat_summary(cell, summary)
            texts = {key: value for key, value in values.items() if isinstance(value, str)}
            self._log_metrics([(key, value, self._step) for key, value in values.items() if key not in texts])
            make = self._mlflow.entities.RunTag
            client.log_batch(run, tags=[make(key, value[:TAG_LENGTH]) for key, value in texts.items()])
        for name, table in (("trial_table", trials), ("rung_table", rungs)):
            client.log_dict(run, {"columns": table.columns, "data": table.rows}, f"{name}.json")
        for file in content.files(self._folder):
            client.log_artifact(run, str(file), "cell")


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
