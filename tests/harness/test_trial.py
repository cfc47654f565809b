"""The trial function with a context made of a folder: pauses, crashes, warm starts, clocks, models."""

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from backends.context import TrialFailed
from harness import trial

ROOT = Path(__file__).parents[2]
CONFIG = {"lr": 0.08, "wd": 1e-4, "momentum": 0.9, "augmentation": 0.4, "label_smoothing": 0.1}
ON = {"estimator": "lookahead", "step": "normalized", "eta": 0.1, "batch_size": 64}
LEARNING = ("epoch", "train_loss", "train_score", "validation_loss", "validation_score", "test_score")


class Crash(Exception):
    """The worker dies."""


class FolderContext:
    """A trial's context: a checkpoint file and a list of reports; dies instead of sending report ``crash_at``."""

    device, trial_id, attempt = "cpu", 7, "0001-0001"

    def __init__(
        self, folder: Path, ohgw: dict[str, Any], config: dict[str, Any], crash_at: int | None = None, **settings: Any
    ):
        task = yaml.safe_load((ROOT / "conf/task/digits.yaml").read_text())["task"]
        self.config, self.seed, self.folder, self.crash_at = config, 11, folder, crash_at
        self.settings = {"task": task, "ohgw": ohgw, "max_resource_attr": "epochs", **settings}
        self.reports: list[dict[str, Any]] = []
        self.saves: list[dict[str, Any]] = []
        self.stop_after = 10**9
        self.interrupt_after = 10**9  # epochs
        self.started = time.perf_counter()

    def report(self, **metrics: Any) -> None:
        if len(self.reports) == self.crash_at:
            raise Crash
        self.reports.append(json.loads(json.dumps(metrics)))

    def should_stop(self) -> bool:
        self.stop_after -= 1
        return self.stop_after < 0

    def interrupted(self) -> bool:
        return len(self.reports) + 1 >= self.interrupt_after

    def save(self, state: dict[str, Any], report: dict[str, Any] | None = None) -> None:
        torch.save(state, self.folder / "state.pt")
        self.saves.append({"reports": len(self.reports), "begun": state["run"] is not None})

    def load(self) -> dict[str, Any] | None:
        file = self.folder / "state.pt"
        return torch.load(file, weights_only=True) if file.exists() else None


@pytest.fixture
def attempt(tmp_path):
    """attempt(ohgw, epochs, ...) runs one attempt of the trial in ``tmp_path`` and returns its context."""

    def run(ohgw=None, epochs=2, folder="a", config=None, crash_at=None, interrupt_after=10**9, **settings):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        ctx = FolderContext(
            path, ohgw or {"estimator": "off"}, {**(config or CONFIG), "epochs": epochs}, crash_at, **settings
        )
        ctx.interrupt_after = interrupt_after
        try:
            trial.run(ctx)
        except Crash:
            assert crash_at is not None
        return ctx

    return run


def learning(reports):
    return [{key: report[key] for key in LEARNING} for report in reports]


def test_every_epoch_is_reported_with_all_that_the_record_needs(attempt):
    reports = attempt(epochs=3).reports
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    for report in reports:
        assert {*LEARNING, "busy", "flops", "peak_memory"} == set(report)
        assert set(report["busy"]) == {"startup", "warm_start", "train", "validate", "test", "checkpoint"}
        assert report["flops"]["train"] > 0
        assert report["peak_memory"] > 0
        assert 0 <= report["test_score"] <= 1


def test_busy_seconds_are_charged_once_and_add_up(attempt):
    started = time.perf_counter()
    reports = attempt(ON, epochs=3).reports
    elapsed = time.perf_counter() - started
    charged = sum(sum(report["busy"].values()) for report in reports)
    assert charged <= elapsed  # FLOP counting is off the clock
    first, *later = (report["busy"] for report in reports)
    assert first["startup"] > 0
    assert first["warm_start"] > 0
    assert all(busy["startup"] == busy["warm_start"] == 0 for busy in later)
    assert first["warm_start"] >= reports[0]["warm_start"]["seconds"]
    assert all(busy[kind] > 0 for busy in (first, *later) for kind in ("train", "validate", "test"))
    assert later[-1]["checkpoint"] > 0


def test_a_paused_and_resumed_trial_equals_an_uninterrupted_one(attempt):
    straight = attempt(ON, epochs=4, folder="straight").reports
    first = attempt(ON, epochs=1, folder="paused").reports
    second = attempt(ON, epochs=4, folder="paused").reports
    assert second[0] == {**first[-1], "busy": second[0]["busy"]}  # sent again, in case the driver never got it
    assert learning(first + second[1:]) == learning(straight)


def test_an_interrupted_trial_checkpoints_at_the_end_of_its_epoch_and_goes_on_as_if_nothing_had_happened(attempt):
    straight = attempt(ON, epochs=5, folder="straight").reports
    first = attempt(ON, epochs=5, folder="cut", interrupt_after=3)
    assert [report["epoch"] for report in first.reports] == [1, 2, 3]
    assert first.saves[-1] == {"reports": 2, "begun": True}  # before the report of its epoch
    second = attempt(ON, epochs=5, folder="cut").reports
    assert [report["epoch"] for report in second] == [3, 4, 5]
    assert learning(first.reports + second[1:]) == learning(straight)


def test_a_zero_step_is_vanilla_bit_for_bit(attempt):
    vanilla = attempt(epochs=3, folder="off").reports
    zero = attempt(ON | {"step": "raw", "eta": 0.0}, epochs=3, folder="zero").reports
    assert learning(vanilla) == learning(zero)
    assert zero[0]["warm_start"]["x_prime"] == zero[0]["warm_start"]["x"] == CONFIG
    assert "warm_start" not in vanilla[0]


def test_the_warm_start_moves_what_is_trained_and_travels_with_the_first_report_only(attempt):
    vanilla = attempt(epochs=2, folder="off").reports
    warm = attempt(ON, epochs=2, folder="on").reports
    record = warm[0]["warm_start"]
    assert record["x"] == CONFIG
    assert record["x_prime"] != CONFIG
    assert record["flops"] == warm[0]["flops"]["warm_start"] > 0
    assert record["peak_memory"] > 0
    assert "warm_start" not in warm[1]
    assert "warm_start" not in warm[1]["flops"]
    assert learning(warm) != learning(vanilla)
    assert learning(warm) == learning(attempt(epochs=2, folder="x_prime", config=record["x_prime"]).reports)


def test_a_trial_is_warm_started_once_even_if_its_worker_dies_in_the_first_epoch(attempt, monkeypatch):
    straight = attempt(ON, epochs=2, folder="straight").reports
    dead = attempt(ON, epochs=2, folder="dies", crash_at=0)
    assert dead.saves[0] == {"reports": 0, "begun": False}
    monkeypatch.setattr(trial, "warm_start", None)
    reports = attempt(ON, epochs=2, folder="dies").reports
    assert learning(reports) == learning(straight)
    measured = {"seconds": 0, "peak_memory": 0}
    assert reports[0]["warm_start"] | measured == straight[0]["warm_start"] | measured
    assert reports[0]["busy"]["warm_start"] >= reports[0]["warm_start"]["seconds"]  # spent by the attempt that died


def test_a_resumed_trial_trains_with_x_prime_whether_it_is_sent_x_or_x_prime(attempt):
    record = attempt(ON, epochs=1, folder="x").reports[0]["warm_start"]
    by_x = attempt(ON, epochs=2, folder="x").reports
    attempt(ON, epochs=1, folder="x_prime")
    by_x_prime = attempt(ON, epochs=2, folder="x_prime", config=record["x_prime"]).reports
    assert learning(by_x) == learning(by_x_prime)


def test_a_configuration_changed_by_the_scheduler_replaces_x_prime(attempt):
    record = attempt(ON, epochs=1).reports[0]["warm_start"]
    assert trial.moved(CONFIG, record) == record["x_prime"]
    assert trial.moved(CONFIG | {"lr": 0.5}, record) == CONFIG | {"lr": 0.5}
    assert trial.moved(CONFIG, None) == CONFIG


def test_the_checkpoint_of_a_milestone_precedes_its_report(attempt):
    assert attempt(epochs=3).saves == [{"reports": 2, "begun": True}]


def test_checkpoints_between_milestones_are_a_matter_of_time(attempt):
    assert len(attempt(epochs=3, checkpoint_seconds=0).saves) == 3


def test_a_worker_lost_between_checkpoints_repeats_epochs_with_the_same_reports(attempt):
    straight = attempt(epochs=4, folder="straight").reports
    first = attempt(epochs=4, folder="dies", crash_at=2, checkpoint_seconds=0).reports
    second = attempt(epochs=4, folder="dies").reports
    assert learning(first) == learning(straight[:2])
    assert learning(second) == learning(straight[2:])


def test_a_stopped_trial_returns_in_the_middle_of_an_epoch(tmp_path):
    ctx = FolderContext(tmp_path, {"estimator": "off"}, {**CONFIG, "epochs": 5})
    ctx.stop_after = 40  # batches; an epoch has 28
    trial.run(ctx)
    assert [report["epoch"] for report in ctx.reports] == [1]


def test_a_milestone_beyond_the_task_or_none_ends_with_the_task(attempt):
    task = yaml.safe_load((ROOT / "conf/task/digits.yaml").read_text())["task"] | {"max_epochs": 2, "model": "mlp"}
    assert len(attempt(epochs=100, task=task).reports) == 2


def test_a_diverging_trial_fails_with_the_reason(attempt):
    with pytest.raises(TrialFailed, match="loss is"):
        attempt(epochs=5, config=CONFIG | {"lr": 1e18})


def test_models_are_written_at_milestones_when_asked_for(attempt, tmp_path):
    reports = attempt(ON, epochs=2, model_dir=str(tmp_path / "models")).reports
    model = torch.load(tmp_path / "models" / "7-2.pt", weights_only=True)
    assert model["epoch"] == 2
    assert model["config"] == reports[0]["warm_start"]["x_prime"]
    assert model["test_score"] == reports[-1]["test_score"]
    assert not list((tmp_path / "models").glob("*.tmp"))


def test_every_best_model_is_kept_until_the_driver_knows_which_epoch_counts(attempt, tmp_path):
    reports = attempt(epochs=9, model_dir=str(tmp_path / "models"), save_model="best").reports
    scores = [report["validation_score"] for report in reports]
    improved = [epoch for epoch, score in enumerate(scores, 1) if score > max(scores[: epoch - 1], default=-1)]
    assert len(improved) > 2
    assert sorted(int(file.stem.partition("-")[2]) for file in (tmp_path / "models").glob("*.pt")) == improved


def test_a_reused_process_gives_what_a_fresh_one_gives(attempt, tmp_path):
    attempt({"estimator": "off"}, epochs=1, folder="before", config={"lr": 0.5})
    reused = attempt(ON, epochs=2, folder="reused").reports
    (tmp_path / "fresh").mkdir()
    code = (
        "import json, pathlib, sys; from tests.harness.test_trial import *; from harness import trial\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"ctx = FolderContext(pathlib.Path({str(tmp_path / 'fresh')!r}), ON, {{**CONFIG, 'epochs': 2}})\n"
        "trial.run(ctx); print(json.dumps(ctx.reports))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert learning(json.loads(out)) == learning(reused)


def test_the_clock_charges_every_second_to_one_kind():
    clock = trial.Clock("cpu", time.perf_counter() - 1.0)
    with clock.charging("startup"):
        pass
    clock.skip()
    with pytest.raises(ZeroDivisionError), clock.charging("train"):
        raise ZeroDivisionError
    clock.add({"train": 2.0})
    taken = clock.take()
    assert taken["startup"] == pytest.approx(1.0, abs=0.2)
    assert 2.0 <= taken["train"] < 2.2
    assert set(clock.take().values()) == {0.0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_belongs_to_its_phase():
    memory = trial.PeakMemory("cpu")
    memory.reset()
    before = memory.peak()
    with mmap.mmap(-1, 128 * 2**20) as block:  # new pages, whatever an allocator has kept
        block.write(b"1" * len(block))
        assert memory.peak() >= before + 100 * 2**20
    memory.reset()
    assert memory.peak() < before + 100 * 2**20
