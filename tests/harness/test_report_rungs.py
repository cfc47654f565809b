import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from scipy.stats import spearmanr

from harness.report import load_results
from harness.report.document import STYLE, latex, markdown
from harness.report.hyperparameters import configurations_of
from harness.report.rungs import (
    BENEFIT_BINS,
    DECILES,
    FEWEST,
    Scores,
    levels,
    pairs_of,
    section,
    within_cells,
)
from harness.report.study import Study
from harness.schedulers.rungs import rung_levels
from harness.seeds import rng
from tests.harness.degenerate_studies import STUDIES, warnings_fail, write
from tests.harness.fake_results import FakeCell

SPACE = {"lr": {"lower": 0.0, "upper": 1.0}, "mu": {"lower": 0.0, "upper": 0.5}, "kind": {"choices": ["a", "b"]}}


def x(lr, mu=0.25, kind="a"):
    return {"lr": lr, "mu": mu, "kind": kind}


def cell(folder, variant="off", seed=0, trials=(), **more):
    """trials: (x, validation scores by epoch, gradient) of each."""
    configs, curves, gradients = zip(*trials, strict=True)
    moved = {"warm_seconds": 0.1, "x_prime": configs, "gradients": gradients} if variant != "off" else {}
    arguments = {"x": configs, "space": SPACE, "epochs_per_trial": [len(curve) for curve in curves], **moved, **more}
    scores = [(score, score) for curve in curves for score in curve]
    return FakeCell(scores, variant=variant, seed=seed, **arguments).write(folder)


def study(folder):
    return Study(load_results(folder / "default"))


def tables(found):
    return {table.name.split("_")[0]: table.frame for table in found.tables}


def figures(found):
    return {figure.name.split("_")[0]: figure for figure in found.figures}


def drawn(figure):
    with pyplot.rc_context(STYLE):
        return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def pairs(folder, variant="on", condition=0):
    loaded = study(folder)
    chosen = loaded.conditions[condition]
    return pairs_of(chosen, configurations_of(loaded, chosen), Scores.of(loaded), variant)


# ---- survival


def flat(*lengths):
    return [(x(0.1 * i), [0.5] * length, None) for i, length in enumerate(lengths)]


def test_survival_by_hand(tmp_path):
    keys = {"task.max_epochs": 9}
    cell(tmp_path, seed=0, trials=flat(1, 1, 3, 9), keys=keys)
    cell(tmp_path, seed=1, trials=flat(1, 2, 3, 3, 8), keys=keys)
    cell(tmp_path, "on", trials=flat(9, 9), keys=keys)
    found = section(study(tmp_path))
    table = tables(found)["rungs"].set_index(["variant", "epochs"])
    off = table.loc["off"]
    assert off.index.tolist() == [1, 3, 9]
    assert off["number"].tolist() == [4.5, 2.5, 0.5]  # 4 and 5, 2 and 3, 1 and 0
    assert off["share"].tolist() == pytest.approx([1, (2 / 4 + 3 / 5) / 2, (1 / 4 + 0) / 2])
    assert (off["CI low"].iloc[2], off["CI high"].iloc[2]) == (0, 0.25)  # half of the resamples have one cell twice
    assert table.loc["on", "share"].tolist() == [1, 1, 1]
    left, right = drawn(figures(found)["rungs"]).axes
    assert left.lines[0].get_ydata() == pytest.approx([100, 55, 12.5])
    assert right.lines[0].get_ydata() == pytest.approx([4.5, 2.5, 0.5])


def test_levels_are_those_of_the_schedulers(tmp_path):
    cell(tmp_path, trials=flat(1))
    (condition,) = study(tmp_path).conditions
    for grace_period, eta, max_t in itertools.product((1, 2, 5), (2, 2.5, 3, 4), (5, 9, 10, 27, 81, 164)):
        config = {"scheduler": {"eta": eta, "grace_period": grace_period}, "task": {"max_epochs": max_t}}
        at, has_rungs = levels(dataclasses.replace(condition, config=config))
        assert at == [*rung_levels(grace_period, eta, max_t), max_t]
        assert has_rungs


@pytest.mark.parametrize("eta", [None, 0.1, 1, "none"])
def test_a_scheduler_without_rungs_is_read_on_the_common_ruler(eta, tmp_path):
    cell(tmp_path, trials=flat(1, 30), keys={"scheduler.eta": eta, "task.max_epochs": 30})
    found = section(study(tmp_path))
    assert tables(found)["rungs"]["epochs"].tolist() == [1, 3, 9, 27, 30]
    assert "its scheduler has none" in found.figures[0].caption


def test_without_a_maximum_the_levels_end_at_what_was_reached(tmp_path):
    cell(tmp_path, trials=flat(1, 10))
    found = section(study(tmp_path))
    assert tables(found)["rungs"]["epochs"].tolist() == [1, 3, 9]
    assert "sets no maximum" in found.tables[0].caption


# ---- pairs


def test_pairs_and_their_benefit_by_hand(tmp_path):
    off = [(x(0.1), [0.5, 0.6, 0.7], None), (x(0.2), [0.4], None), (x(0.3), [0.3, 0.2], None), (x(0.9), [0.1], None)]
    on = [
        (x(0.3), [0.4, 0.1], {"lr": 3.0, "mu": 8.0}),  # another place in the order of trials
        (x(0.1), [0.4, 0.9], {"lr": -1.0, "mu": 0.0}),
        (x(0.2), [0.4, 0.4], {"lr": 0.5}),
        (x(0.2, kind="b"), [0.9], {"lr": 0.5}),  # not the same x
        (x(0.7), [0.9], {"lr": 0.5}),
    ]
    cell(tmp_path, trials=off)
    cell(tmp_path, "on", trials=on)
    found = pairs(tmp_path)
    order = np.argsort(found.benefit)
    assert found.started == 5
    assert found.epoch[order].tolist() == [2, 1, 2]  # the largest that both reported
    assert found.benefit[order] == pytest.approx([0.1 - 0.2, 0.0, 0.9 - 0.6])
    # in unit coordinates: lr has width 1, mu 0.5
    assert found.magnitude[order] == pytest.approx([5, 0.5, 1])
    row = tables(section(study(tmp_path)))["gradient-benefit"].iloc[0]
    assert (row["pairs"], row["cells"], row["trials paired"]) == (3, 1, 0.6)
    assert row["mean benefit"] == pytest.approx(0.2 / 3)
    assert (row["better"], row["equal"]) == pytest.approx((1 / 3, 1 / 3))


def test_a_lower_score_is_a_benefit_where_lower_is_better(tmp_path):
    keys = {"task.mode": "min"}
    cell(tmp_path, trials=[(x(0.1), [0.5], None)], keys=keys)
    cell(tmp_path, "on", trials=[(x(0.1), [0.2], {"lr": 1.0})], keys=keys)
    assert pairs(tmp_path).benefit == pytest.approx([0.3])


def test_pairs_are_of_one_seed_and_one_setting(tmp_path):
    cell(tmp_path, seed=0, trials=[(x(0.1), [0.5], None)])
    cell(tmp_path, "on", seed=1, trials=[(x(0.1), [0.2], {"lr": 1.0})])
    cell(tmp_path, "on", seed=0, scheduler="asha", trials=[(x(0.1), [0.2], {"lr": 1.0})])
    assert len(pairs(tmp_path, condition=1).benefit) == 0
    notes = section(study(tmp_path)).notes
    assert any("digits / asha: there are no pairs of x and x', for want of off cells" in note for note in notes)
    assert any("digits / pasha: no trial of on has the x of a trial of off" in note for note in notes)


def test_the_first_trial_with_a_report_counts_where_x_repeats(tmp_path):
    cell(tmp_path, trials=[(x(0.1), [], None), (x(0.1), [0.5], None), (x(0.1), [0.9], None)])
    cell(tmp_path, "on", trials=[(x(0.1), [0.6], {"lr": 1.0}), (x(0.1), [0.1], {"lr": 1.0})])
    assert pairs(tmp_path).benefit == pytest.approx([0.1])


def test_pairs_without_a_score_are_left_out(tmp_path):
    cell(tmp_path, trials=[(x(0.1), [math.nan], None), (x(0.2), [0.5], None)])
    cell(tmp_path, "on", trials=[(x(0.1), [0.6], {"lr": 1.0}), (x(0.2), [0.7], None)])
    found = pairs(tmp_path)
    assert found.benefit == pytest.approx([0.2])
    assert np.isnan(found.magnitude).all()


def test_an_epoch_that_is_missing_is_looked_up_as_missing(tmp_path):
    cell(tmp_path, trials=[(x(0.1), [0.5, 0.6], None)])
    scores = Scores.of(study(tmp_path))
    keys = np.array([0, 0, 0, 1])
    assert scores.last_epoch(keys).tolist() == [2, 2, 2, 0]
    np.testing.assert_array_equal(scores.at(keys, np.array([1, 2, 3, 1])), [0.5, 0.6, math.nan, math.nan])


def many(seed, gain):
    """30 trials of which x' is better by ``gain`` times the length of the gradient."""
    gen = rng(seed, "test")
    lrs, lengths = gen.random(30), gen.random(30)
    off = [(x(float(lr)), [0.5] * (1 + i % 3), None) for i, lr in enumerate(lrs)]
    on = [(x(float(lr)), [0.5 + gain * size] * 3, {"lr": size}) for lr, size in zip(lrs, lengths.tolist(), strict=True)]
    return off, on


def test_a_benefit_that_grows_with_the_gradient_is_a_correlation_of_one(tmp_path):
    for seed in range(4):
        off, on = many(seed, 0.1)
        cell(tmp_path, seed=seed, trials=off, keys={"task.max_epochs": 3})
        cell(tmp_path, "on", seed, trials=on, keys={"task.max_epochs": 3})
    found = section(study(tmp_path))
    table = tables(found)["gradient-benefit"]
    assert table["compared at epoch"].tolist() == ["all", "1-2", "3"]
    assert table["pairs"].tolist() == [120, 80, 40]
    assert table["Spearman"].tolist() == pytest.approx([1, 1, 1])
    assert (table["better"] == 1).all()
    figure = figures(found)["gradient-benefit"]
    (panel,) = figure.data["panels"]
    assert panel["shares"].shape == (BENEFIT_BINS, DECILES)
    assert panel["shares"].sum(axis=0) == pytest.approx(np.ones(DECILES))
    assert (np.diff(panel["means"]) > 0).all()
    heat = drawn(figure).axes[0].collections[0].get_array()
    np.testing.assert_array_equal(np.asarray(heat).reshape(BENEFIT_BINS, DECILES), panel["shares"])


def test_a_benefit_below_the_bins_is_in_the_lowest_one(tmp_path):
    off, on = many(0, 0.1)
    on[0] = (on[0][0], [-5.0] * 3, {"lr": 0.5})
    cell(tmp_path, trials=off)
    cell(tmp_path, "on", trials=on)
    (panel,) = figures(section(study(tmp_path)))["gradient-benefit"].data["panels"]
    assert panel["shares"][0].sum() > 0
    assert panel["shares"].sum(axis=0) == pytest.approx(np.ones(DECILES))


@given(st.integers(0, 100), st.integers(1, 5))
def test_the_correlation_is_the_mean_of_those_of_the_cells(seed, count):
    gen = rng(seed, "data")
    cells = gen.integers(0, count, 60)
    first, second = np.round(gen.normal(size=(2, 60)), 1)  # with ties
    first[gen.random(60) < 0.1] = math.nan
    expected = []
    for place in range(count):
        chosen = (cells == place) & ~np.isnan(first)
        if chosen.sum() >= FEWEST and len(set(first[chosen])) > 1 and len(set(second[chosen])) > 1:
            expected.append(spearmanr(first[chosen], second[chosen]).statistic)
    found = within_cells(first, second, cells, rng(0, "draws"))
    assert found.n == len(expected)
    assert found.value == pytest.approx(np.mean(expected))


def test_a_constant_benefit_has_no_correlation():
    found = within_cells(np.arange(20.0), np.zeros(20), np.zeros(20), rng(0, "draws"))
    assert (found.n, math.isnan(found.value)) == (0, True)


@warnings_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_odd_studies_give_tables_figures_or_a_reason(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    assert found.tables or found.notes
    for table in found.tables:
        assert len(table.frame)
        latex(table), markdown(table)
    for figure in found.figures:
        drawn(figure).savefig(tmp_path / f"{figure.name}.png")
