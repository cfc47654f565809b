import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from harness.record import BUSY_KINDS
from harness.report import load_results
from harness.report.document import STYLE
from harness.report.learning_curves import RUNS, attempts, chosen_trials, section, worker_lanes
from harness.report.study import Study
from tests.harness.degenerate_studies import STUDIES, warnings_fail, write
from tests.harness.fake_results import FakeCell, write_study


def study(path):
    return Study(load_results(path))


def drawn(figure):
    with pyplot.rc_context(STYLE):
        return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def named(found, topic):
    return [figure for figure in found.figures if figure.name.startswith(f"{topic}_")]


# ---- which runs and trials


def test_the_run_with_the_median_score_is_drawn(tmp_path):
    for seed, score in enumerate([0.9, 0.2, 0.7, math.nan, 0.5]):
        FakeCell([(0.5, score)], seed=seed).write(tmp_path)
    FakeCell([(0.5, 0.1)], seed=9, close=None).write(tmp_path)  # unfinished
    found = section(study(tmp_path / "default"))
    # of 0.2, 0.5, 0.7, 0.9 the lower of the two in the middle
    assert [figure.name for figure in named(found, "run")] == ["run_digits-pasha-off-seed4"]
    assert found.figures[0].data["panels"][0]["seed"] == 4
    (note,) = found.notes
    assert "1 of 6" in note
    assert f"python -m harness.report {tmp_path / 'default'}/CELL" in note


def test_a_path_of_one_cell_draws_its_run(tmp_path):
    path = write_study(tmp_path, ("off", "on"), range(3))
    cell = next(path.glob("*-on-1-*"))
    found = section(study(cell))
    assert [figure.name for figure in named(found, "run")] == ["run_digits-pasha-on-seed1"]
    assert named(found, "run")[0].data["timeline"]
    assert found.notes == []


def test_pages_are_spread_over_conditions_with_off_first_and_controls_last(tmp_path):
    for scheduler in ("asha", "pasha", "hyperband", "random", "bohb"):
        for variant, eta in (("off", 0.1), ("zero", 0), ("normalized", 0.1), ("on", 0.001)):
            keys = {"ohgw": {"estimator": "lookahead", "eta": eta}}
            FakeCell(variant=variant, scheduler=scheduler, keys=keys).write(tmp_path)
    found = section(study(tmp_path / "default"))
    names = [figure.name.split("_")[1].removeprefix("digits-") for figure in named(found, "run")]
    assert len(names) == RUNS
    drawn_variants = {s: [n.split("-")[1] for n in names if n.startswith(f"{s}-")] for s in ("asha", "bohb", "random")}
    assert drawn_variants == {"asha": ["off", "on", "normalized"], "bohb": ["off", "on", "normalized"],
                              "random": ["off", "on"]}  # fmt: skip
    assert len(named(found, "curves")) == 5


def reports(curves):
    rows = [{"trial": trial, "epoch": i + 1, "validation_score": score}
            for trial, curve in curves.items() for i, score in enumerate(curve)]  # fmt: skip
    return pd.DataFrame(rows)


def test_trials_are_chosen_by_the_rank_of_their_best_score():
    curves = {trial: [0.1 * trial, 0.05] for trial in range(8)} | {99: [math.nan]}
    # ranking 7, 6, ..., 0: ranks 1, 2, ceil(8/4) = 2 (drawn already), ceil(8/2) = 4
    assert chosen_trials(reports(curves), 7, "max") == {0: 7, 1: 6, 3: 4}
    assert chosen_trials(reports({trial: [0.1 * trial] for trial in range(8)}), 0, "min") == {0: 0, 1: 1, 3: 3}


def test_the_incumbent_comes_first_among_equals():
    curves = {0: [0.5, 0.9], 1: [0.9], 2: [0.1]}
    assert chosen_trials(reports(curves), 1, "max") == {0: 1, 1: 0}


def test_no_score_no_trial():
    assert chosen_trials(reports({0: [math.nan]}), -1, "max") == {}


# ---- figures


def test_curves_hold_losses_and_scores(tmp_path):
    FakeCell([(0.5, 0.4), (0.8, 0.7), (0.7, 0.6), (0.6, 0.6)], epochs_per_trial=[3, 1]).write(tmp_path)
    (figure,) = named(section(study(tmp_path / "default")), "curves")
    (panel,) = figure.data["panels"]
    assert [curve["trial"] for curve in panel["curves"]] == [0, 1]
    top, bottom = drawn(figure).axes
    assert top.lines[0].get_ydata().tolist() == [1, 1, 1]
    assert bottom.lines[1].get_xdata().tolist() == [1, 2, 3]
    assert bottom.lines[1].get_ydata().tolist() == [0.5, 0.8, 0.7]
    assert bottom.lines[3].get_ydata().tolist() == [0.6]
    assert top.get_yscale() == "linear"


def test_losses_that_span_decades_are_on_a_logarithmic_axis(tmp_path):
    paths = FakeCell([(0.5, 0.4), (0.8, 0.7)]).write(tmp_path)
    events = [json.loads(line) for line in paths.events.read_text().splitlines()]
    for event in events:
        if event["e"] == "report":
            event["result"]["train_loss"] = 0.001
    paths.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    (figure,) = named(section(study(tmp_path / "default")), "curves")
    assert drawn(figure).axes[0].get_yscale() == "log"


def test_the_page_of_a_run_holds_its_numbers(tmp_path):
    scores = [(0.5, 0.4), (0.8, 0.7), (0.6, 0.9), (0.95, 0.93)]
    decisions = ["CONTINUE", "STOP", "STOP", "STOP"]
    cell = FakeCell(scores, epochs_per_trial=[2, 1, 1], decisions=decisions, variant="on", warm_seconds=0.5)
    cell.write(tmp_path)
    (figure,) = named(section(study(tmp_path / "default")), "run")
    assert "3 trials with 4 epochs" in figure.caption
    incumbent, curves, kinds, workers = drawn(figure).axes
    validation, test, target = incumbent.lines
    assert validation.get_xdata().tolist() == [2, 4, 6, 8]
    assert validation.get_ydata().tolist() == [0.5, 0.8, 0.8, 0.95]
    assert test.get_ydata().tolist() == [0.4, 0.7, 0.7, 0.93]
    assert target.get_ydata()[0] == 0.9
    assert curves.collections[0].get_segments()[0].tolist() == [[1, 0.5], [2, 0.8]]
    assert curves.collections[1].get_offsets().tolist() == [[1, 0.6], [1, 0.95]]  # trials of one epoch are dots
    widths = dict(zip(BUSY_KINDS, (bar.get_width() for bar in kinds.patches), strict=True))
    assert (widths["warm_start"], widths["train"], widths["test"]) == (1.5, 6.5, 2.0)
    assert [(bar.get_x(), bar.get_width(), bar.get_y() + 0.4) for bar in workers.patches] == [
        (0, 4, 0),
        (4, 2, 0),
        (6, 2, 0),
    ]


def test_a_run_whose_events_are_gone_has_no_workers(tmp_path):
    path = write_study(tmp_path, ("off",), [0])
    loaded = study(path)
    for events in path.glob("*/events.jsonl"):
        events.unlink()
    (figure,) = named(section(loaded), "run")
    assert figure.data["timeline"] == []
    drawn(figure)


# ---- workers


def test_attempts_are_from_each_start_or_resume_to_what_ended_it(tmp_path):
    events: list[dict[str, Any]] = [
        {"e": "open", "t": 0},
        {"e": "start", "t": 0, "trial": 0, "config": {}},
        {"e": "start", "t": 0, "trial": 1, "config": {}},
        {"e": "report", "t": 2, "trial": 0, "decision": "PAUSE", "result": {"epoch": 1}},
        {"e": "start", "t": 3, "trial": 2, "config": {}},
        {"e": "report", "t": 4, "trial": 1, "decision": "CONTINUE", "result": {"epoch": 1}},
        {"e": "error", "t": 5, "trial": 1},
        {"e": "resume", "t": 6, "trial": 0, "config": {}},
        {"e": "report", "t": 7, "trial": 0, "decision": "CONTINUE", "result": {"epoch": 2}},
        {"e": "close", "t": 9, "why": "epochs"},
    ]
    for event in events:
        if "result" in event:
            event["result"] |= {"validation_score": 0.5, "test_score": 0.5}
    folder = tmp_path / "cell"
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    # trial 2 has not spoken: when it was cut off is not known; trial 0 was after its last report
    assert attempts(folder) == [(0, 0, 2), (1, 0, 5), (0, 6, 7)]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_lanes_hold_no_two_stretches_at_once_and_are_as_few_as_possible(spans):
    stretches = sorted(((i, b, b + n) for i, (b, n) in enumerate(spans)), key=lambda s: s[1:])
    packed = worker_lanes(stretches)
    assert [entry[1:] for entry in packed] == stretches
    for lane in {entry[0] for entry in packed}:
        inside = [(begin, end) for own, _, begin, end in packed if own == lane]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(inside))
    at_once = max((sum(b <= t < e for _, b, e in stretches) for _, t, _ in stretches), default=0)
    assert len({entry[0] for entry in packed}) == at_once


@warnings_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_odd_studies_give_figures_or_a_reason(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    assert found.figures or found.notes
    assert len({figure.name for figure in found.figures}) == len(found.figures)
    for figure in found.figures:
        drawn(figure).savefig(tmp_path / f"{figure.name}.png")


def test_a_score_of_nan_breaks_no_figure(tmp_path):
    FakeCell([(0.5, 0.4), (math.nan, math.nan), (0.7, 0.6)]).write(tmp_path)
    found = section(study(tmp_path / "default"))
    (run,) = named(found, "run")
    assert np.isnan(run.data["score"]).sum() == 1
    drawn(run)
