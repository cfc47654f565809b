import math
import pickle

import numpy as np
import pytest
from matplotlib import pyplot

from harness.report import load_results
from harness.report.ablations import section, setting_ablations, variant_ablations
from harness.report.document import STYLE, latex, markdown
from harness.report.study import Study
from tests.harness.degenerate_studies import STUDIES, warnings_fail, write
from tests.harness.fake_results import FakeCell


def cell(t, folder, variant="off", seed=0, ohgw=None, **more):
    """A cell of 100 s which reaches tau at ``t`` seconds (None: never); ohgw: of the variant's configuration."""
    scores = [(0.95 if t and s >= t else 0.5,) * 2 for s in range(10, 101, 10)]
    keys = {"ohgw": {"estimator": "lookahead", "step": "normalized", "eta": 0.1, "mask": [], **(ohgw or {})}}
    return FakeCell(scores, seconds=10, variant=variant, seed=seed, keys=keys | more.pop("keys", {}), **more).write(
        folder
    )


def study(folder):
    return Study(load_results(folder / "default"))


def drawn(figure):
    with pyplot.rc_context(STYLE):
        return figure.draw(**pickle.loads(pickle.dumps(dict(figure.data))))


def eta_sweep(folder, seeds=7):
    """off reaches tau at 80 s, with eta 0.2 at 40 s, 0.1 at 60 s, 0.02 never."""
    for seed in range(seeds):
        cell(80, folder, "off", seed)
        cell(60, folder, "normalized", seed)
        cell(40, folder, "normalized(eta=0.2)", seed, {"eta": 0.2})
        cell(None, folder, "normalized(eta=0.02)", seed, {"eta": 0.02})


def test_a_sweep_of_one_key_by_hand(tmp_path):
    eta_sweep(tmp_path)
    found = section(study(tmp_path))
    (table,), (figure,) = found.tables, found.figures
    assert table.name == figure.name == "ablation-eta_digits-pasha"
    frame = table.frame
    assert frame["value"].tolist() == ["0.02", "0.1", "0.2"]  # by size
    assert frame["variant"].tolist() == ["normalized(eta=0.02)", "normalized", "normalized(eta=0.2)"]
    assert frame["effect"].tolist() == pytest.approx([-math.inf, 0.25, 0.5])
    assert frame["effect, upper bound"].tolist() == pytest.approx([1 - 100 / 80, 0.25, 0.5])
    assert frame["T median (s)"].tolist() == [math.inf, 60, 40]
    assert frame["censored"].tolist() == [7, 0, 0]
    assert frame["CI low"].tolist()[1:] == pytest.approx([0.25, 0.5])
    assert frame["score"].tolist() == [0.5, 0.95, 0.95]
    assert frame["score - off"].tolist() == pytest.approx([-0.45, 0, 0])
    assert (frame["pairs"] == 7).all()
    assert "eta (0.02, 0.1, 0.2) in digits / pasha" in found.text[0]


def test_the_figure_holds_the_effects(tmp_path):
    eta_sweep(tmp_path)
    left, right = drawn(section(study(tmp_path)).figures[0]).axes
    assert left.lines[0].get_ydata()[1:] == pytest.approx([25, 50])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.02", "0.1", "0.2"]
    assert right.lines[0].get_ydata() == pytest.approx([0.5, 0.95, 0.95])
    assert "off" in [text.get_text() for text in left.figure.legends[0].get_texts()]


def test_presets_that_differ_in_one_key_are_an_ablation(tmp_path):
    cell(80, tmp_path)
    cell(60, tmp_path, "normalized")
    cell(70, tmp_path, "random", ohgw={"estimator": "random"})
    cell(50, tmp_path, "masked", ohgw={"mask": ["lr", "wd"]})
    cell(50, tmp_path, "sign", ohgw={"step": "sign", "eta": 0.05})  # two keys
    found = {ablation.key: ablation for ablation in variant_ablations(study(tmp_path).conditions[0])}
    assert set(found) == {"estimator", "mask"}
    assert found["estimator"].values == ["lookahead", "random"]
    frame = next(t.frame for t in section(study(tmp_path)).tables if "mask" in t.name)
    assert frame["value"].tolist() == ["lr+wd", "none"]


def test_groups_that_differ_elsewhere_are_series_of_one_ablation(tmp_path):
    for preset, step in (("normalized", "normalized"), ("sign", "sign")):
        for eta in (0.1, 0.2):
            label = preset if eta == 0.1 else f"{preset}(eta={eta})"
            cell(50, tmp_path, label, ohgw={"step": step, "eta": eta})
    (sweep,) = [a for a in variant_ablations(study(tmp_path).conditions[0]) if a.key == "eta"]
    assert sweep.series == ["normalized", "sign"]
    assert [point.value for point in sweep.points] == [0.1, 0.2, 0.1, 0.2]


def test_a_step_of_zero_alone_makes_no_sweep(tmp_path):
    cell(80, tmp_path, "zero", ohgw={"step": "raw", "eta": 0.0})
    cell(60, tmp_path, "on", ohgw={"step": "raw", "eta": 0.001})
    assert variant_ablations(study(tmp_path).conditions[0]) == []
    cell(60, tmp_path, "on(eta=0.01)", ohgw={"step": "raw", "eta": 0.01})
    (ablation,) = variant_ablations(study(tmp_path).conditions[0])
    assert ablation.values == [0.0, 0.001, 0.01]


def test_settings_that_differ_in_one_key_by_hand(tmp_path):
    for seed in range(6):
        for noise, task in ((0.0, "digits"), (0.2, "digits(label_noise=0.2)")):
            keys = {"task.label_noise": noise}
            cell(80, tmp_path, "off", seed, task=task, keys=keys)
            cell(40 if noise else 60, tmp_path, "on", seed, task=task, keys=keys)
    cell(50, tmp_path, "on(eta=0.5)", 0, {"eta": 0.5}, keys={"task.label_noise": 0.0})  # of one setting only
    found = section(study(tmp_path))
    (table,) = [table for table in found.tables if "task" in table.name]
    assert table.name == "ablation-task.label_noise_digits-pasha"
    on = table.frame[table.frame["series"] == "on"]
    assert on["value"].tolist() == ["0", "0.2"]
    assert on["effect"].tolist() == pytest.approx([0.25, 0.5])
    assert on["condition"].tolist() == ["digits / pasha", "digits(label_noise=0.2) / pasha"]
    assert set(table.frame["series"]) == {"off", "on"}
    drawn(found.figures[-1])


def test_spaces_are_named_and_other_differences_are_no_ablation(tmp_path):
    small, large = {"lr": {"lower": 0.1, "upper": 1.0}}, {"lr": {"lower": 0.01, "upper": 1.0}}
    for name, space in (("small", small), ("large", large)):
        keys = {"task.space": name, "task.spaces": {"small": small, "large": large}}
        task = "digits" if name == "small" else "digits(model=mlp,space=large)"
        cell(50, tmp_path, task=task, keys=keys, space=space)
        cell(50, tmp_path, task=task, keys={**keys, "task.batch": 1}, space=space, n_workers=4, scheduler="asha")
    found = setting_ablations(study(tmp_path).conditions)
    assert {ablation.key for ablation in found} == {"task.space"}
    assert {tuple(map(str, ablation.values)) for ablation in found} == {("large", "small")}
    assert {ablation.words[0] for ablation in found} <= {"digits", "digits(model=mlp)"}


def test_other_schedulers_are_no_ablation(tmp_path):
    cell(50, tmp_path)
    cell(50, tmp_path, scheduler="asha")
    assert setting_ablations(study(tmp_path).conditions) == []


def test_workers_are_an_ablation_with_a_name_of_its_own(tmp_path):
    for seed, workers in enumerate((2, 2, 4, 4)):  # seeds keep the folders apart
        cell(50, tmp_path, "on", seed, n_workers=workers)
    found = section(study(tmp_path))
    assert [table.name for table in found.tables] == ["ablation-n_workers_digits-pasha"]
    assert found.tables[0].frame["value"].tolist() == ["2", "4"]
    assert any("ohgw=off adds them" in note for note in found.notes)


def test_without_an_ablation_a_sweep_is_named(tmp_path):
    cell(50, tmp_path)
    found = section(study(tmp_path))
    assert (found.tables, found.figures) == ([], [])
    assert "ohgw.eta=" in found.notes[0]


def test_without_a_target_there_are_scores_and_no_effects(tmp_path):
    for variant, eta in (("off", 0.1), ("normalized", 0.1), ("normalized(eta=0.2)", 0.2)):
        cell(50, tmp_path, variant, ohgw={"eta": eta}, keys={"task.tau": None, "task.taus": []})
    found = section(study(tmp_path))
    frame = found.tables[0].frame
    assert frame[["effect", "CI low", "p", "T median (s)", "censored"]].isna().all(axis=None)
    assert (frame["score"] == 0.95).all()
    drawn(found.figures[0])


@warnings_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_odd_studies_give_tables_figures_or_a_reason(name, tmp_path):
    found = section(Study(load_results(write(name, tmp_path))))
    assert found.tables or found.notes
    assert len(found.tables) == len(found.figures)
    for table in found.tables:
        latex(table), markdown(table)
    for figure in found.figures:
        drawn(figure).savefig(tmp_path / f"{figure.name}.png")


@pytest.mark.parametrize("name", ["running", "no scores"])
@warnings_fail
def test_a_sweep_with_unknown_numbers_can_be_drawn(name, tmp_path):
    scores = [(math.nan, math.nan)] if name == "no scores" else []
    for variant, eta in (("off", 0.1), ("normalized", 0.1), ("normalized(eta=0.2)", 0.2)):
        FakeCell(scores, variant=variant, close=None, keys={"ohgw": {"estimator": "lookahead", "eta": eta}}).write(
            tmp_path
        )
    found = section(study(tmp_path))
    assert np.isnan(found.tables[0].frame["score"]).all()
    drawn(found.figures[0]).savefig(tmp_path / "sweep.png")
