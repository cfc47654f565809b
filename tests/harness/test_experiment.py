"""Whole cells: pairs, budgets, failures, models, both backends, trackers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.experiment import _BestModel
from harness.recorder import Progress, Recorder
from harness.runner import run_sweep
from harness.sweep import Cell, Plan, make_plan
from tests.conftest import read_lines

SMALL = ["scheduler=asha", "task.model=mlp", "backend.threads=1"]
TINY = [*SMALL, "n_workers=1", "budget.epochs=30"]


def cell_folders(tmp_path: Path) -> dict[str, Path]:
    """Folder of each variant of the sweep in ``tmp_path``."""
    root = tmp_path / "results" / "default"
    return {
        json.loads((p / "summary.json").read_text())["labels"]["variant"]: p for p in root.iterdir() if p.name[0] != "."
    }


def events(cell: Path, kind: str) -> list[dict]:
    return [event for event in read_lines(cell / "events.jsonl") if event["e"] == kind]


def deterministic(result: dict) -> dict:
    """The fields of a report that are no measurement of time or memory, and no warm start."""
    return {k: v for k, v in result.items() if k not in ("busy", "peak_memory", "warm_start", "flops")}


def decisions(cell: Path) -> list[tuple]:
    return [(e["trial"], e["decision"], deterministic(e["result"])) for e in events(cell, "report")]


def test_variants_are_pairs_and_zero_equals_off(tmp_path, harness):
    done = harness(*TINY, "ohgw=off,zero,on,random", "seed=3")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = cell_folders(tmp_path)
    x = {variant: [(e["trial"], e["config"]) for e in events(cell, "start")] for variant, cell in cells.items()}
    shortest = min(map(len, x.values()))
    assert shortest >= 3
    assert all(starts[:shortest] == x["off"][:shortest] for starts in x.values())
    off, zero = decisions(cells["off"]), decisions(cells["zero"])
    assert len(off) == 30
    assert off == zero
    for line in read_lines(cells["zero"] / "trials.jsonl"):
        assert line["x"] == line["x_prime"]
        assert line["length"] == 0
        assert line["seconds"] > 0
    for line in read_lines(cells["on"] / "trials.jsonl"):
        assert line["x"] != line["x_prime"] or line["fallback"]


def test_weights_and_batches_of_a_trial_do_not_depend_on_its_configuration():
    from harness.tasks import load_task

    task: Any = load_task(make_plan(TINY).cells[0].config["task"], "cpu")
    x = {"lr": 0.1, "wd": 1e-4, "momentum": 0.5, "augmentation": 0.5, "label_smoothing": 0.1}
    a, b = task.start(x, 7), task.start({**x, "lr": 0.01, "augmentation": 0.1}, 7)
    for name, weight in a.net.state_dict().items():
        assert weight.equal(b.net.state_dict()[name])
    for one, other in zip(task.batches(a.config, 7, 0), task.batches(b.config, 7, 0), strict=True):
        assert one[1].equal(other[1])


def test_the_same_command_again_does_nothing_and_says_so(tmp_path, harness):
    assert harness(*TINY).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("*.jsonl")}
    again = harness(*TINY, "--json")
    assert again.returncode == 0
    assert "1 of 1 cells are finished already" in again.stderr
    assert "starting" not in again.stderr
    assert json.loads(again.stdout)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("*.jsonl")}


def test_budget_of_trials(tmp_path, harness):
    done = harness(*SMALL, "budget.epochs=null", "budget.trials=7", "n_workers=2", "ohgw=off")
    assert done.returncode == 0, done.stdout + done.stderr
    cell = cell_folders(tmp_path)["off"]
    assert len(events(cell, "start")) == 7
    assert json.loads((cell / "summary.json").read_text())["stop_reason"] == "trials"


@pytest.mark.parametrize(
    ("limit", "kind"), [("budget.wallclock=1.5", "wallclock"), ("budget.gpu_hours=1e-4", "gpu_hours")]
)
def test_budgets_of_time(limit, kind, tmp_path, harness):
    done = harness(*SMALL, "budget.epochs=null", limit, "ohgw=off")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((cell_folders(tmp_path)["off"] / "summary.json").read_text())
    assert summary["stop_reason"] == kind
    assert summary["epochs"] > 0


@pytest.mark.slow
def test_local_backend_reports_what_the_pool_reports(tmp_path, harness):
    words = [*SMALL, "n_workers=1", "budget.epochs=8", "ohgw=normalized"]
    for backend in ("pool", "local"):
        done = harness(*words, f"backend={backend}", f"name={backend}")
        assert done.returncode == 0, done.stdout + done.stderr
    reports = []
    for backend in ("pool", "local"):
        (cell,) = (p for p in (tmp_path / "results" / backend).iterdir() if p.name[0] != ".")
        reports.append(decisions(cell))
    assert len(reports[0]) == 8
    assert reports[0] == reports[1]


def test_models_are_kept_as_asked(tmp_path, harness):
    import torch

    for keep in ("best", "all"):
        done = harness(*TINY, "ohgw=off", f"save_model={keep}", f"name={keep}")
        assert done.returncode == 0, done.stdout + done.stderr
        (cell,) = (p for p in (tmp_path / "results" / keep).iterdir() if p.name[0] != ".")
        models = sorted((cell / "models").glob("*.pt"))
        summary = json.loads((cell / "summary.json").read_text())
        assert str(summary["incumbent"]["trial"]) in [m.stem.partition("-")[0] for m in models]
        assert len(models) == 1 if keep == "best" else len(models) > 1
        assert torch.load(models[0], weights_only=True)


@pytest.mark.parametrize(
    ("word", "message"),
    [("task.batch_size=2000", "more than the 898 training examples"), ("ohgw.batch_size=1000", "more than the 449")],
)
@pytest.mark.parametrize("backend", ["pool", pytest.param("local", marks=pytest.mark.slow)])
def test_more_examples_than_there_are(word, message, backend, tmp_path, harness):
    done = harness(*TINY, word, f"backend={backend}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("scheduler", [["scheduler=asha", "scheduler.type=stopping"], ["scheduler=random"]])
def test_the_incumbents_model_is_kept_at_its_best_epoch(scheduler, tmp_path, harness):
    import torch

    done = harness(*SMALL[1:], *scheduler, "n_workers=1", "budget.epochs=20", "ohgw=off", "save_model=best")
    assert done.returncode == 0, done.stdout + done.stderr
    cell = cell_folders(tmp_path)["off"]
    best = json.loads((cell / "summary.json").read_text())["incumbent"]
    (model,) = (cell / "models").glob("*.pt")
    assert model.stem == f"{best['trial']}-{best['epoch']}"
    assert torch.load(model, weights_only=True)["epoch"] == best["epoch"]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_only_models_that_may_be_the_incumbents_are_kept(mode, tmp_path):
    files = [tmp_path / f"{trial}-{epoch}.pt" for trial in (0, 1) for epoch in (1, 2, 3)]
    for file in files:
        file.touch()

    progress, models = Progress(), _BestModel(tmp_path)
    for trial in (0, 1):
        progress.apply({"e": "start", "trial": trial, "config": {}}, mode)

    def report(trial: int, epoch: int, score: float) -> list[str]:
        """The models left after the report."""
        result = {"epoch": epoch, "validation_score": score if mode == "max" else -score}
        progress.apply({"e": "report", "trial": trial, "decision": "CONTINUE", "result": result}, mode)
        models.reported(trial, epoch, progress.incumbent)
        return sorted(file.stem for file in tmp_path.glob("*.pt"))

    assert report(0, 1, 0.5) == ["0-1", "0-2", "0-3", "1-1", "1-2", "1-3"]
    assert report(1, 1, 0.7) == ["0-2", "0-3", "1-1", "1-2", "1-3"]
    assert report(0, 2, 0.7) == ["0-3", "1-1", "1-2", "1-3"]
    assert report(1, 2, math.nan) == ["0-3", "1-1", "1-3"]
    assert report(0, 3, 0.8) == ["0-3", "1-3"]
    assert report(1, 3, 0.9) == ["1-3"]


def with_task(words: list[str], target: str, tmp_path: Path) -> Plan:
    plan = make_plan([*words, f"results_dir={tmp_path / 'results'}"])
    for cell in plan.cells:
        cell.config["task"]["_target_"] = f"tests.harness.faulty_tasks.{target}"
    return plan


def test_trials_that_fail_fail_alone(tmp_path, capsys):
    plan = with_task([*SMALL, "budget.epochs=60", "ohgw=normalized"], "Unlucky", tmp_path)
    assert run_sweep(plan, verbose=True) == 0
    assert "--- trial 0\nmomentum" in capsys.readouterr().out
    (cell,) = cell_folders(tmp_path).values()
    reasons = [event["reason"] for event in events(cell, "error")]
    for word in ("bad luck", "memory", "nan"):
        assert any(word in reason for reason in reasons), reasons
    assert len(events(cell, "report")) == 60
    assert json.loads((cell / "summary.json").read_text())["failures"] == len(reasons)
    failed = [event for event in events(cell, "error") if "warm_start" in event]
    assert failed, "a warm start is recorded although its trial failed before its first report"
    assert all(event["busy"]["train"] > 0 for event in failed)
    rows = {line["trial"]: line for line in read_lines(cell / "trials.jsonl")}
    assert all(rows[event["trial"]]["x_prime"] == event["warm_start"]["x_prime"] for event in failed)
    assert "bad luck" in (cell / "stderr.log").read_text()


def test_a_broken_task_fails_its_cells_and_only_them(tmp_path, capsys):
    broken = with_task(["ohgw=off", *TINY, "seed=0"], "AlwaysRaises", tmp_path)
    sound = make_plan(["ohgw=off", *TINY, "seed=1", f"results_dir={tmp_path / 'results'}"])
    plan = Plan([*broken.cells, *sound.cells])
    assert run_sweep(plan) == 1
    output = capsys.readouterr().out
    assert "this task is broken" in output
    assert "1 cells failed" in output
    assert len(list((tmp_path / "results").rglob("summary.json"))) == 1
    mended = Plan([Cell({**broken.cells[0].config, "task": sound.cells[0].config["task"]})])
    assert run_sweep(mended) == 0
    assert list((tmp_path / "results" / "default").glob("*.broken-1"))


def test_wandb_offline_without_account(tmp_path, harness, environment):
    environment["WANDB_MODE"] = "offline"
    done = harness(*TINY, "ohgw=off", "tracker=wandb")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker failed" not in done.stdout
    assert list((tmp_path / "results").rglob("*.wandb"))


def test_replay_refuses_other_decisions():
    from harness.record import EventLog
    from harness.recorder import Budget, CellClock, ReplayError
    from harness.schedulers import ASHA
    from harness.space import Float, Space

    space = Space({"lr": Float(0.1, 1.0)}).config_space()
    recorder = Recorder(
        ASHA(space, "validation_score", mode="max", max_t=9), EventLog("/dev/null"), Budget(), CellClock(), lambda k: {}
    )
    start = {"e": "start", "t": 0.0, "trial": 0, "config": {"lr": 0.5}}
    with pytest.raises(ReplayError, match="event 1"):
        recorder.replay([start])
    assert math.isfinite(recorder.clock())
