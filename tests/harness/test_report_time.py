import io
import math
import pickle
import statistics

import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from harness.report import load_results
from harness.report.compare import times_to
from harness.report.document import STYLE, latex, markdown
from harness.report.stats import kaplan_meier
from harness.report.study import Study
from harness.report.time_to_target import RANGE, incumbent_changes, section, targets
from tests.harness.degenerate_studies import STUDIES, OtherCell, warnings_fail, write
from tests.harness.fake_results import FakeCell, write_study

TIMES = [(40, 20), (50, 40), (80, 20), (None, 50), (None, None)]  # of off and on, seconds


def cell(t, folder, variant="off", seed=0, **more):
    """A cell of 100 s which reaches tau at ``t`` seconds (None: never)."""
    scores = [(0.95 if t and s >= t else 0.5,) * 2 for s in range(10, 101, 10)]
    FakeCell(scores, seconds=10, variant=variant, seed=seed, **more).write(folder)


def study(folder, times=TIMES, **more):
    for seed, (off, on) in enumerate(times):
        cell(off, folder, "off", seed, **more)
        cell(on, folder, "on", seed, **more)
    return Study(load_results(folder / "default"))


def tables(found):
    return {table.name: table for table in found.tables}


def rows(table):
    return {row["variant"]: row for row in table.frame.to_dict("records")}


def drawn(figure):
    return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def figures(found):
    return {figure.name: figure for figure in found.figures}


def test_the_table_of_times_by_hand(tmp_path):
    found = section(study(tmp_path))
    table = tables(found)["time-to-target-wallclock_digits-pasha"]
    off, on = rows(table)["off"], rows(table)["on"]
    assert (off["n"], off["unfinished"], off["reached"], off["censored"], off["pending"]) == (5, 0, 3, 2, 0)
    assert (off["q25"], off["median"], off["q75"]) == (50, 80, math.inf)
    assert (on["q25"], on["median"], on["q75"]) == (20, 40, 50)
    assert (off["horizon"], off["restricted mean"], on["restricted mean"]) == (100, 370 / 5, 230 / 5)
    hours = rows(tables(found)["time-to-target-gpu-hours_digits-pasha"])
    assert hours["on"]["median"] == pytest.approx(40 / 3600)


def test_the_table_of_effects_by_hand(tmp_path):
    on = rows(tables(section(study(tmp_path)))["effect-wallclock_digits-pasha"])["on"]
    # 1 - T/T_off: 0.5, 0.2, 0.75, 0.5 to 1, 0; T_off - T: 20, 10, 60, 50, 0, of ranks 3, 2, 5, 4 and 1
    assert (on["pairs"], on["B"], on["effect from"], on["effect to"]) == (5, 100, 0.5, 0.5)
    assert (on["p"], on["Holm p"]) == pytest.approx((2 / 16, 2 / 16))
    assert on["rank-biserial"] == pytest.approx(14 / 15)
    spread = statistics.stdev([20, 40, 20, 50, 100]) / statistics.stdev([40, 50, 80, 100, 100])
    assert on["SD ratio"] == pytest.approx(spread)
    assert on["fallback"] == pytest.approx(1 - 230 / 370)
    assert on["its CI low"] < on["fallback"] < on["its CI high"]
    assert on["read"] == "effect"


def test_the_fallback_is_to_be_read_where_fewer_than_half_of_a_side_reach_the_target(tmp_path):
    times = [(40, 20), (None, 40), (None, 20), (90, None), (None, 30)]
    on = rows(tables(section(study(tmp_path, times)))["effect-wallclock_digits-pasha"])["on"]
    assert on["read"] == "fallback"


def test_holm_is_over_all_tuples_of_the_report_by_unit(tmp_path):
    study(tmp_path)
    found = section(study(tmp_path, [(40, 20), (50, 40)], scheduler="asha"))
    for unit in ("wallclock", "gpu-hours"):
        pasha = rows(tables(found)[f"effect-{unit}_digits-pasha"])["on"]
        asha = rows(tables(found)[f"effect-{unit}_digits-asha"])["on"]
        assert (pasha["p"], asha["p"]) == pytest.approx((1 / 8, 1 / 2))
        assert (pasha["Holm p"], asha["Holm p"]) == pytest.approx((2 / 8, 1 / 2))


def test_survival_curves_step_at_the_times_and_are_marked_where_cells_are_censored(tmp_path):
    figure = figures(section(study(tmp_path)))["survival_digits-pasha"]
    axes = drawn(figure).axes
    curve, ticks = axes[0].lines[:2]  # of off
    assert curve.get_xdata().tolist() == [0, 40, 50, 80, 100]
    np.testing.assert_allclose(curve.get_ydata(), [1, 0.8, 0.6, 0.4, 0.4])
    assert ticks.get_xdata().tolist() == [100, 100]
    np.testing.assert_allclose(ticks.get_ydata(), [0.4, 0.4])
    np.testing.assert_allclose(axes[1].lines[0].get_xdata(), np.array([0, 40, 50, 80, 100]) / 3600)
    at_risk = {text.get_position()[0]: text.get_text() for text in axes[2].texts if text.get_position()[1] == 0}
    assert at_risk == {0: "5", 25: "5", 50: "4", 75: "3", 100: "2"}
    assert "off 5, on 5" in figure.caption


def test_pairs_are_drawn_with_censored_ones_on_the_edge(tmp_path):
    axes = drawn(figures(section(study(tmp_path)))["pairs_digits-pasha"]).axes
    diagonal, both, only_off, only_on, neither = axes[0].lines
    assert diagonal.get_xdata()[0] == diagonal.get_ydata()[0]
    assert (both.get_xdata().tolist(), both.get_ydata().tolist()) == ([40, 50, 80], [20, 40, 20])
    assert len(only_off.get_xdata()) == 0
    edge = axes[0].get_xlim()[1]
    assert (only_on.get_xdata().tolist(), only_on.get_ydata().tolist()) == ([edge], [50])
    assert neither.get_xdata() == [edge]
    assert [text.get_text() for text in axes[0].texts] == ["1"]


def test_the_forest_has_a_line_a_condition_and_variant(tmp_path):
    study(tmp_path)
    figure = figures(section(study(tmp_path, [(40, 20), (50, 100)], scheduler="asha")))["effects_all"]
    assert [(row.head, row.label) for row in figure.data["rows"]] == [
        ("digits / asha", "on (2*)"),
        ("digits / pasha", "on (5*)"),
    ]
    axis = drawn(figure).axes[0]
    points = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert points == pytest.approx([(0.5 - 1) / 2, 0.5])
    assert [text.get_text() for text in axis.texts] == ["digits / asha", "digits / pasha"]


def test_a_forest_of_many_tuples_is_several_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.report.time_to_target.FOREST_ROWS", 1)
    study(tmp_path)
    found = figures(section(study(tmp_path, scheduler="asha")))
    assert [len(found[name].data["rows"]) for name in ("effects_all", "effects_all-2")] == [1, 1]
    assert "Part 2 of 2" in found["effects_all-2"].caption


def test_missing_pairs_are_listed(tmp_path):
    write_study(tmp_path, ("off",), range(0, 6))
    write_study(tmp_path, ("on",), range(2, 9))
    FakeCell([(0.5, 0.5)], variant="on", seed=9, close=None).write(tmp_path)
    FakeCell([(0.5, 0.5)], seed=9).write(tmp_path)
    found = section(Study(load_results(tmp_path / "default")))
    assert tables(found)["missing-pairs_all"].frame.to_dict("records") == [{
        "condition": "digits / pasha", "variant": "on", "no off cell": "6..8", "no cell of the variant": "0,1",
        "not both finished": "9",
    }]  # fmt: skip


def test_without_missing_pairs_there_is_no_table_of_them(tmp_path):
    assert "missing-pairs_all" not in tables(section(study(tmp_path)))


# ---- the sweep over targets


def stairs(folder, variant, seed, heights):
    FakeCell([(height, height) for height in heights], seconds=10, variant=variant, seed=seed).write(folder)


def test_the_sweep_over_targets_by_hand(tmp_path):
    for seed in range(2):
        stairs(tmp_path, "off", seed, [0.5, 0.6, 0.7, 0.8])
        stairs(tmp_path, "on", seed, [0.6, 0.7, 0.7, 0.7])
    found = section(Study(load_results(tmp_path / "default")))
    frame = tables(found)["tau-sweep_digits-pasha"].frame
    on = frame[(frame["unit"] == "wall-clock") & (frame["variant"] == "on")].set_index("target")
    off = frame[(frame["unit"] == "wall-clock") & (frame["variant"] == "off")].set_index("target")
    assert on.index.min() == 0.7  # the 5 % quantile of 0.7, 0.7, 0.8, 0.8
    assert (on.loc[0.7, "effect from"], on.loc[0.7, "effect to"]) == pytest.approx((1 - 20 / 30, 1 - 20 / 30))
    assert (on.loc[0.7, "share reached"], off.loc[0.7, "share reached"]) == (1, 1)
    higher = on[(on.index > 0.7) & (on.index <= 0.8)]  # only off gets there, at 40 s = B
    assert (higher["effect from"] == -math.inf).all()
    assert (higher["effect to"] == 0).all()
    assert (higher["share reached"] == 0).all()
    assert (off.loc[higher.index, "share reached"] == 1).all()
    assert on[on["recorded"]].index.tolist() == [0.9]
    assert (on.loc[0.9, "effect from"], on.loc[0.9, "effect to"]) == (0, 0)  # neither gets there
    axes = drawn(figures(found)["tau-sweep_digits-pasha"]).axes
    assert axes[-1].lines[0].get_ydata().tolist() == off["share reached"].tolist()


def test_at_the_recorded_target_the_sweep_has_the_effect_of_the_table(tmp_path):
    for seed, times in enumerate(TIMES):
        for variant, t in zip(("off", "on"), times, strict=True):
            cell(t, tmp_path, variant, seed, tau=0.93)
    found = section(Study(load_results(tmp_path / "default")))
    frame = tables(found)["tau-sweep_digits-pasha"].frame
    for unit, words in (("wall-clock", "wallclock"), ("GPU-hours", "gpu-hours")):
        swept = frame[frame["recorded"] & (frame["unit"] == unit) & (frame["variant"] == "on")].iloc[0]
        row = rows(tables(found)[f"effect-{words}_digits-pasha"])["on"]
        for column in ("pairs", "effect from", "effect to", "CI low", "CI high"):
            np.testing.assert_equal(swept[column], row[column])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.one_of(st.just(math.nan), st.floats(-1, 2)))
def test_targets_are_ascending_within_the_scores_and_have_tau(scores, tau):
    found = targets(np.array(scores), tau)
    assert (np.diff(found) > 0).all()
    assert math.isnan(tau) or tau in found
    low, high = np.quantile(scores, RANGE)
    assert found[0] == pytest.approx(np.fmin(low, tau))
    assert found[-1] == pytest.approx(np.fmax(high, tau))


def test_the_changes_of_the_incumbent_tell_every_time_to_target(tmp_path):
    results = load_results(write_study(tmp_path, seeds=range(4), steps=30))
    changes = incumbent_changes(results.reports)
    assert len(changes) < len(results.reports)
    for tau in np.linspace(0.1, 1.0, 30):
        full, few = (times_to(results.cells, reports, tau, "max") for reports in (results.reports, changes))
        for name in full:
            np.testing.assert_array_equal(full[name], few[name])
    count = results.reports.groupby("cell", observed=True).cumcount() + 1
    assert changes["count"].tolist() == count[changes.index].tolist()


# ---- every kind of study


def check(found):
    """Every table can be written, every figure drawn from data that went to another process, with a name of its own."""
    names = [table.name for table in found.tables]
    assert len(names) == len(set(names))
    for table in found.tables:
        assert len(table.frame)
        assert markdown(table)
        assert latex(table)
    names = [figure.name for figure in found.figures]
    assert len(names) == len(set(names))
    with pyplot.rc_context(STYLE):
        for figure in found.figures:
            assert isinstance(drawn(figure), matplotlib.figure.Figure)
            assert figure.caption


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
@warnings_fail
def test_every_kind_of_study_has_sound_output_or_a_sentence(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    check(found)
    assert found.tables or found.figures or found.notes


@warnings_fail
def test_figures_can_be_saved_without_a_warning(tmp_path):
    for figure in section(Study(load_results(write_study(tmp_path, ("off", "zero", "on"), steps=40)))).figures:
        with pyplot.rc_context(STYLE):
            for ending in ("pdf", "png"):
                drawn(figure).savefig(io.BytesIO(), format=ending)


def found(name, tmp_path):
    return section(Study(load_results(write(name, tmp_path))))


def test_a_running_sweep_counts_pending_cells(tmp_path):
    on = rows(tables(found("running", tmp_path))["time-to-target-wallclock_digits-pasha"])["on"]
    assert (on["n"], on["unfinished"], on["pending"]) == (3, 2, 2)


def test_without_a_target_there_is_only_the_sweep(tmp_path):
    section = found("no tau", tmp_path)
    assert [figure.name for figure in section.figures] == ["tau-sweep_digits-pasha"]
    assert any("no target is set" in note for note in section.notes)
    assert not section.tables[0].frame["recorded"].any()


def test_without_off_the_notes_say_so(tmp_path):
    section = found("no off", tmp_path)
    assert "effect-wallclock_digits-pasha" not in tables(section)
    assert any("There are no off cells" in note for note in section.notes)
    assert "pairs_digits-pasha" not in figures(section)


def test_all_censored_curves_stay_at_one(tmp_path):
    section = found("all censored", tmp_path)
    heights = drawn(figures(section)["survival_digits-pasha"]).axes[0].lines[0].get_ydata()
    assert set(heights.tolist()) == {1.0}
    on = rows(tables(section)["effect-wallclock_digits-pasha"])["on"]
    assert (on["effect from"], on["p"], on["read"]) == (0, 1, "fallback")
    assert math.isnan(on["SD ratio"])


def test_lower_scores_can_be_better(tmp_path):
    section = found("lower is better", tmp_path)
    frame = tables(section)["tau-sweep_digits-pasha"].frame
    assert "error at most 0.2" in tables(section)["time-to-target-wallclock_digits-pasha"].caption
    off = frame[(frame["variant"] == "off") & (frame["unit"] == "wall-clock")]
    assert (np.diff(off["share reached"]) >= 0).all()  # higher targets are easier
    assert off["share reached"].iloc[-1] == 1


def test_scores_that_are_not_numbers_never_reach_a_target(tmp_path):
    row = rows(tables(found("unknown scores", tmp_path))["time-to-target-wallclock_digits-pasha"])
    assert (row["off"]["n"], row["on"]["reached"], row["on"]["censored"]) == (3, 0, 3)
    assert row["on"]["median"] == math.inf


def test_settings_have_files_of_their_own(tmp_path):
    names = figures(found("two settings", tmp_path))
    assert {"survival_digits-pasha-n-workers-2", "survival_digits-pasha-n-workers-4"} <= set(names)


def test_a_folder_without_usable_cells_has_a_sentence(tmp_path):
    paths = FakeCell().write(tmp_path)
    paths.events.write_text('{"e": "report"}\n')
    made = section(Study(load_results(tmp_path / "default")))
    assert (made.tables, made.figures) == ([], [])
    assert made.notes == ["There are no usable cells, hence no times to target."]


def test_a_cell_with_another_configured_budget_is_followed_until_there(tmp_path):
    for seed in range(2):
        for variant in ("off", "on"):
            scores = [(0.5, 0.5)] * 8 + [(0.95, 0.95)] * 2
            OtherCell(scores, seconds=10, variant=variant, seed=seed, budget={"wallclock": 70.0}).write(tmp_path)
    figure = figures(section(Study(load_results(tmp_path / "default"))))["survival_digits-pasha"]
    times, observed = figure.data["followed"]["wallclock"]["off"]
    assert (times.tolist(), observed.tolist()) == ([70, 70], [False, False])
    assert len(kaplan_meier(times, observed).times) == 0
