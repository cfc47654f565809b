"""The studies of conf/experiment end to end, at reduced size: sweep in virtual time, then the report."""

import json
from pathlib import Path

import pytest

from harness.sweep import make_plan

ETAS = {"on": {1e-4, 3e-4, 1e-3, 3e-3, 1e-2}, "normalized": {0.02, 0.05, 0.1, 0.2}}


def test_the_ablation_covers_its_grid():
    cells = make_plan(["experiment=ablation", "seed=0"]).cells
    variants = [cell.config["ohgw"] for cell in cells if cell.config["ohgw"]["estimator"] != "off"]
    for step, preset in (("raw", "on"), ("normalized", "normalized")):
        assert {v["eta"] for v in variants if v["step"] == step} == ETAS[preset]
    assert {v["n_steps"] for v in variants} == {1, 5}
    assert {tuple(v["mask"]) for v in variants} >= {(), ("lr",), ("momentum",), ("lr", "momentum"), ("wd",)}
    assert {v["batch_size"] for v in variants} == {16, 32, 64, 128, 256, 448}
    assert {cell.config["task"]["label_noise"] for cell in cells} == {0.0, 0.1, 0.2, 0.4}
    settings = {cell.config["labels"]["setting"] for cell in cells}
    with_off = {cell.config["labels"]["setting"] for cell in cells if cell.config["ohgw"]["estimator"] == "off"}
    assert with_off == settings  # everything has something to be compared with


def test_transfer_has_one_setting_and_every_family_that_needs_no_download():
    cells = make_plan(["experiment=transfer", "seed=0"]).cells
    assert {cell.task for cell in cells} == {"digits", "text", "uci", "xgboost", "cartpole_ppo"}
    assert {cell.variant for cell in cells} == {"off", "normalized", "random"}
    assert all(cell.config["backend"]["name"] == "simulated" for cell in cells)
    assert all(cell.config["task"]["data_dir"] is None for cell in cells if "data_dir" in cell.config["task"])


@pytest.mark.slow
def test_the_ablation_runs_end_to_end(tmp_path: Path, harness):
    words = [
        "experiment=ablation",
        "seed=0,1",
        "budget.epochs=5",
        "task.model=mlp",
        "task.max_epochs=3",
        "tracker=none",
    ]
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = len(make_plan(words).cells)
    assert f"cells: {cells} finished" in done.stdout
    report = harness("results/ablation", module="harness.report")
    assert report.returncode == 0, report.stdout + report.stderr
    page = (tmp_path / "results/ablation/report/index.html").read_text()
    for factor in ("n_steps", "mask", "label_noise"):
        assert factor in page


@pytest.mark.slow
def test_the_transfer_study_runs_end_to_end(tmp_path: Path, harness):
    words = ["experiment=transfer", "seed=0,1", "ohgw=off,normalized", "budget.epochs=4", "tracker=none"]
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cells: 20 finished" in done.stdout
    report = harness("results/transfer", module="harness.report")
    assert report.returncode == 0, report.stdout + report.stderr
    verdict = json.loads((tmp_path / "results/transfer/report/verdict.json").read_text())
    assert len(verdict["tuples"]) == 5
