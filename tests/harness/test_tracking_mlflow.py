"""``tracker=mlflow``: a real server with a SQLite store, read back through its client and looked at in Chromium."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import record
from harness.recorder import Progress
from harness.runner import run_sweep
from harness.sweep import make_plan
from harness.tracking import content
from harness.tracking.mlflow import MlflowTracker
from tests.conftest import read_lines
from tests.harness.test_faults import wait_for

pytest.importorskip("mlflow")

TINY = ["scheduler=asha", "task.model=mlp", "backend.threads=1", "n_workers=1", "budget.epochs=30"]
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def client(uri: str) -> Any:
    os.environ.update(QUIET)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs(uri: str, experiment: str = "ohgw") -> dict[str, Any]:
    """MLflow's runs by name."""
    mlflow = client(uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


@pytest.fixture
def server(tmp_path: Path):
    """The address of ``mlflow server`` on a free port."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = tmp_path / "server"
    store.mkdir()
    words = ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}", "--artifacts-destination", str(store / "files"),
             "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    with open(store / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            cwd=store, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def up() -> bool:
        assert process.poll() is None, (store / "log").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_for(up)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_sweep_against_a_real_server_can_be_read_back_and_looked_at(tmp_path, harness, server, browser):
    done = harness(*TINY, "ohgw=off,normalized", "tracker=mlflow", f"tracker.uri={server}", "tracker.project=pairs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker failed" not in done.stdout
    mlflow, found = client(server), runs(server, "pairs")
    assert len(found) == 2
    for name, run in found.items():
        cell = tmp_path / "results" / "default" / name
        config = yaml.safe_load((cell / "config.yaml").read_text())
        summary, events = json.loads((cell / "summary.json").read_text()), read_lines(cell / "events.jsonl")
        check_run(mlflow, run, config, summary, events)
        check_artifacts(mlflow, run.info.run_id, cell, tmp_path)
    window = browser
    window.set_window_size(1400, 1000)
    name, run = next(iter(found.items()))
    window.get(f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
    best = f"{run.data.metrics['best_validation_score']:.4}"

    def shown() -> bool:
        text = window.find_element("tag name", "body").text
        return name in text and "best_validation_score" in text and best[:4] in text

    wait_for(shown, 60)
    window.save_screenshot(str(tmp_path / "run.png"))
    assert (tmp_path / "run.png").stat().st_size > 10_000


def check_run(mlflow: Any, run: Any, config: dict, summary: dict, events: list[dict]) -> None:
    labels = config["labels"]
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags["cell_id"] == f"default-{labels['identity']}-{int(events[0]['time']):x}"
    assert tags["group"] == f"{labels['scheduler']}/{labels['task']}"
    assert tags["job_type"] == tags["variant"] == labels["variant"]
    assert tags["seed"] == "0"
    assert tags["stop_reason"] == summary["stop_reason"]
    assert run.data.params == {key: str(value) for key, value in content.flat(config).items()}
    for key, value in content.flat(summary).items():
        if not isinstance(value, str):
            assert run.data.metrics[key] == pytest.approx(value)
    series = [
        {m.step: m.value for m in mlflow.get_metric_history(run.info.run_id, key)}
        for key in ("incumbent/validation_score", "incumbent/test_score")
    ]
    columns = record.report_columns(events)
    for step, value in series[0].items():
        assert value == columns["best_validation_score"][step - 1]
        assert series[1][step] == columns["incumbent_test_score"][step - 1]
    assert {*series[0].values()} == {*columns["best_validation_score"]}
    survival = {m.step: m.value for m in mlflow.get_metric_history(run.info.run_id, "rung_survival")}
    epochs = [event["result"]["epoch"] for event in events if event["e"] == "report"]
    assert survival == {level: epochs.count(level) for level in (1, 3, 9, 27)}


def check_artifacts(mlflow: Any, run_id: str, cell: Path, tmp_path: Path) -> None:
    folder = tmp_path / run_id
    folder.mkdir()
    files = Path(mlflow.download_artifacts(run_id, "cell", str(folder)))
    assert sorted(file.name for file in files.iterdir()) == sorted(content.FILES)
    assert all(file.read_bytes() == (cell / file.name).read_bytes() for file in files.iterdir())
    table = json.loads(Path(mlflow.download_artifacts(run_id, "trial_table.json", str(folder))).read_text())
    events = read_lines(cell / "events.jsonl")
    assert len(table["data"]) == sum(event["e"] == "start" for event in events)
    assert {"trial", "x/lr", "epochs", "best_validation_score"} <= set(table["columns"])


@pytest.mark.slow
def test_without_a_server_runs_are_in_a_file_beside_the_results_and_end_as_their_cells_did(
    tmp_path, monkeypatch, capsys, start_harness
):
    monkeypatch.chdir(tmp_path)
    words = ["scheduler=asha", "task.model=mlp", "n_workers=1", "backend.threads=1", "ohgw=off", "tracker=mlflow"]
    uri = f"sqlite:///{tmp_path / 'results' / 'mlflow.db'}"
    plan = make_plan([*words, "budget.epochs=30", "seed=0,1", f"results_dir={tmp_path / 'results'}"])
    plan.cells[0].config["task"]["_target_"] = "tests.harness.faulty_tasks.AlwaysRaises"
    assert run_sweep(plan) == 1
    output = capsys.readouterr().out
    assert "tracker failed" not in output
    assert f"mlflow ui --backend-store-uri {uri}" in output
    found = runs(uri)
    assert [found[cell.folder].info.status for cell in plan.cells] == ["FAILED", "FINISHED"]

    def attempts() -> list[int]:
        logs = list((tmp_path / "results" / "long").rglob("events.jsonl"))
        kinds = [event["e"] for log in logs for event in read_lines(log)]
        return [part.count("report") for part in " ".join(kinds).split("open")[1:]]

    for attempt in (1, 2):
        process = start_harness(*words, "budget.epochs=100000", "name=long", "tracker.interval=0")
        wait_for(lambda: len(attempts()) == attempt and attempts()[-1] >= 10)  # noqa: B023
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    (killed,) = (run for name, run in runs(uri).items() if name not in found)
    assert killed.info.status == "KILLED"
    history = client(uri).get_metric_history(killed.info.run_id, "epochs")
    assert all(metric.step == metric.value for metric in history)
    assert {metric.step for metric in history} == set(range(1, sum(attempts()) + 1)), "nothing is lost by interrupts"


@pytest.mark.slow
def test_a_store_that_answers_late_holds_no_cell_up_and_gets_every_row(tmp_path):
    (cell,) = make_plan(["ohgw=off", f"results_dir={tmp_path}"]).cells
    tracker, progress, answers = MlflowTracker(interval=0.0), Progress(), threading.Event()
    tracker.start(cell, tmp_path / "default" / cell.folder, "run")
    log_batch = tracker._client.log_batch

    def late(*arguments: Any, **named: Any) -> None:
        assert answers.wait(60)
        log_batch(*arguments, **named)

    tracker._client.log_batch = late
    events = [{"e": "start", "t": 0.0, "trial": 0, "config": {}}]
    events += [
        {"e": "report", "t": float(epoch), "trial": 0, "decision": "CONTINUE",
         "result": {"epoch": epoch, "validation_score": epoch / 100, "test_score": 0.5}}
        for epoch in range(1, 21)
    ]  # fmt: skip
    for event in events:  # this loop ends although nothing is answered
        progress.apply(event, "max")
        tracker.event(event, progress)
    answers.set()
    tracker.finish("interrupted", None)
    tracker.close()
    history = client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_metric_history(tracker_run(tmp_path), "epochs")
    assert [metric.step for metric in history] == [metric.value for metric in history] == list(range(1, 21))


def tracker_run(results_dir: Path) -> str:
    """MLflow's id of the only run."""
    (run,) = runs(f"sqlite:///{results_dir / 'mlflow.db'}").values()
    return run.info.run_id


@pytest.mark.slow
def test_a_server_that_is_not_there_is_said_once_and_the_experiment_goes_on(tmp_path, harness, environment):
    environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    done = harness(*TINY, "ohgw=off", "seed=0,1", "tracker=mlflow", "tracker.uri=http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tracker failed (") == 1, done.stdout
    assert len(list(tmp_path.rglob("summary.json"))) == 2
