import itertools
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from harness.record import BUSY_KINDS
from harness.report import load_results
from harness.report.document import STYLE, latex, markdown
from harness.report.overhead import BARS, CHARGED, Cost, _pages, quartiles, section
from harness.report.study import Study
from tests.harness.degenerate_studies import STUDIES, warnings_fail, write
from tests.harness.fake_results import FakeCell, write_study


def cell(t, folder, variant="off", seed=0, **more):
    """A cell of ten reports, one every 10 s, which reaches tau at ``t`` seconds (None: never)."""
    scores = [(0.95 if t and s >= t else 0.5,) * 2 for s in range(10, 101, 10)]
    return FakeCell(scores, seconds=10, variant=variant, seed=seed, **more).write(folder)


def report(folder):
    return section(Study(load_results(folder / "default")))


def tables(found):
    return {table.name: table.frame for table in found.tables}


def figures(found):
    return {figure.name: figure for figure in found.figures}


def drawn(figure):
    with pyplot.rc_context(STYLE):
        return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def row(frame, variant):
    return frame[frame["variant"] == variant].iloc[0]


def test_busy_seconds_and_shares_by_hand(tmp_path):
    for seed in range(2):
        cell(30, tmp_path, seed=seed)
        cell(30, tmp_path, "on", seed, warm_seconds=1.0)
    found = tables(report(tmp_path))
    on = row(found["busy-seconds_all"], "on")  # ten epochs of 10 s, four trials of which each has a warm start of 1 s
    assert (on["cells"], on["warm start (s)"], on["train (s)"], on["test (s)"]) == (2, 4, 96, 5)
    assert on["all but test (s)"] == 100
    shares = row(found["overhead-shares_all"], "on")
    assert (shares["warm start"], shares["train"], shares["test (beside)"]) == pytest.approx((0.04, 0.96, 0.05))


def test_cost_of_warm_starts_by_hand(tmp_path):
    for seed in range(3):
        cell(30, tmp_path, seed=seed)
        cell(30, tmp_path, "on", seed, warm_seconds=[1.0, 2.0, 4.0][seed], warm_peak=[3, 5, 6][seed] * 10**6)
    found = tables(report(tmp_path))["warm-start-cost_all"]
    on, off = row(found, "on"), row(found, "off")
    assert on["extra GPU-hours"] == pytest.approx(28 / (300 - 28))  # four warm starts a cell, of 100 s a cell
    assert on["extra FLOPs"] == pytest.approx(3 * 4 * 50 / (3 * 10 * 1000))
    assert on["peak warm start"] == 5e6
    assert on["extra memory"] == pytest.approx(0.25)  # median of 4/4, 5/4, 6/4: the peak is that of the whole cell
    assert (on["memory pairs"], on["warm starts"]) == (3, 12)
    assert (on["q25 s"], on["median s"], on["q75 s"]) == pytest.approx((1.0, 2.0, 4.0))
    assert (off["extra GPU-hours"], off["warm starts"]) == (0, 0)
    assert math.isnan(off["extra memory"])
    assert math.isnan(off["peak warm start"])


def test_the_schedulers_seconds_come_from_the_summaries(tmp_path):
    assert any("summary.json" in note for note in report_of_one(tmp_path / "without").notes)
    paths = cell(30, tmp_path / "with")
    summary = json.loads(paths.summary.read_text())
    paths.summary.write_text(json.dumps(summary | {"decision_seconds": {"suggest": 0.25, "reports": 0.5}}))
    cell(30, tmp_path / "with", seed=1)  # one that has none
    found = report(tmp_path / "with")
    assert row(tables(found)["warm-start-cost_all"], "off")["decisions s"] == 0.75
    assert row(tables(found)["warm-start-cost_all"], "off")["cells with decisions"] == 1
    assert not any("summary.json" in note for note in found.notes)


def report_of_one(folder):
    cell(30, folder)
    return report(folder)


def test_stacked_bars_hold_the_shares(tmp_path):
    cell(30, tmp_path)
    cell(30, tmp_path, "on", warm_seconds=1.0)
    canvas = drawn(figures(report(tmp_path))["overhead_all"])
    bars = {(bar.get_label(), i): patch for bar in canvas.axes[0].containers for i, patch in enumerate(bar)}
    assert bars["warm start", 1].get_width() == pytest.approx(4)
    assert bars["train", 1].get_x() == pytest.approx(4)  # stacked on it
    assert [label.get_text() for label in canvas.axes[0].get_yticklabels()] == ["off", "on"]


def cost(condition, variant="off"):
    busy = np.arange(1.0, len(BUSY_KINDS) + 1)
    return Cost(condition, variant, ["c"], 0, busy, 0, 0, 0, 0, 0, 0, np.empty(0), 0)


@given(st.lists(st.integers(1, 30), max_size=20))
def test_pages_hold_all_groups_in_order_and_few_bars(sizes):
    groups = [[cost(str(i))] * size for i, size in enumerate(sizes)]
    pages = list(_pages(groups, BARS))
    assert [group for page in pages for group in page] == groups
    assert all(sum(map(len, page)) <= BARS for page in pages)
    assert all(sum(map(len, page)) + len(after[0]) > BARS for page, after in itertools.pairwise(pages))


def test_shares_of_charged_kinds_add_up_to_one():
    assert sum(cost("a").share(kind) for kind in CHARGED) == pytest.approx(1)


# ---- the A/A control


def controlled(folder, times, **more):
    for seed, (off, zero) in enumerate(times):
        cell(off, folder, "off", seed, **more)
        cell(zero, folder, "zero", seed, warm_seconds=1.0, **more)
    return report(folder)


def test_the_control_by_hand(tmp_path):
    found = controlled(tmp_path, [(40, 50), (50, 40), (80, 100), (None, 50), (None, None)])
    control = tables(found)["aa-control_all"].iloc[0]
    assert (control["pairs"], control["both reached"]) == (5, 3)
    # reductions -0.25, 0.2, -0.25, (0.5 to 1), 0: the median is 0
    assert (control["T: effect"], control["T: effect, upper bound"]) == (0, 0)
    # |d| = 10, 10, 20, 50 and a tie (rank 1): signs -, +, -, +, so ranks 2.5 + 5 positive of 14
    assert control["T: p"] == 1.0
    assert control["ratio median"] == 1.25  # of 1.25, 0.8, 1.25
    assert control["ratio q25"] == pytest.approx((0.8 + 1.25) / 2)
    logs = np.log([1.25, 0.8, 1.25])
    assert control["ratio log SD"] == pytest.approx(np.sqrt(((logs - logs.mean()) ** 2).sum() / 2))
    assert control["extra GPU-hours"] == pytest.approx(4 / 96)
    assert control["extra memory"] == pytest.approx(0.25)
    assert control["seeds without pair"] == "none"
    assert control["score difference"] == 0
    assert control["scores equal"] == pytest.approx(4 / 5)  # only seed 3 ends with another score


def test_the_controls_effect_is_that_of_the_summary(tmp_path):
    for seed in range(8):
        cell([30, 40, 50, 60, 70, 80, 90, 100][seed], tmp_path, "off", seed)
        cell([40, 40, 60, 50, 90, 90, 100, None][seed], tmp_path, "zero", seed, warm_seconds=1.0)
    study = Study(load_results(tmp_path / "default"))
    (control,) = tables(section(study))["aa-control_all"].to_dict("records")
    zero = next(v for v in study.conditions[0].comparison.variants if v.variant == "zero")
    for unit, word in (("wallclock", "T"), ("gpu_hours", "T in GPU-hours")):
        effect = zero.effect[unit]
        assert (control[f"{word}: effect"], control[f"{word}: CI low"]) == (effect.low, effect.ci_low)
        assert control[f"{word}: p"] == effect.p


def test_a_control_says_which_seeds_have_no_pair(tmp_path):
    controlled(tmp_path, [(40, 50)] * 2)
    cell(40, tmp_path, "off", 7)
    cell(40, tmp_path, "zero", 8)
    control = tables(report(tmp_path))["aa-control_all"].iloc[0]
    assert control["seeds without pair"] == "only here 8, only off 7"


def test_without_a_control_the_override_is_named(tmp_path):
    cell(40, tmp_path)
    cell(40, tmp_path, "zero", scheduler="asha")
    notes = report(tmp_path).notes
    assert any("no A/A control in digits / pasha" in note and "ohgw=zero" in note for note in notes)
    assert any("ohgw=off adds them to digits / asha" in note for note in notes)


def test_the_figure_of_the_control_holds_every_pair(tmp_path):
    found = controlled(tmp_path, [(40, 50), (50, 40), (80, 100), (None, 50), (50, None), (None, None)])
    times, scores = drawn(figures(found)["aa-control_all"]).axes
    exact, tied, sooner, later = (points.get_offsets()[:, 0].tolist() for points in times.collections)
    assert exact == pytest.approx([-25, 20, -25])
    assert tied == [0]
    assert sooner == pytest.approx([50])
    assert later == pytest.approx([-100])  # 1 - 100/50: T_zero is later than the budget of 100 s
    assert len(scores.collections[0].get_offsets()) == 6


def test_without_a_target_the_control_has_no_times(tmp_path):
    found = controlled(tmp_path, [(40, 50)] * 3, keys={"task.tau": None, "task.taus": []})
    control = tables(found)["aa-control_all"].iloc[0]
    assert math.isnan(control["T: effect"])
    assert math.isnan(control["T: p"])
    assert control["score difference"] == 0
    drawn(figures(found)["aa-control_all"])


# ---- odd studies


@warnings_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_odd_studies_give_tables_figures_or_a_reason(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    assert len(found.tables) >= 3
    assert found.figures or any("no shares to draw" in note for note in found.notes)
    for table in found.tables:
        assert len(table.frame)
        latex(table), markdown(table)
    for figure in found.figures:
        drawn(figure).savefig(tmp_path / f"{figure.name}.png")


def test_no_usable_cell_is_said(tmp_path):
    path = write_study(tmp_path, ("off",), [0])
    for config in path.glob("*/config.yaml"):
        config.unlink()
    found = section(Study(load_results(path)))
    assert (found.tables, found.figures) == ([], [])
    assert len(found.notes) == 1


def test_quartiles_of_nothing_are_unknown():
    assert all(map(math.isnan, quartiles(np.empty(0))))
