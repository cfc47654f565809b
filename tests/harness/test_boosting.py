"""XGBoost on tables: rounds as epochs, resuming bit for bit, the objective for a warm start."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from backends.context import UserError
from harness import trial
from harness.ohgw import Objective, Settings, warm_start
from harness.tasks import boosting, load_task
from scripts.plain_loops import boosting as plain

xgboost = pytest.importorskip("xgboost")

CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {
    "lr": 0.3, "subsample": 0.6, "colsample_bytree": 0.5, "reg_lambda": 1.0, "min_child_weight": 1.0,
    "max_depth": 4, "max_leaves": 12, "grow_policy": "lossguide",
}  # fmt: skip


def spec(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / "xgboost.yaml").read_text())["task"] | {"data": "wine"} | changes


def build(**changes: Any) -> boosting.BoostingTask:
    task = load_task(spec(**changes), "cpu")
    assert isinstance(task, boosting.BoostingTask)
    return task


def never() -> bool:
    return False


def mixed(folder: Path) -> str:
    """A file with numbers and words, some missing, that decide a class (also in words) that is not learnt at once."""
    draw = np.random.default_rng(0)
    lines = ["size,colour,kind"]
    for i in range(300):
        size, colour = draw.normal(), ["red", "green", "blue", "grey", "pink"][i % 5]
        kind = "yes" if (size > 0) == (i % 5 in (0, 3)) else "no"
        lines.append(f"{'' if i % 9 == 0 else f'{size:.5f}'},{'?' if i % 8 == 0 else colour},{kind}")
    path = folder / "mixed.csv"
    path.write_text("\n".join(lines))
    return str(path)


def through_a_file(task: boosting.BoostingTask, run: boosting.BoostingRun) -> boosting.BoostingRun:
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    resumed = task.start(run.config, run.seed)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def content(run: boosting.BoostingRun) -> bytes:
    return run.state_dict()["booster"].numpy().tobytes()


@pytest.mark.parametrize(
    "drawn",
    [{}, {"subsample": 0.5}, {"colsample_bytree": 0.4}, {"colsample_bylevel": 0.4}, {"colsample_bynode": 0.4}, CONFIG],
    ids=["nothing", "rows", "bytree", "bylevel", "bynode", "all"],
)
@pytest.mark.parametrize(
    "options", [{}, {"data": "breast_cancer"}, {"data": "diabetes", "metric": "r2"}], ids=["many", "two", "value"]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, drawn):
    task = build(**options)
    straight, broken = (task.start({"lr": 0.3, **drawn}, 1) for _ in range(2))
    other = task.start({"lr": 0.1, "subsample": 0.9}, 2)  # of the same process, in between
    broken = through_a_file(task, broken)
    for _ in range(3):
        expected = [straight.train_epoch(never), straight.evaluate("validation"), straight.evaluate("test")]
        other.train_epoch(never)
        assert [broken.train_epoch(never), broken.evaluate("validation"), broken.evaluate("test")] == expected
        broken = through_a_file(task, broken)
    assert content(straight) == content(broken)
    assert straight.booster.num_boosted_rounds() == 3 * task.rounds_per_epoch


def test_seeds_and_epochs_draw_other_rows():
    task = build(rounds_per_epoch=1)
    runs = [task.start({"subsample": 0.5, "lr": 1e-6}, seed) for seed in (0, 1)]
    for _ in range(2):
        for run in runs:
            run.train_epoch(never)
    trees = [[tree["split_conditions"] for tree in json.loads(run.booster.save_raw("json"))["learner"]
              ["gradient_booster"]["model"]["trees"]] for run in runs]  # fmt: skip
    assert trees[0] != trees[1]
    assert trees[0][:3] != trees[0][3:]


@pytest.mark.parametrize("options", [{}, {"data": "breast_cancer"}, {"data": "diabetes", "metric": "r2"}])
def test_kept_predictions_are_those_of_the_whole_booster(options):
    task = build(**options)
    run = task.start(CONFIG, 0)
    for _ in range(3):
        run.train_epoch(never)
        run.evaluate("validation")
    fresh = through_a_file(task, run)
    for part in ("train", "validation", "test"):
        assert run.evaluate(part) == fresh.evaluate(part)
    data = task.table.parts["test"]
    found = run.booster.predict(xgboost.DMatrix(data.numeric.numpy()))
    if options.get("metric") == "r2":
        assert run.evaluate("test")["loss"] == pytest.approx(float(np.mean((found - data.target.numpy()) ** 2)), 1e-5)
        return
    p = torch.from_numpy(found)
    p = torch.stack([1 - p, p], 1) if p.ndim == 1 else p
    assert run.evaluate("test")["loss"] == pytest.approx(float(F.nll_loss(p.log(), data.target)), rel=1e-4)
    assert run.evaluate("test")["score"] == pytest.approx(float((p.argmax(1) == data.target).float().mean()))


def test_it_is_xgboost_train():
    """The first epoch, whose generators begin as in any training."""
    task = build()
    run = task.start(CONFIG, 0)
    run.train_epoch(never)
    theirs = xgboost.train(run.parameters, task.matrices["train"], task.rounds_per_epoch)
    assert bytes(theirs.save_raw("ubj")) == content(run)


def test_numbers_words_and_gaps_are_learnt(tmp_path):
    task = build(data=mixed(tmp_path))
    assert task.table.levels == {"colour": 6}
    run = task.start({"lr": 0.5, "min_child_weight": 0.1}, 0)
    for _ in range(5):
        trained = run.train_epoch(never)
    assert trained is not None
    assert trained["train_score"] > 0.85
    assert trained["flops"] == 0
    assert set(run.evaluate("test")) == {"loss", "score", "f1"}
    assert run.evaluate("validation")["score"] > 0.75


def test_an_epoch_stops_at_the_next_round():
    asked = iter([False, False, True])
    run = build().start(CONFIG, 0)
    assert run.train_epoch(lambda: next(asked)) is None
    assert list(asked) == []
    assert run.epoch == 0


def test_label_noise_makes_it_harder():
    runs = [build(data="breast_cancer", label_noise=share).start(CONFIG, 0) for share in (0.0, 0.4)]
    for run in runs:
        for _ in range(3):
            run.train_epoch(never)
    clean, noisy = (run.evaluate("test")["loss"] for run in runs)
    assert noisy > clean + 0.1


def test_mistakes_are_answered():
    with pytest.raises(UserError, match="no hyperparameter 'depth' here; it has lr, subsample"):
        build(space="mine", spaces={"mine": {"depth": {"lower": 0.1, "upper": 1.0}}})
    with pytest.raises(UserError, match="no hyperparameter 'eta'"):
        build().start({"eta": 0.3}, 0)
    with pytest.raises(UserError, match=r"set task\.metric=r2"):
        build(data="diabetes")


def test_without_xgboost_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)  # what Python does for a module that is not there
    with pytest.raises(UserError, match=r"pip install 'ohgw-harness\[boosting\]'"):
        boosting.imported()


# warm start


def test_the_objective_is_the_validation_loss_of_a_short_training_on_common_random_numbers():
    task = build(warm_rounds=3)
    run = task.start(CONFIG, 5)
    objective = run.problem(Settings())
    assert isinstance(objective, Objective)
    value = objective.value(CONFIG, 0)
    run.train_epoch(never)
    assert objective.value(CONFIG, 0) == value
    assert objective.value(CONFIG, 1) != value
    assert task.start(CONFIG, 5).problem(Settings()).value(CONFIG, 0) == value
    assert objective.value(CONFIG | {"lr": 0.4}, 0) != value
    seed = boosting.seed(5, "warm_start", 0)
    theirs = xgboost.train(task.parameters(CONFIG, seed), task.matrices["train"], 3)
    p = torch.from_numpy(theirs.predict(task.matrices["validation"]))
    assert value == pytest.approx(float(F.nll_loss(p.log(), task.targets["validation"])), rel=1e-4)


@pytest.mark.parametrize("estimator", ["lookahead", "direct", "finite_difference", "random"])
def test_a_warm_start_takes_differences_and_moves_only_what_is_continuous(estimator):
    task = build()
    run = task.start(CONFIG, 0)
    settings = Settings(estimator=estimator, step="normalized", eta=0.1)
    result = warm_start(CONFIG, task.space, run.problem(settings), settings, np.random.default_rng(0))
    record = result.record()
    assert record["length"] == pytest.approx(0.1)
    assert set(record["gradient"]) == set(task.space.continuous)
    fixed = ("max_depth", "max_leaves", "grow_policy")
    assert {name: result.config[name] for name in fixed} == {name: CONFIG[name] for name in fixed}
    assert (record["fallback"] is None) == (estimator == "finite_difference")
    if estimator in ("lookahead", "direct"):
        assert record["estimator"] == "finite_difference"
        assert record["fallback"] == f"{estimator}: missing gradient: trees have none"
        x = task.space.continuous["lr"]
        unit, value = x.unit(0.3), run.problem(settings).value
        above, below = (value(CONFIG | {"lr": x.from_unit(unit + h)}, 0) for h in (0.05, -0.05))
        slope = (above - below) / (0.1 * (x.bounds[1] - x.bounds[0]))
        assert record["gradient"]["lr"] == pytest.approx(slope, rel=1e-6)


def test_after_a_warm_start_the_trial_is_the_vanilla_trial_of_the_new_configuration():
    task = build()
    warm, vanilla = task.start(CONFIG, 0), task.start(CONFIG | {"lr": 0.2}, 0)
    settings = Settings(step="normalized", eta=0.1)
    warm_start(CONFIG, task.space, warm.problem(settings), settings)
    warm.reconfigure(CONFIG | {"lr": 0.2})
    assert warm.train_epoch(never) == vanilla.train_epoch(never)
    assert content(warm) == content(vanilla)


def test_preparing_and_counting_cost_no_training(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(boosting.BoostingRun, "_loss_after_warm_rounds", lambda *_: calls.append(1))
    ohgw = {"estimator": "lookahead", "batch_size": 128, "probe": "train"}
    settings = {"task": spec(), "ohgw": ohgw}
    trial.prepare(settings, "cpu")
    run = build().start(CONFIG, 0)
    assert trial.warm_start_flops(CONFIG, build(), run, settings, 0, "finite_difference") == 0
    assert calls == []


# around it


def test_spaces():
    for name, dimensions in {"study3": 3, "study5": 5, "study10": 10}.items():
        space = build(space=name).space
        assert len(space) == len(space.continuous) == dimensions
    mixed, continuous = build(space="mixed").space, build(space="continuous").space
    assert mixed.continuous == continuous.continuous
    assert set(mixed) == {*continuous, *continuous.constants}
    for i, name in enumerate(["mixed", "study10", "continuous"]):
        task = build(space=name)
        task.start(task.space.sample(np.random.default_rng(i)), i).train_epoch(never)


def test_the_module_is_imported_without_xgboost():
    code = (
        "import sys, harness.tasks.boosting; print([m for m in ('xgboost', 'sklearn', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parents[1], check=True)
    assert out.stdout.strip() == "[]"


def test_the_usual_loop_runs():
    asked = iter([False, False, True])
    plain.plain_loop(spec(), CONFIG, torch.device("cpu"), 0)(lambda: next(asked))
    assert list(asked) == []
    assert plain.units_per_step(spec(), CONFIG) == 1


@pytest.mark.slow
def test_the_command(harness, tmp_path):
    done = harness("task=xgboost", "task.data=wine", "scheduler=asha", "ohgw=off,masked", "budget.epochs=4",
                   "n_workers=1", "backend.threads=1", "tracker=none")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(tmp_path.glob("results/*/*/events.jsonl"))
    assert len(logs) == 2
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    reports = [event["result"] for event in events if event["e"] == "report"]
    assert len(reports) == 8
    assert all("test_f1" in report for report in reports)
    warm = [report for report in reports if report.get("warm_start")]
    assert warm
    for report in warm:
        record = report["warm_start"]
        assert record["estimator"] == "finite_difference"
        assert "trees have none" in record["fallback"]
        assert record["flops"] == 0
        assert 0 < record["seconds"] <= report["busy"]["warm_start"]
