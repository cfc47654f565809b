import math

import pandas as pd
import pytest

from harness.record import CellPaths, EventLog, read_config, write_config
from harness.report import load, load_results
from harness.report.study import Study
from tests.harness.fake_results import FakeCell, write_study

SCORES = [(0.5, 0.4), (0.8, 0.7), (0.95, 0.93), (0.6, 0.6)]


def test_trials_have_their_epochs_scores_and_warm_starts(tmp_path):
    FakeCell(SCORES, variant="on", warm_seconds=0.1, epochs_per_trial=3).write(tmp_path)
    trials = load_results(tmp_path / "default").trials
    assert trials["trial"].tolist() == [0, 1]
    assert trials["epochs"].tolist() == [3, 1]
    assert trials["t"].tolist() == [0.0, 6.0]
    assert trials["best_validation_score"].tolist() == [0.95, 0.6]
    assert trials["final_validation_score"].tolist() == [0.95, 0.6]
    assert trials["estimator"].tolist() == ["lookahead"] * 2
    assert trials["seconds"].tolist() == [0.1, 0.1]
    assert trials["flops"].tolist() == [50, 50]
    assert not trials["failed"].any()


def test_trials_without_warm_start_or_report(tmp_path):
    paths = FakeCell(SCORES[:1], close=None).write(tmp_path)
    with EventLog(paths.events) as log:
        log.append({"e": "start", "t": 3.0, "trial": 1, "config": {"lr": 0.5}})
        log.append({"e": "error", "t": 4.0, "trial": 1, "reason": "diverged"})
    results = load_results(tmp_path / "default")
    assert results.trials["epochs"].tolist() == [1, 0]
    assert results.trials["failed"].tolist() == [False, True]
    assert results.trials["estimator"].isna().all()
    assert results.trials["seconds"].isna().all()
    assert math.isnan(results.trials["best_validation_score"][1])
    moved = results.coordinates
    assert moved["x"].tolist() == moved["x_prime"].tolist() == [0.1, 0.5]


def test_coordinates_are_in_units_of_the_space(tmp_path):
    FakeCell(SCORES[:1], variant="on", warm_seconds=0.1).write(tmp_path)
    (row,) = load_results(tmp_path / "default").coordinates.to_dict("records")
    assert (row["name"], row["x"], row["x_prime"]) == ("lr", 0.1, 0.11)  # lr from 0.1 to 1
    assert (row["unit_x"], row["unit_x_prime"]) == pytest.approx((0.0, 0.01 / 0.9))


def test_logarithms_integers_and_choices(tmp_path):
    paths = FakeCell(SCORES[:1], close=None).write(tmp_path)
    config = read_config(paths)
    config["task"]["spaces"]["one"] = {
        "lr": {"lower": 0.01, "upper": 1.0, "log": True},
        "depth": {"lower": 1, "upper": 9, "integer": True},
        "optimizer": {"choices": ["sgd", "adamw"]},
    }
    write_config(paths, config)
    with EventLog(paths.events) as log:
        log.append({"e": "start", "t": 3.0, "trial": 1, "config": {"lr": 0.1, "depth": 4, "optimizer": "adamw"}})
    frame = load_results(tmp_path / "default").coordinates
    last = frame[frame["trial"] == 1].set_index("name")
    assert last.loc["lr", "unit_x"] == pytest.approx(0.5)
    assert last.loc["depth", "x"] == 4
    assert last.loc["optimizer", "x"] == 1
    assert last["unit_x"].isna()["depth"]
    first = frame[frame["trial"] == 0].set_index("name")
    assert first["x"].isna()["optimizer"]  # its configuration lacks it


def test_gradients_are_per_unit_coordinate(tmp_path):
    cell = FakeCell(SCORES[:1], variant="on", warm_seconds=0.1, close=None)
    paths = cell.write(tmp_path)
    with EventLog(paths.events) as log:
        log.append({"e": "start", "t": 3.0, "trial": 1, "config": {"lr": 0.1}})
        warm = {
            "estimator": "lookahead",
            "fallback": None,
            "x": {"lr": 0.1},
            "x_prime": {"lr": 0.2},
            "gradient": {"lr": -2.0},
        }
        result = {**cell._result(1, 0.5, 0.5), "warm_start": warm}
        log.append({"e": "report", "t": 4.0, "trial": 1, "decision": "STOP", "result": result})
    frame = load_results(tmp_path / "default").coordinates
    assert frame[frame["trial"] == 1]["gradient"].tolist() == pytest.approx([-2.0 * 0.9])


def test_several_processes_read_the_same(tmp_path, monkeypatch):
    path = write_study(tmp_path, seeds=range(4))
    CellPaths.of(next(path.glob("*-on-1-*"))).config.unlink()
    alone = load_results(path)
    monkeypatch.setattr(load, "PARALLEL_FROM", 0)
    together = load_results(path)
    assert together.corrupt == alone.corrupt
    for name in ("cells", "reports", "trials", "coordinates"):
        pd.testing.assert_frame_equal(getattr(together, name), getattr(alone, name))


def test_a_study_knows_the_variant_and_seed_of_every_trial(tmp_path):
    study = Study(load_results(write_study(tmp_path, seeds=range(3))))
    counts = study.trials.groupby(["variant", "seed"], observed=True).size()
    assert counts.to_dict() == {(variant, seed): 4 for variant in ("off", "on") for seed in range(3)}
    assert len(study.coordinates) == len(study.trials)
    (condition,) = study.conditions
    assert condition.variants == ["off", "on"]
    assert condition.ohgw("on")["estimator"] == "lookahead"
    assert study.reports("digits-pasha-on-2-0123abcd")["epoch"].tolist() == [1, 2, 3] * 4
    assert study.reports("nothing").empty
