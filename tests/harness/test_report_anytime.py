import io
import math
import pickle

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from harness.report import load_results
from harness.report.anytime import blocks, complete, section
from harness.report.document import STYLE, latex, markdown
from harness.report.study import Study
from tests.harness.degenerate_studies import STUDIES, OtherCell, warnings_fail, write
from tests.harness.fake_results import FakeCell, write_study


def made(folder):
    return section(Study(load_results(folder / "default")))


def tables(found):
    return {table.name: table for table in found.tables}


def figures(found):
    return {figure.name: figure for figure in found.figures}


def rows(table, *keys):
    return {tuple(row[key] for key in keys): row for row in table.frame.to_dict("records")}


def drawn(figure):
    return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def stairs(folder, variant, seed, heights, **more):
    """A cell with a report every 10 s; the test score is 0.1 below validation."""
    scores = [(height, height - 0.1) for height in heights]
    FakeCell(scores, seconds=10, variant=variant, seed=seed, **more).write(folder)


def three(folder, **more):
    """Three seeds of off and on: on has the final score one report sooner."""
    for seed, top in enumerate((0.7, 0.8, 0.9)):
        stairs(folder, "off", seed, [0.5, 0.6, top, top], **more)
        stairs(folder, "on", seed, [0.5, top, top, top], **more)


def test_curves_are_the_median_and_quartiles_of_the_incumbents_at_their_time(tmp_path):
    three(tmp_path)
    figure = figures(made(tmp_path))["anytime_digits-pasha"]
    panel = figure.data["panels"]["wallclock"]
    assert panel["grid"][[24, 25, 50]] == pytest.approx([9.6, 10, 20])
    low, middle, high = panel["quartiles"]["validation"]["off"]
    assert math.isnan(middle[24])
    assert middle[[25, 49, 50, 74, 75, 100]] == pytest.approx([0.5, 0.5, 0.6, 0.6, 0.8, 0.8])
    assert (low[100], high[100]) == pytest.approx((0.75, 0.85))
    assert panel["quartiles"]["test"]["on"][1][50] == pytest.approx(0.7)
    epochs = figure.data["panels"]["epochs"]
    assert epochs["grid"][-1] == 4
    assert epochs["quartiles"]["validation"]["on"][1][50] == pytest.approx(0.8)  # after two epochs
    hours = figure.data["panels"]["gpu_hours"]
    assert hours["grid"][-1] == pytest.approx(40 / 3600)


def test_the_curves_are_drawn_by_time_and_score(tmp_path):
    three(tmp_path)
    figure = figures(made(tmp_path))["anytime_digits-pasha"]
    drawing = drawn(figure)
    assert len(drawing.axes) == 6
    for axis, along in zip(drawing.axes, ["wallclock", "gpu_hours", "epochs"] * 2, strict=True):
        kind = "validation" if axis in drawing.axes[:3] else "test"
        panel = figure.data["panels"][along]
        np.testing.assert_array_equal(axis.lines[0].get_xdata(), panel["grid"])
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), panel["quartiles"][kind]["off"][1])
    assert "off 3, on 3" in figure.caption


def test_where_a_cell_has_ended_the_line_is_dashed(tmp_path):
    stairs(tmp_path, "off", 0, [0.5, 0.6])
    stairs(tmp_path, "off", 1, [0.5, 0.6, 0.7, 0.8])
    figure = figures(made(tmp_path))["anytime_digits-pasha"]
    solid, dashed = drawn(figure).axes[0].lines
    assert np.nanmax(solid.get_xdata()[~np.isnan(solid.get_ydata())]) == 20
    assert dashed.get_xdata()[~np.isnan(dashed.get_ydata())].min() == 20
    assert dashed.get_ydata()[-1] == pytest.approx((0.6 + 0.8) / 2)  # the ended cell keeps its last score


def test_a_cell_without_a_score_so_far_counts_as_worst(tmp_path):
    stairs(tmp_path, "off", 0, [math.nan, 0.6, 0.6])
    stairs(tmp_path, "off", 1, [0.4, 0.8, 0.8])
    stairs(tmp_path, "off", 2, [0.5, 0.7, 0.7])
    panel = figures(made(tmp_path))["anytime_digits-pasha"].data["panels"]["epochs"]
    low, middle, high = panel["quartiles"]["validation"]["off"][:, 34]  # right after the first epoch
    assert (middle, high) == pytest.approx((0.4, 0.45))
    assert math.isnan(low)


def test_areas_by_hand(tmp_path):
    three(tmp_path)
    for seed in range(3, 7):  # as the first: six pairs have an interval
        stairs(tmp_path, "off", seed, [0.5, 0.6, 0.7, 0.7])
        stairs(tmp_path, "on", seed, [0.5, 0.7, 0.7, 0.7])
    stairs(tmp_path, "on", 7, [0.5, 0.7], close=None)
    found = rows(tables(made(tmp_path))["auc_all"], "variant")
    off, on = found["off",], found["on",]
    assert (off["start"], off["horizon"], off["n"], on["n"]) == (10, 40, 7, 8)
    assert off["median"] == pytest.approx((0.4 + 0.5 + 0.6) / 3)
    assert on["median"] == pytest.approx((0.4 + 0.6 + 0.6) / 3)
    assert (on["pairs"], on["gain"]) == (7, pytest.approx(0.1 / 3))  # five of 0.1 / 3, then 0.2 / 3 and 0.3 / 3
    assert on["CI low"] == pytest.approx(0.1 / 3)
    assert on["CI low"] <= on["CI high"] <= 0.3 / 3
    assert on["p"] == pytest.approx(2 / 2**7)
    assert on["Holm p"] == on["p"]
    assert math.isnan(off["gain"])


def test_gains_are_positive_where_lower_is_better_too(tmp_path):
    for seed in range(2):
        for variant, scores in (("off", [0.5, 0.4, 0.2]), ("on", [0.5, 0.2, 0.2])):
            pairs = [(score, score) for score in scores]
            OtherCell(pairs, seconds=10, variant=variant, seed=seed, entries={"mode": "min"}).write(tmp_path)
    found = made(tmp_path)
    assert rows(tables(found)["auc_all"], "variant")["on",]["gain"] == pytest.approx(0.1)
    curves = figures(found)["anytime-iqm-test-wallclock_all"].data["panels"]["pasha (1 task, 4 cells)"]
    assert curves["on"][1][-1] == 1
    assert rows(tables(found)["improvement_all"], "variant")["on",]["P"] == 0.5


def test_final_scores_by_hand(tmp_path):
    for seed, top in enumerate((0.6, 0.7, 0.8, 0.9)):
        stairs(tmp_path, "off", seed, [0.5, top])
        stairs(tmp_path, "on", seed, [0.5, 0.9 * top])
    stairs(tmp_path, "on", 4, [0.5], close=None)
    table = tables(made(tmp_path))["final-scores_all"]
    found = rows(table, "score", "variant")
    off, on = found["validation", "off"], found["validation", "on"]
    assert (off["n"], off["median"], off["q25"], off["q75"]) == (4, *map(pytest.approx, (0.75, 0.675, 0.825)))
    assert off["IQM"] == pytest.approx((0.7 + 0.8) / 2)
    assert off["CI low"] < off["IQM"] < off["CI high"]
    assert (on["n"], on["unfinished"], on["pairs"], on["drop"]) == (5, 1, 4, pytest.approx(0.1))
    assert found["test", "off"]["median"] == pytest.approx(0.65)
    assert table.text()["drop"].tolist() == ["-", "10.00%", "-", "11.55%"]  # test: 0.1 top / (top - 0.1)


def two_tasks(folder):
    """Two tasks with scores of other ranges, two seeds each; on has the best of each, off the worst."""
    for seed in range(2):
        stairs(folder, "off", seed, [0.5, 0.6])
        stairs(folder, "on", seed, [0.5, 0.9])
        stairs(folder, "off", seed, [0.1, 0.2], task="wine")
        stairs(folder, "on", seed, [0.1, 0.3 + 0.1 * seed], task="wine")


def test_scores_over_tasks_are_put_between_the_worst_and_the_best_final_score_of_each(tmp_path):
    two_tasks(tmp_path)
    found = made(tmp_path)
    ((title, curves),) = figures(found)["anytime-iqm-test-wallclock_all"].data["panels"].items()
    assert title == "pasha (2 tasks, 8 cells)"
    share, iqm, low, high = curves["on"]
    assert (share[0], share[-1]) == (0, 1)
    assert (iqm[0], iqm[20], iqm[39]) == (0, 0, 0)  # no score before half of the time, the worst or less up to the end
    assert iqm[-1] == pytest.approx(1)  # of 1, 1, 0.5 and 1 the middle two
    assert (low[-1], high[-1]) == (pytest.approx(0.75), 1)
    assert curves["off"][1][-1] == 0
    (profile,) = figures(found)["profiles_all"].data["panels"].values()
    threshold, above, _, _ = profile["on"]
    assert (above[threshold < 0.5] == 1).all()
    assert (above[(threshold > 0.5) & (threshold < 1)] == 0.75).all()
    assert (above[-1], profile["off"][1].max()) == (0, 0)
    for name in ("anytime-iqm-test-wallclock_all", "profiles_all"):
        line = drawn(figures(found)[name]).axes[0].lines[1]  # off, then on
        (panel,) = figures(found)[name].data["panels"].values()
        np.testing.assert_array_equal(line.get_ydata(), panel["on"][1])


def test_a_variant_that_is_not_in_all_tasks_is_left_out_over_tasks_and_named(tmp_path):
    two_tasks(tmp_path)
    stairs(tmp_path, "random", 0, [0.5, 0.6])
    found = made(tmp_path)
    (panel,) = figures(found)["anytime-iqm-test-wallclock_all"].data["panels"].values()
    assert list(panel) == ["off", "on"]
    assert "Over tasks, pasha: random is left out: not in wine / pasha" in found.notes


def test_a_task_that_has_just_begun_is_left_out_over_tasks_and_named(tmp_path):
    three(tmp_path)
    stairs(tmp_path, "off", 0, [0.5], task="wine", close=None)
    found = made(tmp_path)
    assert list(figures(found)["profiles_all"].data["panels"]) == ["pasha (1 task, 6 cells)"]
    assert "Over tasks, pasha: wine / pasha is left out: without on" in found.notes


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_what_is_complete_has_no_gap_and_what_goes_is_named(table):
    counts = pd.DataFrame(table, index=[f"row {i}" for i in range(len(table))], columns=list("abc"))
    kept, columns, gone = complete(counts)
    assert (counts.loc[kept, columns] > 0).to_numpy().all()
    assert len(gone) == len(counts) - len(kept) + 3 - len(columns)


# ---- ranks and improvement


def many_tasks(folder, schedulers=("pasha",), tasks=4, variants=("off", "on", "random")):
    """Cells of two seeds; in every task on is best, then random, then off."""
    for task in range(tasks):
        for scheduler in schedulers:
            for variant in variants:
                gain = {"off": 0.0, "random": 0.05}.get(variant, 0.1 + 0.01 * len(variant))
                for seed in range(2):
                    heights = [0.5, 0.6 + 0.01 * task + gain + 0.001 * seed]
                    stairs(folder, variant, seed, heights, task=f"task{task}", scheduler=scheduler)


def test_ranks_over_tasks_by_hand(tmp_path):
    many_tasks(tmp_path)
    found = made(tmp_path)
    table = tables(found)["ranks_all"]
    assert list(zip(table.frame["method"], table.frame["average rank"], strict=True)) == [
        ("pasha on", 1), ("pasha random", 2), ("pasha off", 3)
    ]  # fmt: skip
    assert set(table.frame["blocks"]) == {4}
    p = scipy.stats.friedmanchisquare([3] * 4, [1] * 4, [2] * 4).pvalue
    assert f"{p:.3f}" in table.caption
    assert "blocks are tasks" in table.caption
    against = rows(table, "method")
    assert against["pasha on",]["p against off"] < against["pasha random",]["p against off"] < 1
    labels = [text.get_text() for text in drawn(figures(found)["critical-difference_all"]).axes[0].texts]
    assert labels == ["pasha on (1.00)", "pasha random (2.00)", "(3.00) pasha off"]


def test_of_one_task_seeds_are_the_blocks_and_the_caption_says_so(tmp_path):
    three(tmp_path)
    stairs(tmp_path, "on", 3, [0.5, 0.9])  # no seed of off
    found = made(tmp_path)
    table = tables(found)["ranks_all"]
    assert table.frame["average rank"].tolist() == [1.5, 1.5]
    assert set(table.frame["blocks"]) == {3}
    assert "a block is one seed" in table.caption
    assert "about seeds of digits only" in table.caption


def test_of_many_methods_the_variants_are_compared_over_conditions(tmp_path):
    variants = ("off", "on", "random", "zero", "sign")
    many_tasks(tmp_path, ("pasha", "asha", "hyperband"), 2, variants)
    study = Study(load_results(tmp_path / "default"))
    found = blocks(study.conditions)
    assert sorted(found.scores.columns) == sorted(variants)
    assert len(found.scores) == 6
    assert "conditions of one task are not independent" in found.words
    assert found.scores.loc["task1 / asha", "off"] == pytest.approx(0.51 + 0.0005)  # median of two seeds


def test_unfinished_cells_are_no_part_of_ranks(tmp_path):
    many_tasks(tmp_path)
    stairs(tmp_path, "off", 2, [0.5, 2.0], task="task0", close=None)
    study = Study(load_results(tmp_path / "default"))
    assert blocks(study.conditions).scores.loc["task0", "pasha off"] == pytest.approx(0.5 + 0.0005)


def test_the_probability_of_improvement_by_hand(tmp_path):
    for seed, (off, on) in enumerate([(0.5, 0.7), (0.6, 0.6), (0.8, 0.9)]):
        stairs(tmp_path, "off", seed, [off])
        stairs(tmp_path, "on", seed, [on])
        stairs(tmp_path, "off", seed, [0.5], task="wine")
        stairs(tmp_path, "on", seed, [0.6], task="wine")
    found = made(tmp_path)
    row = rows(tables(found)["improvement_all"], "scheduler", "variant")["pasha", "on"]
    digits = (2 + 1.5 + 3) / 9  # of 0.7, 0.6, 0.9 against each of 0.5, 0.6, 0.8
    assert (row["tasks"], row["cells"], row["P"]) == (2, 6, pytest.approx((digits + 1) / 2))
    assert row["CI low"] < row["P"] <= row["CI high"]
    assert (row["pairs"], row["paired P"]) == (6, pytest.approx(5.5 / 6))
    axis = drawn(figures(found)["improvement_all"]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["on (2, 6)"]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"] == [pytest.approx(row["P"])]


# ---- every kind of study


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
@warnings_fail
def test_every_kind_of_study_has_sound_output_or_a_sentence(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    for table in found.tables:
        assert len(table.frame)
        assert markdown(table)
        assert latex(table)
    with pyplot.rc_context(STYLE):
        for figure in found.figures:
            assert isinstance(drawn(figure), matplotlib.figure.Figure)
            assert figure.caption
    names = [figure.name for figure in found.figures]
    assert len(names) == len(set(names))
    assert found.figures or found.notes


@warnings_fail
def test_figures_can_be_saved_without_a_warning(tmp_path):
    for figure in made(write_study(tmp_path, ("off", "zero", "on"), steps=40).parent).figures:
        with pyplot.rc_context(STYLE):
            for ending in ("pdf", "png"):
                drawn(figure).savefig(io.BytesIO(), format=ending)


def found(name, tmp_path):
    return section(Study(load_results(write(name, tmp_path))))


def test_files_are_named_after_topic_and_condition(tmp_path):
    three(tmp_path)
    section = made(tmp_path)
    assert set(figures(section)) == {
        "anytime_digits-pasha",
        *(
            f"anytime-iqm-{kind}-{axis}_all"
            for kind in ("test", "validation")
            for axis in ("wallclock", "gpu-hours", "epochs")
        ),
        "profiles_all", "critical-difference_all", "improvement_all"
    }  # fmt: skip
    assert set(tables(section)) == {"auc_all", "final-scores_all", "ranks_all", "improvement_all"}


def test_a_running_sweep_counts_cells_as_they_stand_and_names_those_without_a_score(tmp_path):
    section = found("running", tmp_path)
    assert "off 3, on 2 (1 unfinished)" in figures(section)["anytime_digits-pasha"].caption
    assert "digits / pasha: cells without a test score are left out: on 1." in section.notes
    assert rows(tables(section)["auc_all"], "variant")["on",]["pairs"] == 1
    assert any("no critical-difference diagram" in note for note in section.notes)


@pytest.mark.parametrize("name", ["nothing yet", "no scores"])
def test_without_any_score_there_is_a_sentence(name, tmp_path):
    section = found(name, tmp_path)
    assert (section.tables, section.figures) == ([], [])
    assert section.notes == ["No cell has a test score yet, hence no anytime performance."]


@pytest.mark.parametrize("name", ["one variant", "no off"])
def test_without_off_or_a_variant_there_is_no_improvement(name, tmp_path):
    section = found(name, tmp_path)
    assert "improvement_all" not in tables(section)
    assert any("no probability of improvement" in note for note in section.notes)


def test_equal_scores_are_no_difference(tmp_path):
    section = found("equal scores", tmp_path)
    row = rows(tables(section)["improvement_all"], "variant")["on",]
    assert (row["P"], row["CI low"], row["CI high"]) == (0.5, 0.5, 0.5)
    assert tables(section)["ranks_all"].frame["average rank"].tolist() == [1.5, 1.5]
    assert rows(tables(section)["auc_all"], "variant")["on",]["p"] == 1


def test_cells_of_two_settings_are_tasks_of_their_own(tmp_path):
    section = found("two settings", tmp_path)
    conditions = set(tables(section)["auc_all"].frame["condition"])
    assert conditions == {"digits / asha", "digits / pasha, n_workers=2", "digits / pasha, n_workers=4"}


def test_a_slow_running_cell_does_not_cost_the_others_their_areas(tmp_path):
    for seed in range(2):
        FakeCell([(0.5, 0.5)] * 3, seed=seed, seconds=2.0).write(tmp_path)
    FakeCell([(0.5, 0.5)], seed=2, seconds=100.0, close=None).write(tmp_path)  # its first score is after the horizon
    part = section(Study(load_results(tmp_path / "default")))
    row = next(table for table in part.tables if table.name == "auc_all").frame.iloc[0]
    assert (row["n"], row["start"], row["median"]) == (2, 2.0, 0.5)
