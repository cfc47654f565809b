"""Trackers: what a W&B run of a cell holds, read from the offline run's file; failing trackers; who is logged in."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness import record
from harness.recorder import Progress
from harness.report.fetch import read_offline_run
from harness.runner import run_sweep
from harness.sweep import Cell, Plan, make_plan
from harness.tracking import FAILING_CELLS, Guarded, Tracker, account, content
from harness.tracking import wandb as ours
from harness.tracking.content import History
from harness.tracking.wandb import end_service
from tests.conftest import ROOT, read_lines, run_tracked
from tests.harness.test_faults import wait_for
from tests.harness.wandb_upload_server import Uploads, taking

TINY = ["scheduler=asha", "task.model=mlp", "backend.threads=1", "n_workers=1", "budget.epochs=30"]


# ---- reading offline runs


def value_of(item: Any) -> tuple[str, Any]:
    return "/".join(item.nested_key) or item.key, json.loads(item.value_json)


class OfflineRun:
    """What an offline run's file says."""

    def __init__(self, file: Path):
        self.file = file
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: dict[tuple[str, str], Any] = {}
        self.kinds: set[str] = set()
        self.exit_code: int | None = None
        for item in read_offline_run(file):
            kind = item.WhichOneof("record_type")
            self.kinds.add(kind)
            if kind == "run":
                self.run = item.run
                self.config = {update.key: json.loads(update.value_json) for update in item.run.config.update}
            elif kind == "history":
                self.history.append(dict(map(value_of, item.history.item)))
            elif kind == "summary":
                self.summary |= dict(map(value_of, item.summary.update))
            elif kind == "metric":
                self.metrics[item.metric.name or item.metric.glob_name] = item.metric.step_metric
            elif kind == "artifact":
                self.artifacts[item.artifact.type, item.artifact.name] = item.artifact
            elif kind == "exit":
                self.exit_code = item.exit.exit_code

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history without the row that holds the tables."""
        return [row for row in self.history if "wallclock" in row]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        path = self.summary[f"{key}/path"] if f"{key}/path" in self.summary else self.summary[key]["path"]
        content = json.loads((self.file.parent / "files" / path).read_text())
        return content["columns"], content["data"]


def offline_runs(root: Path) -> dict[str, list[OfflineRun]]:
    """The runs by id, in the order of their start."""
    found: dict[str, list[OfflineRun]] = {}
    for file in sorted(root.rglob("offline-run-*/run-*.wandb")):
        run = OfflineRun(file)
        found.setdefault(run.run.run_id, []).append(run)
    return found


def incumbents(events: list[dict]) -> list[tuple[float, float, float]]:
    """(t, validation score, test score) of each report that changed the incumbent."""
    columns = record.report_columns(events)
    rows = zip(columns["t"], columns["best_validation_score"], columns["incumbent_test_score"], strict=True)
    changes: list[tuple[float, float, float]] = []
    for row in rows:
        if row[1] == row[1] and (not changes or row[1] != changes[-1][1]):
            changes.append(row)
    return changes


def changes(rows: list[dict]) -> list[tuple[float, float, float]]:
    """The same from history rows."""
    found: list[tuple[float, float, float]] = []
    for row in rows:
        score = row.get("incumbent/validation_score")
        if score is not None and (not found or score != found[-1][1]):
            found.append((row["wallclock"], score, row["incumbent/test_score"]))
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SimpleNamespace:
    """Two real cells with tracker=wandb and no account."""
    folder = tmp_path_factory.mktemp("wandb")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": str(ROOT)}
    done = run_tracked(folder, *TINY, "ohgw=off,normalized", "tracker.project=pairs", "name=a+b")
    cells = [path for path in (folder / "results" / "a+b").iterdir() if (path / "summary.json").exists()]
    return SimpleNamespace(folder=folder, env=env, output=done, cells=cells, runs=offline_runs(folder))


def each(study: SimpleNamespace) -> list[tuple[Path, OfflineRun]]:
    """(cell's folder, its run)."""
    assert len(study.cells) == len(study.runs) == 2
    runs = {runs[0].run.display_name: runs[0] for runs in study.runs.values() if len(runs) == 1}
    return [(cell, runs[cell.name]) for cell in study.cells]


def test_without_an_account_runs_are_offline_and_the_command_says_once_how_to_upload_them(study):
    lines = [line for line in study.output.stdout.splitlines() if "wandb sync" in line]
    assert len(lines) == 1
    assert not study.output.stderr
    assert "warning" not in study.output.stdout
    command = lines[0].split("upload them: ")[1].replace("wandb sync", f"{sys.executable} -m wandb sync --dry-run")
    shown = subprocess.run(
        ["bash", "-c", command], cwd=study.folder, env=study.env, capture_output=True, text=True, timeout=120
    )
    output = shown.stdout + shown.stderr
    assert shown.returncode == 0, output
    assert "2 run(s)" in output
    for runs in study.runs.values():
        assert runs[0].file.parent.name in output


def test_a_run_names_its_cell_and_holds_its_config(study):
    for cell, run in each(study):
        config = yaml.safe_load((cell / "config.yaml").read_text())
        labels = config["labels"]
        begun = int(read_lines(cell / "events.jsonl")[0]["time"])
        assert run.run.run_id == f"a-b-{labels['identity']}-{begun:x}"
        assert run.run.project == "pairs"
        assert run.run.run_group == f"{labels['scheduler']}/{labels['task']}"
        assert run.run.job_type == labels["variant"]
        assert {key: value for key, value in run.config.items() if key != "_wandb"} == config
        assert run.exit_code == 0


def test_history_has_every_incumbent_with_its_times_and_the_rungs(study):
    for cell, run in each(study):
        events = read_lines(cell / "events.jsonl")
        assert changes(run.rows) == incumbents(events)
        steps = [row["_step"] for row in run.history]
        assert steps == sorted(set(steps))
        assert all(row["_step"] == row["epochs"] for row in run.rows)
        last = run.rows[-1]
        summary = json.loads((cell / "summary.json").read_text())
        assert last["epochs"] == summary["epochs"] == 30
        assert last["trials"] == summary["trials"]
        assert last["gpu_hours"] == pytest.approx(summary["gpu_hours"], rel=1e-12)
        epochs = [event["result"]["epoch"] for event in events if event["e"] == "report"]
        assert {k: v for k, v in last.items() if k.startswith("rung/")} == {
            f"rung/{level}": epochs.count(level) for level in (1, 3, 9, 27)
        }
        assert run.metrics["incumbent/*"] == run.metrics["rung/*"] == "wallclock"
        assert {"wallclock", "gpu_hours", "epochs"} <= set(run.metrics)


def test_the_summary_is_summary_json_with_flat_keys(study):
    for cell, run in each(study):
        summary = json.loads((cell / "summary.json").read_text())
        assert run.summary["busy/train"] == summary["busy"]["train"]
        assert run.summary["stop_reason"] == "epochs"
        assert run.summary["best_validation_score"] == summary["best_validation_score"]
        for tau, times in summary["t_tau"].items():
            for axis, value in times.items():
                assert run.summary.get(f"t_tau/{tau}/{axis}") == value
        own = summary["t_tau"]["0.97"]["wallclock"]
        assert run.summary["t_tau/reached"] == (own is not None)
        assert run.summary.get("t_tau/wallclock") == own


def test_the_tables_show_each_trial_and_each_rung(study):
    for cell, run in each(study):
        events = read_lines(cell / "events.jsonl")
        columns, rows = run.table("trial_table")
        trials = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
        assert sorted(trials) == [event["trial"] for event in events if event["e"] == "start"]
        for warm in read_lines(cell / "trials.jsonl"):
            shown = trials[warm["trial"]]
            assert shown["x/lr"] == warm["x"]["lr"]
            assert shown["estimator"] == warm.get("estimator")
            if "x_prime" in warm:
                assert shown["x_prime/lr"] == warm["x_prime"]["lr"]
        assert sum(row["epochs"] for row in trials.values()) == 30
        scores = [row["best_validation_score"] for row in trials.values() if row["best_validation_score"] is not None]
        assert max(scores) == run.summary["best_validation_score"]
        assert "x/epochs" not in columns
        columns, rows = run.table("rung_table")
        assert columns == ["level", "trials"]
        assert rows == [[level, sum(t["epochs"] >= level for t in trials.values())] for level in (1, 3, 9, 27)]


def test_the_artifact_holds_the_record(study):
    for cell, run in each(study):
        artifact = run.artifacts["cell", f"cell-{run.run.run_id}"]
        assert json.loads(artifact.metadata)["folder"] == cell.name
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        assert sorted(files) == sorted(content.FILES)
        for name, file in files.items():
            assert file.read_bytes() == (cell / name).read_bytes()


def test_neither_system_metrics_nor_console_output_nor_code_is_recorded(study):
    for _, run in each(study):
        assert not run.kinds & {"stats", "output", "output_raw"}
        names = {path.name for path in (run.file.parent / "files").iterdir()}
        assert names <= {"media", "config.yaml", "wandb-summary.json"}


# ---- other circumstances


@pytest.mark.slow
def test_in_virtual_time_a_cell_of_milliseconds_has_its_whole_incumbent_curve(tmp_path, harness):
    words = ["backend=simulated", "scheduler=random", "task.model=mlp", "n_workers=4", "budget.epochs=40", "ohgw=off"]
    done = harness(*words, "seed=0,1", "tracker=wandb")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = offline_runs(tmp_path)
    assert len(runs) == 2
    for (run,) in runs.values():
        cell = tmp_path / "results" / "default" / run.run.display_name
        assert changes(run.rows) == incumbents(read_lines(cell / "events.jsonl"))
        assert run.exit_code == 0


def interrupt(start_harness, folder: Path, number: signal.Signals, attempt: int = 1) -> None:
    """Run a cell without an end in ``folder``, or go on with it, until it has reports; then send it a signal."""

    def reports() -> list[int]:
        """Number of reports of each attempt."""
        kinds = [event["e"] for log in folder.glob("*/*/events.jsonl") for event in read_lines(log)]
        return [part.count("report") for part in " ".join(kinds).split("open")[1:]]

    words = ["scheduler=asha", "task.model=mlp", "n_workers=1", "backend.threads=1", "ohgw=off", "tracker=wandb"]
    process = start_harness(*words, "budget.epochs=100000", "tracker.interval=1", f"results_dir={folder}")
    wait_for(lambda: len(reports()) == attempt and reports()[-1] >= 10)
    process.send_signal(number)
    assert process.wait(timeout=60) in (130, -number)


def check_whole(rows: list[dict], log: Path) -> None:
    """``rows`` are the one, whole history of the record."""
    events = read_lines(log)
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert changes(rows) == incumbents(events)
    epochs = [event["result"]["epoch"] for event in events if event["e"] == "report"]
    assert rows[-1]["epochs"] == len(epochs)
    assert rows[-1]["rung/1"] == epochs.count(1)


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGKILL])
def test_a_cell_that_goes_on_has_one_run_with_the_whole_history_after_wandb_sync(
    first, tmp_path, start_harness, environment
):
    for attempt, number in enumerate([first, signal.SIGINT], 1):
        interrupt(start_harness, tmp_path, number, attempt)
        if number == signal.SIGKILL:
            continue  # what the run's file holds is left to chance
        ((run,),) = offline_runs(tmp_path).values()
        with taking(Uploads()) as uploads:
            account = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": uploads.url}
            words = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(run.file.parent)]
            env = environment | account
            done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (uploaded,) = uploads.runs
    assert uploaded == run.run.run_id
    assert run.exit_code == 1
    (log,) = tmp_path.rglob("events.jsonl")
    check_whole(run.rows, log)
    check_whole(uploads.history(uploaded), log)


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGKILL])
def test_a_cell_that_goes_on_goes_on_in_its_run_online(first, tmp_path, start_harness, environment):
    with taking(Uploads()) as uploads:
        environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": uploads.url}
        interrupt(start_harness, tmp_path, first)
        interrupt(start_harness, tmp_path, signal.SIGINT, 2)
        (run,) = uploads.runs
        (log,) = tmp_path.rglob("events.jsonl")
        check_whole(uploads.history(run), log)
        log.unlink()  # the cell starts afresh
        interrupt(start_harness, tmp_path, signal.SIGINT)
        (other,) = set(uploads.runs) - {run}
        (log,) = (file for file in tmp_path.rglob("events.jsonl"))
        check_whole(uploads.history(other), log)


@pytest.mark.slow
def test_a_record_that_cannot_be_continued_and_its_successor_have_a_run_each(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan([*TINY, "ohgw=off", "tracker=wandb", f"results_dir={tmp_path / 'results'}"])
    assert run_sweep(plan) == 0
    (cell,) = (path.parent for path in tmp_path.rglob("summary.json"))
    (cell / "summary.json").unlink()
    events = read_lines(cell / "events.jsonl")[:-1]
    events[0]["time"] -= 60
    next(event for event in events if event["e"] == "report")["decision"] = "of another scheduler"
    (cell / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run_sweep(plan) == 0
    output = capsys.readouterr().out
    assert "set aside" in output
    assert "tracker failed" not in output
    runs = {name: run.exit_code for name, (run,) in offline_runs(tmp_path).items()}
    aside = f"default-{plan.cells[0].identity}-{int(events[0]['time']):x}"
    assert runs.pop(aside) == 1
    assert set(runs.values()) == {0}
    assert runs


def test_a_long_name_of_a_study_makes_no_longer_id(tmp_path):
    first, second = (make_plan(["ohgw=off", f"name={'n' * 99}{letter}"]).cells[0] for letter in "ab")
    ids = {content.run_id(cell, tmp_path, 1.8e9) for cell in (first, second)}
    assert len(ids) == 2
    assert all(len(word) <= 64 for word in ids)


def test_a_cell_that_fails_closes_its_own_run_and_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "ohgw=off", "tracker=wandb", f"results_dir={tmp_path / 'results'}"]
    plan = make_plan([*words, "seed=0,1"])
    plan.cells[0].config["task"]["_target_"] = "tests.harness.faulty_tasks.AlwaysRaises"
    assert run_sweep(Plan(plan.cells)) == 1
    assert "tracker failed" not in capsys.readouterr().out
    runs = {run.run.display_name: run for (run,) in offline_runs(tmp_path).values()}
    assert [runs[cell.folder].exit_code for cell in plan.cells] == [1, 0]
    failed = runs[plan.cells[0].folder]
    (artifact,) = (artifact for (kind, _), artifact in failed.artifacts.items() if kind == "cell")
    assert "summary.json" not in {entry.path for entry in artifact.manifest.contents}
    assert "stop_reason" not in failed.summary


@pytest.mark.slow
def test_a_server_that_does_not_answer_makes_the_runs_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ours, "INIT_SECONDS", 1.0)
    logged_in(monkeypatch, tmp_path, "http://127.0.0.1:9")
    plan = make_plan([*TINY, "ohgw=off", "seed=0,1", f"results_dir={tmp_path / 'results'}"])  # tracker=auto
    assert run_sweep(plan) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("tracker=none turns this off" in line for line in lines) == 1
    assert sum("cannot be reached" in line for line in lines) == 1
    assert sum("wandb sync" in line for line in lines) == 1
    assert not any("tracker failed" in line for line in lines)
    assert [run.exit_code for runs in offline_runs(tmp_path).values() for run in runs] == [0, 0]


def id_of(cell: Cell, folder: Path) -> str:
    """The id of the run of a cell that has a record."""
    return content.run_id(cell, folder / "results" / "default" / cell.folder, 0.0)


def logged_in(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.chdir(folder)


@pytest.mark.slow
def test_whoever_is_logged_in_has_the_runs_online(tmp_path, monkeypatch, capsys):
    plan = make_plan([*TINY, "ohgw=off", "seed=0,1", f"results_dir={tmp_path / 'results'}"])  # tracker=auto
    with taking(Uploads()) as uploads:
        logged_in(monkeypatch, tmp_path, uploads.url)
        assert run_sweep(plan) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("tracker=none turns this off" in line for line in lines) == 1
    assert not any("tracker failed" in line or "wandb sync" in line for line in lines)
    assert not offline_runs(tmp_path)
    assert len(uploads.runs) == 2
    for cell in plan.cells:
        run = id_of(cell, tmp_path)
        assert uploads.runs[run]["displayName"] == cell.folder
        rows = [row for row in uploads.history(run) if "wallclock" in row]
        events = read_lines(tmp_path / "results" / "default" / cell.folder / "events.jsonl")
        assert changes(rows) == incumbents(events)
        assert uploads.exit_codes(run) == [0]
    assert sum(artifact["artifactTypeName"] == "cell" for artifact in uploads.created) == 2


@pytest.mark.slow
def test_a_server_that_stops_taking_uploads_holds_no_cell_up_for_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ours, "FINISH_SECONDS", 1.0)
    plan = make_plan([*TINY, "ohgw=off", "seed=0,1", f"results_dir={tmp_path / 'results'}"])
    with taking(Uploads(artifacts=False)) as uploads:
        logged_in(monkeypatch, tmp_path, uploads.url)
        assert run_sweep(plan) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("did not take all of a run" in line for line in lines) == 1
    assert not any("tracker failed" in line for line in lines)
    assert set(offline_runs(tmp_path)) == {id_of(plan.cells[1], tmp_path)}
    assert list(tmp_path.rglob(f"run-*/run-{id_of(plan.cells[0], tmp_path)}.wandb")), "kept for wandb sync"


def test_without_an_account_the_default_tracker_is_none_and_says_nothing(tmp_path, harness, environment):
    environment["HOME"] = str(tmp_path)
    code = (
        "import sys; from harness.__main__ import main; code = main(sys.argv[1:]);"
        "print([m for m in ('wandb', 'mlflow') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY, "ohgw=off"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "W&B" not in done.stdout
    assert not list(tmp_path.rglob("wandb"))


# ---- history


@functools.cache
def a_cell() -> Cell:
    return make_plan(["ohgw=off"]).cells[0]


scores = st.one_of(st.just(math.nan), st.sampled_from([0.1, 0.2, 0.5]), st.floats(0, 1))


@given(
    reports=st.lists(st.tuples(st.integers(0, 3), scores, scores), max_size=30),
    cuts=st.sets(st.integers(0, 30)),
    lost=st.sets(st.integers(0, 30)),
    mode=st.sampled_from(["max", "min"]),
    errors=st.sets(st.integers(0, 30)),
)
def test_no_change_of_the_incumbent_is_lost_however_rows_are_collected(reports, cuts, lost, mode, errors):
    config = a_cell().config
    cell = Cell({**config, "task": {**config["task"], "mode": mode}})
    history, progress, rows = History(cell, Path("unused"), math.inf), Progress(), []
    epochs = dict.fromkeys(range(4), 0)
    events = [{"e": "open", "t": 0.0, "run": 1}]
    events += [{"e": "start", "t": 0.0, "trial": trial, "config": {}} for trial in epochs]
    for number, (trial, validation, test) in enumerate(reports):
        epochs[trial] += 1
        result = {"epoch": epochs[trial], "validation_score": validation, "test_score": test, "busy": {"train": 36.0}}
        events.append({"e": "report", "t": number + 1.0, "trial": trial, "decision": "CONTINUE", "result": result})
        if number in errors:
            events.append({"e": "error", "t": number + 1.5, "trial": trial})
    for number, event in enumerate(events):
        progress.apply(event, mode)
        rows += history.add(event, progress)
        if number in cuts:
            rows += history.rest()
        elif number in lost:
            history.put_back(history.rest())
    rows += history.rest()
    columns = record.report_columns(events, mode)
    known = dict(zip(columns["t"], zip(columns["best_validation_score"], columns["incumbent_test_score"], strict=True),
                     strict=True))  # fmt: skip
    steps = [row.step for row in rows]
    assert steps == sorted(set(steps))
    assert (steps[-1] if steps else 0) == len(reports)
    expected = {t: best for t, best in known.items() if best[0] == best[0] and best != known.get(t - 1)}
    shown = {row.values["wallclock"]: row.values for row in rows}
    for t, (best, test) in expected.items():
        assert shown[t]["incumbent/validation_score"] == best
        assert shown[t]["incumbent/test_score"] == pytest.approx(test, nan_ok=True)
    for row in rows:
        assert row.values["epochs"] == row.step
        assert row.values["gpu_hours"] == pytest.approx(row.step * 0.01)
        assert row.values["rung/1"] == len({trial for trial, _, _ in reports[: row.step]})


def test_rows_are_at_least_the_interval_apart_and_then_all_there(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(content.time, "monotonic", lambda: now[0])
    history, progress, bursts = History(a_cell(), Path("unused"), 15.0), Progress(), []
    progress.apply({"e": "start", "t": 0.0, "trial": 0, "config": {}}, "max")
    for epoch in range(1, 101):
        now[0] += 1
        result = {"epoch": epoch, "validation_score": epoch // 10 / 10, "test_score": 0.5}
        event = {"e": "report", "t": now[0], "trial": 0, "decision": "CONTINUE", "result": result}
        progress.apply(event, "max")
        if rows := history.add(event, progress):
            bursts.append((now[0], rows))
    assert [t for t, _ in bursts] == [15, 30, 45, 60, 75, 90]
    assert all(len(rows) <= 1 + 2 for _, rows in bursts)  # the incumbent changes every 10 seconds


def test_schedulers_without_rungs_are_read_at_powers_of_three():
    (cell,) = make_plan(["scheduler=random", "ohgw=off"]).cells
    assert content.levels(cell.config) == [1, 3, 9, 27]
    (cell,) = make_plan(["scheduler=asha", "scheduler.eta=4", "scheduler.grace_period=2", "ohgw=off"]).cells
    assert content.levels(cell.config) == [2, 8, 27]


# ---- failing trackers


class Faulty(Tracker):
    """Fails in the methods that it is told to; notes all calls."""

    def __init__(self, fails: list[str]):
        self.fails, self.calls = fails, CALLS

    def __getattribute__(self, name: str) -> Any:
        if name not in ("open", "start", "event", "finish", "close"):
            return super().__getattribute__(name)

        def call(*arguments: Any) -> None:
            self.calls.append(name)
            if name in self.fails:
                raise OSError(28, "No space left on device")

        return call


CALLS: list[str] = []


def faulty(*fails: str) -> dict[str, Any]:
    CALLS.clear()
    return {"_target_": f"{__name__}.Faulty", "fails": list(fails)}


@pytest.mark.parametrize("where", ["open", "start", "event", "finish", "close"])
def test_a_tracker_that_fails_anywhere_warns_once_and_is_left_out_in_the_end(where):
    said: list[str] = []
    guarded = Guarded(faulty(where), said.append, 0.0)
    for _ in range(5):
        guarded.start(a_cell(), Path("unused"))
        guarded.event({"e": "open"}, Progress())
        guarded.event({"e": "open"}, Progress())
        guarded.finish("finished", {})
    guarded.close()
    assert sum("No space left on device" in line for line in said) == 1
    cells_tried = {"open": 0, "close": 5}.get(where, FAILING_CELLS)
    assert CALLS.count("start") == cells_tried
    assert CALLS.count("event") == cells_tried * {"start": 0, "event": 1}.get(where, 2)
    assert CALLS.count("finish") == (0 if where == "start" else cells_tried), "a run that started is closed"
    assert CALLS.count("close") == 1
    assert any("in a row" in line for line in said) == (where in ("start", "event", "finish"))


def test_an_experiment_goes_on_without_its_tracker(tmp_path, capsys):
    plan = make_plan([*TINY, "ohgw=off", "seed=0,1", f"results_dir={tmp_path}"])
    for cell in plan.cells:
        cell.config["tracker"] = faulty("event", "finish", "close")
    assert run_sweep(plan) == 0
    output = capsys.readouterr().out
    assert output.count("No space left on device") == 1
    assert "the experiment goes on without it" in output
    assert len(list(tmp_path.rglob("summary.json"))) == 2


def test_a_failure_in_one_cell_leaves_the_next_ones_tracked():
    said: list[str] = []
    guarded = Guarded(faulty(), said.append, 0.0)
    tracker: Any = guarded._tracker
    for number in range(3 * FAILING_CELLS):
        tracker.fails = ["event"] if number % 2 else []
        guarded.start(a_cell(), Path("unused"))
        guarded.event({"e": "open"}, Progress())
        guarded.event({"e": "open"}, Progress())
        guarded.finish("finished", {})
    assert CALLS.count("start") == CALLS.count("finish") == 3 * FAILING_CELLS
    assert len(said) == 1


@pytest.mark.parametrize(("name", "install"), [("wandb", "pip install wandb"), ("mlflow", "ohgw-harness[mlflow]")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, install, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    plan = make_plan(["ohgw=off", "seed=0,1", f"tracker={name}", f"results_dir={tmp_path}"])
    guarded = Guarded(plan.cells[0].config["tracker"], said.append, 0.0)
    for cell in plan.cells:
        guarded.start(cell, tmp_path / cell.folder)
        guarded.event({"e": "open"}, Progress())
        guarded.finish("finished", {})
    guarded.close()
    assert len(said) == 1
    assert install in said[0]


# ---- who is logged in


@pytest.mark.parametrize(
    ("variables", "netrc", "settings", "expected"),
    [
        ({}, None, None, False),
        ({"WANDB_API_KEY": "k"}, None, None, True),
        ({"WANDB_API_KEY": ""}, None, None, False),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, None, None, True),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, None, None, False),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, None, True),
        ({}, "machine api.wandb.ai login user password k", None, True),
        ({}, "machine api.forge.coreweave.com login user password k", None, True),
        ({}, "machine github.com login user password k\ndefault login a password b", None, False),
        ({}, "machine api.wandb.ai login", None, False),
        ({"WANDB_BASE_URL": "https://own.example"}, "machine api.wandb.ai login user password k", None, False),
        ({}, "machine own.example login user password k", "[default]\nbase_url = https://own.example\n", True),
        ({}, None, "[default]\napi_key = k\n", True),
        ({}, "machine api.wandb.ai login user password k", "[default]\nmode = disabled\n", False),
        ({}, None, "no settings at all", False),
    ],
)
def test_who_is_logged_in_is_told_from_files(variables, netrc, settings, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = variables | {"WANDB_CONFIG_DIR": str(tmp_path / "config"), "NETRC": str(tmp_path / "netrc")}
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    if settings:
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "settings").write_text(settings)
    assert account.configured(environment) == expected


def test_a_service_that_never_ends_holds_nothing_up():
    stopped = threading.Event()
    end_service(SimpleNamespace(teardown=stopped.wait), seconds=0.01)  # returns, or this test runs into its time limit
    assert not stopped.is_set()
    end_service(SimpleNamespace(teardown=lambda: 1 / 0))  # and what goes wrong at the very end is no failure
