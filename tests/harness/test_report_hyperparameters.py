import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib import pyplot
from matplotlib.quiver import Quiver

from harness.report import load_results
from harness.report.divergence import KL_ESTIMATOR, kl_divergence
from harness.report.document import STYLE, Section, latex, markdown
from harness.report.hyperparameters import (
    ARROWS,
    QUANTILES,
    cluster_mean,
    configurations_of,
    gather,
    incumbents,
    section,
)
from harness.report.study import Study
from harness.seeds import rng
from tests.harness.degenerate_studies import STUDIES, warnings_fail, write
from tests.harness.fake_results import FakeCell

SPACE = {
    "lr": {"lower": 0.001, "upper": 1.0, "log": True},
    "momentum": {"lower": 0.0, "upper": 0.8},
    "depth": {"lower": 1, "upper": 4, "integer": True},
    "kind": {"choices": ["a", "b"]},
}


def x(lr, momentum, depth=2, kind="a"):
    return {"lr": lr, "momentum": momentum, "depth": depth, "kind": kind}


X = [x(0.001, 0.2), x(0.1, 0.4, 3), x(0.01, 0.6, kind="b"), x(0.1, 0.0)]
X_PRIME = [x(0.01, 0.2), x(0.01, 0.8, 3), x(0.1, 0.4, kind="b"), x(1.0, 0.0)]
SCORES = [(0.5, 0.5), (0.6, 0.6), (0.9, 0.9), (0.7, 0.7)]


def cell(folder, variant="off", seed=0, scores=SCORES, **more):
    """Four trials of one epoch; those of another variant than off are moved from X to X_PRIME."""
    moved = {} if variant == "off" else {"warm_seconds": 0.1, "x_prime": X_PRIME}
    arguments = {"epochs_per_trial": 1, "x": X, "space": SPACE, **moved, **more}
    return FakeCell(scores, variant=variant, seed=seed, **arguments).write(folder)


def study(folder):
    return Study(load_results(folder / "default"))


def rows(found):
    (table,) = found.tables
    return {(row["coordinate"], row["variant"]): row for row in table.frame.to_dict("records")}


def figures(found):
    return {figure.name.split("_")[0]: figure for figure in found.figures}


def drawn(figure):
    with pyplot.rc_context(STYLE):
        return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def test_shifts_by_hand(tmp_path):
    cell(tmp_path)
    cell(tmp_path, "on")
    found = rows(section(study(tmp_path)))
    lr, momentum = found["lr", "on"], found["momentum", "on"]
    # unit lr: 0, 2/3, 1/3, 2/3 -> 1/3, 1/3, 2/3, 1; unit momentum: 1/4, 1/2, 3/4, 0 -> 1/4, 1, 1/2, 0
    assert lr["mean shift"] == pytest.approx((1 / 3 - 1 / 3 + 1 / 3 + 1 / 3) / 4)
    assert lr["mean |shift|"] == pytest.approx(1 / 3)
    assert (lr["up"], lr["down"], lr["not moved"], lr["clipped"]) == (0.75, 0.25, 0, 0.25)
    assert momentum["mean shift"] == pytest.approx((0.5 - 0.25) / 4)
    assert (momentum["up"], momentum["down"], momentum["not moved"]) == (0.25, 0.25, 0.5)
    assert momentum["clipped"] == 0.25  # the last one is at its bound, too, but did not move there
    assert (lr["warm starts"], lr["cells"]) == (4, 1)
    assert math.isnan(lr["CI low"])  # of one cell


def test_integers_and_categoricals_have_a_distribution_and_no_shift(tmp_path):
    cell(tmp_path)
    cell(tmp_path, "on", x=[x(0.1, 0.1, 4, "b")] * 4, x_prime=[x(0.1, 0.1, 4, "b")] * 4)
    found = section(study(tmp_path))
    depth, kind = rows(found)["depth", "on"], rows(found)["kind", "on"]
    assert math.isnan(depth["mean shift"])
    assert depth["KL all"] == kl_divergence([4] * 4, [2, 3, 2, 2], categories=[1, 2, 3, 4])
    assert kind["KL all"] == kl_divergence([1] * 4, [0, 0, 1, 0], categories=[0, 1])
    assert any("depth, kind (integer or categorical) never move" in note for note in found.notes)


def test_divergences_are_of_what_was_trained(tmp_path):
    for seed in range(3):
        cell(tmp_path, "off", seed)
        cell(tmp_path, "on", seed)
    found = section(study(tmp_path))
    lr = rows(found)["lr", "on"]
    p, q = np.tile([1 / 3, 1 / 3, 2 / 3, 1], 3), np.tile([0, 2 / 3, 1 / 3, 2 / 3], 3)
    assert lr["KL all"] == pytest.approx(kl_divergence(p, q))
    assert lr["KL incumbents"] == pytest.approx(kl_divergence([2 / 3] * 3, [1 / 3] * 3))  # the third trial is the best
    assert lr["KL all, null 95 %"] > 0
    assert lr["incumbents"] == 3
    assert KL_ESTIMATOR in found.tables[0].caption


def test_a_failed_trial_without_warm_start_is_no_shift(tmp_path):
    cell(tmp_path)
    paths = cell(tmp_path, "on", close=None)
    with paths.events.open("a") as events:
        events.write('{"e": "start", "t": 9.0, "trial": 4, "config": {"lr": 0.5, "momentum": 0.1, "depth": 1}}\n')
        events.write('{"e": "error", "t": 9.5, "trial": 4}\n')
    found = rows(section(study(tmp_path)))
    assert found["lr", "on"]["warm starts"] == 4
    assert found["lr", "on"]["not moved"] == 0


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 0)])
def test_the_incumbent_is_best_on_validation(mode, best, tmp_path):
    cell(tmp_path, keys={"task.mode": mode})
    assert incumbents(study(tmp_path))["trial"].tolist() == [best]


def test_of_equal_incumbents_the_first_report_counts(tmp_path):
    cell(tmp_path, scores=[(0.5, 0.5), (0.9, 0.1), (math.nan, 1.0), (0.9, 0.9)])
    assert incumbents(study(tmp_path))["trial"].tolist() == [1]


def test_arrays_of_a_condition_are_aligned_with_its_trials(tmp_path):
    for seed in range(3):  # cells of two settings alternate in the folder
        cell(tmp_path, "on", seed)
        cell(tmp_path, "on", seed, scheduler="asha", x=X[::-1], x_prime=X_PRIME[::-1], scores=SCORES[:3])
    loaded = study(tmp_path)
    for condition, order in zip(loaded.conditions, (-1, 1), strict=True):
        found = configurations_of(loaded, condition)
        trials = found.frame["trial"].to_numpy()
        assert found.names == list(SPACE)
        assert found.x[0].tolist() == [X[::order][trial]["lr"] for trial in trials]
        assert found.x_prime[1].tolist() == [X_PRIME[::order][trial]["momentum"] for trial in trials]
        assert found.trials == len(found.frame) == {1: 12, -1: 9}[order]
        assert set(found.seed) == {0, 1, 2}


def test_distributions_hold_x_and_x_prime(tmp_path):
    cell(tmp_path)
    cell(tmp_path, "on")
    canvas = drawn(figures(section(study(tmp_path)))["hyperparameters"])
    columns = [axis.get_title().split("\n")[0] for axis in canvas.axes]
    lr = canvas.axes[columns.index("lr")]
    _, _, before, after = lr.lines  # those of off, those of on
    assert (before.get_linestyle(), after.get_linestyle()) == (":", "-")
    assert before.get_xdata()[1:-1] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert after.get_xdata()[1:-1] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert after.get_ydata()[1:-1] == pytest.approx([0.25, 0.5, 0.75, 1])
    depth = canvas.axes[columns.index("depth")]
    assert depth.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert depth.lines[0].get_ydata().tolist() == [0, 0.75, 0.25, 0]
    kind = canvas.axes[columns.index("kind") + len(SPACE)]  # the panel of incumbents below it has the tick labels
    assert [tick.get_text() for tick in kind.get_xticklabels()] == ["a", "b"]


def test_trajectories_are_arrows_in_the_two_coordinates_that_move_most(tmp_path):
    space = {"wd": {"lower": 0.0, "upper": 1.0}, **SPACE}
    still = [{"wd": 0.5, **config} for config in X]
    moved = [{"wd": 0.5001, **config} for config in X_PRIME]
    cell(tmp_path, x=still, space=space)
    cell(tmp_path, "on", x=still, x_prime=moved, space=space)
    cell(tmp_path, "zero", x=still, x_prime=still, space=space)
    figure = figures(section(study(tmp_path)))["trajectories"]
    canvas = drawn(figure)
    assert canvas.get_supxlabel().startswith("lr")
    assert canvas.get_supylabel().startswith("momentum")
    (axis,) = canvas.axes  # zero moves nothing
    (quiver,) = (artist for artist in axis.collections if isinstance(artist, Quiver))
    assert np.asarray(quiver.X).tolist() == pytest.approx([0, 2 / 3, 1 / 3, 2 / 3])
    assert np.asarray(quiver.U).tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3, 1 / 3])
    assert np.asarray(quiver.V).tolist() == pytest.approx([0, 0.5, -0.25, 0])
    assert "Nothing moved with off, zero" in figure.caption


def test_many_trajectories_are_a_sample_that_is_the_same_every_time(tmp_path):
    many = 3 * ARROWS
    gen = rng(0, "test")
    configs = [x(float(lr), float(mu)) for lr, mu in gen.uniform(0.01, 0.7, (many, 2))]
    moved = [config | {"lr": config["lr"] * 1.1} for config in configs]
    cell(tmp_path, "on", x=configs, x_prime=moved, scores=[(0.5, 0.5)] * many)
    first, second = (figures(section(study(tmp_path)))["trajectories"].data["panels"][0] for _ in range(2))
    assert first["x"].shape == (2, ARROWS)
    assert first["n"] == many
    np.testing.assert_array_equal(first["x"], second["x"])
    curve = figures(section(study(tmp_path)))["hyperparameters"].data["panels"][0]["curves"][0]
    assert len(curve["at"]) == QUANTILES  # thinned
    assert (curve["at"][0], curve["share"][-1]) == (min(curve["at"]), 1)


def test_a_cluster_mean_weighs_trials_and_resamples_cells():
    values, cells = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 1])
    found = cluster_mean(values, cells, rng(0, "test"))
    assert (found.n, found.value) == (2, 2.0)
    assert found.ci == (1.0, 5.0)  # half of the resamples draw one cell twice


@given(arrays(float, st.integers(1, 30), elements=st.floats(-1, 1)), st.integers(0, 5))
def test_a_cluster_mean_is_the_mean_and_lies_in_its_interval(values, seed):
    cells = rng(seed, "cells").integers(0, 4, len(values))
    found = cluster_mean(values, cells, rng(seed, "draws"))
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    if found.n > 1:
        assert found.ci[0] - 1e-12 <= found.value <= found.ci[1] + 1e-12


def test_notes_that_conditions_share_are_made_once():
    out = Section("a", "A")
    gather(out, {"one": Section("", "", notes=["same.", "own."]), "two": Section("", "", notes=["same."])})
    assert out.notes == ["one; two: same.", "one: own."]


@warnings_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_odd_studies_give_tables_figures_or_a_reason(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    assert found.figures or any("no configuration was started" in note for note in found.notes)
    assert found.tables or found.notes
    for table in found.tables:
        latex(table), markdown(table)
    for figure in found.figures:
        drawn(figure).savefig(tmp_path / f"{figure.name}.png")
