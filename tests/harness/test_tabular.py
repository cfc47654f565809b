"""Tables and the networks on them: reading, splits, encoding, scores, resuming, and the problem for a warm start."""

import copy
import dataclasses
import gzip
import hashlib
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

from backends.context import TrialFailed, UserError
from harness import recorder, trial
from harness.ohgw import Settings
from harness.ohgw.coordinates import Coordinate
from harness.ohgw.estimators import lookahead, lookahead_objective
from harness.tasks import distributed, load_task, tables, tabular
from scripts.plain_loops import tabular as plain

CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {"lr": 0.03, "wd": 1e-3, "momentum": 0.8, "noise": 0.3, "label_smoothing": 0.1}
ALL = CONFIG | {"scaling": 0.2, "mixup": 0.5, "dropout": 0.3, "clip": 1.0, "warmup": 0.1}
N = 240


def spec(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / "uci.yaml").read_text())["task"] | changes


def build(**changes: Any) -> tabular.TabularTask:
    task = load_task(spec(**changes), "cpu")
    assert isinstance(task, tabular.TabularTask)
    return task


def never() -> bool:
    return False


def rows() -> list[list[str]]:
    """A table of two numbers (with gaps), a word (with gaps), a truth value; a class and a quantity they decide."""
    draw = np.random.default_rng(0)
    found = []
    for i in range(N):
        a, b, colour = draw.normal(), 50 + 9 * draw.normal(), ["red", "green", "blue"][i % 3]
        quantity = a + 0.1 * b + (i % 3) + 0.1 * draw.normal()
        wealth = "rich" if quantity > 6 else "poor"
        found.append([
            f"{a:.6f}", "?" if i % 7 == 0 else f"{b:.6f}", "" if i % 11 == 0 else colour, str(i % 2 == 0), wealth,
            f"{quantity:.6f}",
        ])  # fmt: skip
    return found


def write(path: Path, lines: list[list[str]] | None = None, mark: str = ",", header: bool = True) -> str:
    names = [["age", "height", "colour", "owner", "wealth", "quantity"]] if header else []
    text = "\n".join(mark.join(line) for line in names + (lines or rows())) + "\n"
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return str(path)


@pytest.fixture
def classification(tmp_path):
    return build(data=write(tmp_path / "mixed.csv"), target="wealth", batch_size=16)


@pytest.fixture
def regression(tmp_path):
    return build(data=write(tmp_path / "mixed.csv"), batch_size=16, metric="r2")


# tables


@pytest.mark.parametrize(
    ("name", "n", "columns", "classes"),
    [("breast_cancer", 569, 30, 2), ("wine", 178, 13, 3), ("digits", 1797, 64, 10), ("iris", 150, 4, 3)],
)
def test_sets_that_scikit_learn_ships(name, n, columns, classes):
    from sklearn import datasets

    table = tables.load(name, metric="accuracy")
    assert sum(map(len, table.parts.values())) == n
    assert (len(table.numeric), len(table.classes)) == (columns, classes)
    theirs = getattr(datasets, f"load_{name}")()
    ours = tables.read(name, None, True, (), None)
    assert np.array_equal(np.stack(list(ours.features.values()), 1), theirs.data)
    assert np.array_equal(ours.target, theirs.target)


def test_diabetes_is_a_regression_on_a_standardised_target():
    from sklearn.datasets import load_diabetes

    table = tables.load("diabetes", metric="r2")
    assert {name: len(part) for name, part in table.parts.items()} == {"train": 221, "validation": 110, "test": 111}
    assert table.classes == ()
    values = torch.cat([part.target.double() for part in table.parts.values()]) * table.std + table.mean
    assert values.sort().values.tolist() == pytest.approx(sorted(load_diabetes().target), rel=1e-5)
    assert float(table.parts["train"].target.mean()) == pytest.approx(0, abs=1e-6)
    ours = tables.read("diabetes", None, True, (), None).features
    assert np.array_equal(np.stack(list(ours.values()), 1), load_diabetes(scaled=False).data)


def test_the_split_is_the_same_every_time_disjoint_and_stratified():
    first, second = (tables.load("breast_cancer", metric="accuracy") for _ in range(2))
    seen = [tuple(row) for part in first.parts.values() for row in part.numeric.tolist()]
    assert len(set(seen)) == len(seen) == 569
    for name, part in first.parts.items():
        assert torch.equal(part.numeric, second.parts[name].numeric)
        assert float(part.target.float().mean()) == pytest.approx(357 / 569, abs=0.01)


@pytest.mark.parametrize(("file", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ";"), ("a.txt.gz", "|")])
def test_a_file_of_any_delimiter_is_read(tmp_path, file, mark):
    table = tables.load(write(tmp_path / file, mark=mark), target="wealth", metric="accuracy")
    assert table.classes == ("poor", "rich")
    assert table.numeric == ("age", "height", "owner", "quantity")
    assert table.levels == {"colour": 4}  # three and missing


def test_a_file_without_header_in_a_data_dir(tmp_path):
    write(tmp_path / "plain.csv", header=False)
    table = tables.load("plain.csv", data_dir=str(tmp_path), header=False, target="4", metric="f1", categorical=["3"])
    assert sum(map(len, table.parts.values())) == N
    assert table.levels == {"2": 4, "3": 3}


def test_missing_numbers_are_the_training_median_and_flagged(classification):
    part, x = classification.table.parts["train"], classification.inputs["train"].double()
    heights = part.numeric[:, 1]
    gaps = heights.isnan()
    assert 0 < int(gaps.sum()) < len(gaps)
    assert torch.equal(x[:, 4].bool(), gaps)
    known = heights[~gaps]
    mean, std, median = known.mean(), known.std(correction=0), known.median()
    torch.testing.assert_close(x[~gaps, 1], (known - mean) / std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x[gaps, 1], ((median - mean) / std).expand(int(gaps.sum())), rtol=1e-5, atol=1e-6)
    assert classification.numeric == 5
    assert set(x[:, 5].tolist()) == {0, 1, 2, 3}  # colours, 0 where it is missing


def test_statistics_are_those_of_the_training_part_alone(tmp_path):
    lines = rows()
    table = tables.load(write(tmp_path / "mixed.csv", lines), target="wealth", metric="accuracy")
    train = {f"{age:.6f}" for age in table.parts["train"].numeric[:, 0].tolist()}
    for line in lines:
        if line[0] not in train:
            line[0], line[2] = str(1e6 + float(line[0])), "violet"
    changed = tables.load(write(tmp_path / "mixed.csv", lines), target="wealth", metric="accuracy")
    assert torch.equal(tabular.inputs(changed)["train"], tabular.inputs(table)["train"])
    assert changed.levels == table.levels
    assert set(changed.parts["test"].levels[:, 0].tolist()) == {0}
    assert tabular.inputs(changed)["test"][:, 0].min() > 1e5


def test_the_target_decides_the_kind():
    quantity, words = np.arange(100.0), np.array(["a", "b"] * 50, dtype=object)
    assert tables.kind_of(quantity, "auto") == "regression"
    assert tables.kind_of(quantity % 7, "auto") == "classification"
    assert tables.kind_of(quantity % 7 + 0.5, "auto") == "regression"
    assert tables.kind_of(words, "auto") == "classification"
    assert tables.kind_of(quantity % 7, "regression") == "regression"
    with pytest.raises(UserError, match="has words"):
        tables.kind_of(words, "regression")


def test_mistakes_are_answered(tmp_path):
    mixed = write(tmp_path / "mixed.csv")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"data": "diabetes"}, "set task.metric=r2"),
        ({"metric": "r2"}, "set task.metric=accuracy"),
        ({"data": "digit"}, "no file .*digit; possible: breast_cancer, diabetes"),
        ({"data": mixed, "target": "income"}, "no column 'income'; it has age, height"),
        ({"data": "wine", "target": "0"}, "not for wine"),
        ({"data": "openml:a:b"}, "must be openml:NAME"),
        ({"batch_size": 5000}, "more than the 898"),
        ({"data": write(tmp_path / "short.csv", rows()[:5])}, "too few"),
    ]
    for changes, message in mistakes:
        with pytest.raises(UserError, match=message):
            build(**changes)
    (tmp_path / "broken.csv.gz").write_bytes(b"\x1f\x8b\x08\x00 this is no table")
    with pytest.raises(UserError, match="cannot be read as a table"):
        build(data=str(tmp_path / "broken.csv.gz"))


def openml_cache(folder: Path) -> None:
    """What scikit-learn keeps of a data set of OpenML that it has fetched."""
    lines = ["@relation small", "@attribute size numeric", "@attribute kind {x,y}", "@attribute class {no,yes}"]
    lines += ["@data", *(f"{i},{'xy'[i % 2]},{['no', 'yes'][i > 19]}" for i in range(40))]
    text = "\n".join(lines) + "\n"
    features = [
        {"index": str(i), "name": name, "data_type": kind, "is_target": str(name == "class").lower(),
         "is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0",
         **({} if kind == "numeric" else {"nominal_value": ["x", "y"] if name == "kind" else ["no", "yes"]})}
        for i, (name, kind) in enumerate([("size", "numeric"), ("kind", "nominal"), ("class", "nominal")])
    ]  # fmt: skip
    info = {"id": "7", "name": "small", "version": "1", "format": "ARFF", "file_id": "9", "status": "active",
            "url": "https://api.openml.org/data/v1/download/9/small.arff", "default_target_attribute": "class",
            "md5_checksum": hashlib.md5(text.encode()).hexdigest(), "description": ""}  # fmt: skip
    api = folder / "openml" / "openml.org" / "api" / "v1" / "json" / "data"
    found = {"data": {"dataset": [{"did": 7, "name": "small", "version": 1, "status": "active"}]}}
    contents = {
        api / "list/data_name/small/limit/2/status/active/.gz": json.dumps(found),
        api / "7.gz": json.dumps({"data_set_description": info}),
        api / "features/7.gz": json.dumps({"data_features": {"feature": features}}),
        api / "qualities/7.gz": json.dumps({"data_qualities": {"quality": []}}),
        folder / "openml/openml.org/data/v1/download/9/small.arff.gz": text,
    }
    for path, text in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))


def test_an_openml_set_that_is_not_there_names_the_ways_out(tmp_path):
    with pytest.raises(UserError, match="openml:no-such-set-1: OpenML did not give it"):
        build(data="openml:no-such-set-1", data_dir=str(tmp_path))


def test_an_openml_set_is_read_with_its_default_target(tmp_path):
    openml_cache(tmp_path)
    table = tables.load("openml:small", data_dir=str(tmp_path), metric="accuracy")
    assert table.numeric == ("size",)
    assert table.levels == {"kind": 3}
    assert table.classes == ("no", "yes")


# scores


def test_accuracy_and_macro_f1_are_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score

    generator = torch.Generator().manual_seed(0)
    table = tables.load("digits", metric="accuracy")
    logits, target = torch.randn(200, 10, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    logits[:, 8:] = -9  # classes that never occur nor are predicted
    found = table.scores(table.statistics(logits[:90], target[:90]) + table.statistics(logits[90:], target[90:]), 200)
    guess = logits.argmax(1).numpy()
    assert found["score"] == pytest.approx(accuracy_score(target.numpy(), guess))
    assert found["f1"] == pytest.approx(f1_score(target.numpy(), guess, average="macro"))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, target)))
    by_f1 = dataclasses.replace(table, metric="f1").scores(table.statistics(logits, target), 200)
    assert (by_f1["score"], by_f1["accuracy"]) == (found["f1"], found["score"])


def test_r2_is_scikit_learns(regression):
    from sklearn.metrics import r2_score

    run = regression.start(CONFIG, 0)
    run.train_epoch(never)
    found, target = run.evaluate("test"), regression.targets["test"]
    run.net.eval()
    guess = run.net(regression.inputs["test"]).detach().squeeze(1)
    assert found["score"] == pytest.approx(r2_score(target.numpy(), guess.numpy()), abs=1e-5)
    assert found["loss"] == pytest.approx(float(F.mse_loss(guess, target)), rel=1e-5)
    assert found["rmse"] == pytest.approx(regression.table.std * found["loss"] ** 0.5)


# runs


@pytest.mark.parametrize("model", ["mlp", "resmlp"])
def test_training_learns_classes(model):
    run = build(data="breast_cancer", model=model).start({"lr": 0.02, "momentum": 0.9}, 0)
    for _ in range(3):
        trained = run.train_epoch(never)
    assert run.evaluate("validation")["score"] > 0.9
    assert run.evaluate("test")["f1"] > 0.9
    assert trained is not None
    assert trained["train_score"] > 0.9
    assert trained["flops"] > 0


def test_training_learns_from_words_and_quantities(classification, regression):
    assert "f1" in classification.start(CONFIG, 0).evaluate("test")
    run = regression.start({"lr": 0.003, "momentum": 0.9}, 0)
    for _ in range(15):
        trained = run.train_epoch(never)
    assert run.evaluate("validation")["score"] > 0.8
    assert trained is not None
    assert trained["train_score"] == pytest.approx(1 - trained["train_loss"], abs=0.02)


def test_label_noise_changes_that_share_of_training_targets_and_no_other(tmp_path):
    choices: list[dict[str, Any]] = [{"target": "wealth"}, {"metric": "r2"}]
    for options in choices:
        clean, noisy = (
            tables.load(write(tmp_path / "a.csv"), **({"metric": "accuracy"} | options), label_noise=share)
            for share in (0.0, 0.25)
        )
        values = [table.parts["train"].target * table.std + table.mean for table in (clean, noisy)]
        share = float((~torch.isclose(values[0].float(), values[1].float(), atol=1e-4)).float().mean())
        assert share == pytest.approx(0.25, abs=0.02)
        tests = [table.parts["test"].target * table.std + table.mean for table in (clean, noisy)]
        torch.testing.assert_close(*tests)


def same(a, b):
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    "config", [CONFIG, ALL, ALL | {"optimizer": "adamw", "schedule": "cosine"}], ids=["plain", "all", "adamw"]
)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(kind, config, request):
    task = request.getfixturevalue(kind)
    config = config | {"lr": 0.003}
    straight, broken = task.start(config, 1), task.start(config, 1)
    for _ in range(3):
        expected = [straight.train_epoch(never), straight.evaluate("validation"), straight.evaluate("test")]
        assert [broken.train_epoch(never), broken.evaluate("validation"), broken.evaluate("test")] == expected
        file = io.BytesIO()
        torch.save(broken.state_dict(), file)
        file.seek(0)
        broken = task.start(config, 1)
        broken.load_state_dict(torch.load(file, weights_only=True))
    assert same(straight.state_dict(), broken.state_dict())


def test_hyperparameters_that_are_absent_are_0(classification):
    named = classification.start(
        CONFIG | {"noise": 0.0, "label_smoothing": 0.0, "scaling": 0.0, "mixup": 0.0, "dropout": 0.0}, 0
    )
    plainly = classification.start({name: CONFIG[name] for name in ("lr", "wd", "momentum")}, 0)
    assert plainly.train_epoch(never) == named.train_epoch(never)


@pytest.mark.parametrize("name", ["noise", "scaling", "mixup", "dropout", "label_smoothing", "clip", "warmup"])
def test_every_hyperparameter_is_used(classification, name):
    base = {name: ALL[name] for name in ("lr", "wd", "momentum")}
    runs = [classification.start(base, 0), classification.start(base | {name: ALL[name]}, 0)]
    assert runs[0].train_epoch(never) != runs[1].train_epoch(never)


def test_the_chunks_an_epoch_is_gathered_in_do_not_matter_without_draws(classification, monkeypatch):
    whole = [x for (x,), _ in classification.batches(classification.completed({"lr": 1}), 0, 0)]
    monkeypatch.setattr(tabular, "CHUNK", 1)
    pieces = [x for (x,), _ in classification.batches(classification.completed({"lr": 1}), 0, 0)]
    assert same(whole, pieces)
    assert len(whole) == classification.sizes["train"] // 16


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_processes_share_the_batches_of_one(kind, request):
    whole = request.getfixturevalue(kind)
    halves = [copy.copy(whole) for _ in range(2)]
    for rank, task in enumerate(halves):
        task.group = distributed.Group()
        task.group.rank, task.group.size = rank, 2
    config = whole.completed(ALL)
    batches = [list(task.batches(config, 0, 0)) for task in (whole, *halves)]
    for (given, answers), *shares in zip(*batches, strict=True):
        for i, tensor in enumerate((*given, *answers)):
            assert torch.equal(torch.cat([(*mine, *theirs)[i] for mine, theirs in shares]), tensor)
    first, second = whole.warm_batches(Settings(batch_size=32), 0, 0, torch.float32)
    shares = [task.warm_batches(Settings(batch_size=32), 0, 0, torch.float32) for task in halves]
    for name in ("inputs", "target", "added"):
        assert torch.equal(torch.cat([getattr(a, name) for a, _ in shares]), getattr(first, name))
    assert torch.equal(torch.cat([b.inputs for _, b in shares]), second.inputs)
    assert len(list(halves[0].evaluation_batches("test"))) == 2


def test_a_loss_that_is_not_finite_fails_the_trial(regression):
    with pytest.raises(TrialFailed, match="loss is"):
        regression.start({"lr": 1e12, "momentum": 0.9}, 0).train_epoch(never)


# warm start


def test_warm_batches_are_disjoint_and_repeatable(classification):
    problem = classification.start(CONFIG, 0).problem(Settings(batch_size=50))
    (first, second), (again, _) = problem.draw(0), problem.draw(0)
    rows = [{tuple(row) for row in batch.inputs[:, :5].tolist()} for batch in (first, second)]
    assert len(rows[0]) == len(rows[1]) == 50
    assert not rows[0] & rows[1]
    assert torch.equal(first.added, again.added)
    probe = classification.start(CONFIG, 0).problem(Settings(batch_size=50, probe="val")).draw(0)[1]
    validation = {tuple(row) for row in classification.inputs["validation"].tolist()}
    assert {tuple(row) for row in probe.inputs.tolist()} <= validation


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_training_loss_of_the_problem_is_the_trainers(kind, request, tmp_path):
    """On the very batch that the trainer sees."""
    options = {"classification": {"target": "wealth"}, "regression": {"metric": "r2"}}[kind]
    task = build(data=write(tmp_path / "mixed.csv"), batch_size=16, space="study10", **options)
    config = ALL | {"dropout": 0.0, "lr": 1e-30}
    run = task.start(config, 3)
    given, answers = next(task.batches(run.config, 3, 0))
    expected = task.criterion(task.forward(run.net, given, run.config), answers, run.config)
    order = task.epoch_order(run.config, 3, 0)[:16]
    streams = {name: tabular.generator(3, name, 0) for name in ("noise", "scaling", "mixup")}
    n = len(task.epoch_order(run.config, 3, 0))
    partners = task.epoch_order(run.config, 3, 0).view(-1, 16).roll(1, 1).flatten()
    everything = task.drawn(task.epoch_order(run.config, 3, 0), partners, streams)
    batch = tabular.Batch(**{name: x[:16] for name, x in vars(everything).items()})
    assert torch.equal(batch.inputs, task.inputs["train"][order])
    assert len(everything.inputs) == n
    problem = run.problem(Settings(batch_size=16))
    z = {name: torch.tensor(config[name]) for name in problem.differentiable}
    assert set(z) == {"label_smoothing", "noise", "scaling", "mixup"}
    torch.testing.assert_close(problem.train_loss(run.net, batch, z), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["mlp", "resmlp"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_lookahead_equals_central_differences(kind, model, optimizer, tmp_path):
    options = {"classification": {"target": "wealth"}, "regression": {"metric": "r2"}}[kind]
    task = build(data=write(tmp_path / "mixed.csv"), batch_size=16, space="study10", model=model, **options)
    config = ALL | {"optimizer": optimizer, "lr": 0.01}
    run = task.start(config, 0)
    run.net.double()
    problem = run.problem(Settings(batch_size=32))
    names = [name for name in task.space.continuous if name in problem.movable]
    assert set(names) == {"lr", "wd", "momentum", "noise", "scaling", "mixup", "label_smoothing", "clip"}
    coordinates = {name: Coordinate(task.space.continuous[name]) for name in names}
    batches = problem.draw(0)
    estimate = lookahead(problem, config, batches, coordinates)
    for name, x in coordinates.items():
        psi, h = x.psi(config[name]), 1e-6 * x.width

        def objective(at: float, name: str = name, x: Coordinate = x) -> float:
            return lookahead_objective(problem, config | {name: x.value(at)}, batches)

        difference = (objective(psi + h) - objective(psi - h)) / (2 * h)
        assert estimate.gradient[name] == pytest.approx(difference, rel=2e-5, abs=1e-9), name


def test_what_a_warm_start_moves_follows_the_space():
    assert build().start(CONFIG, 0).problem(Settings()).differentiable == ("label_smoothing", "noise")
    assert build().start(CONFIG, 0).problem(Settings()).linear == ("label_smoothing",)
    regression = build(data="diabetes", metric="r2").start(CONFIG, 0).problem(Settings(batch_size=64))
    assert regression.linear == ()  # quadratic there


# around it


def test_spaces_hold_names_that_the_trainer_uses():
    every = {"lr", "wd", "momentum", "optimizer", "schedule", "batch_size", *ALL}
    for name, dimensions in {"study3": 3, "study5": 5, "study10": 10}.items():
        space = build(space=name).space
        assert len(space) == len(space.continuous) == dimensions
        assert set(space) <= every
    mixed, continuous = build(space="mixed").space, build(space="continuous").space
    assert mixed.continuous == continuous.continuous
    assert set(mixed) == {*continuous, *continuous.constants}
    for seed in range(3):
        build(space="mixed").start(mixed.sample(np.random.default_rng(seed)), seed).train_epoch(never)


def test_building_an_embedded_table_imports_nothing_slow():
    code = (
        "import sys, json; from harness.tasks import load_task\n"
        f"spec = json.loads({json.dumps(json.dumps(spec(data='wine')))})\n"
        "run = load_task(spec, 'cpu').start({'lr': 0.1}, 0); run.train_epoch(lambda: False)\n"
        "print([m for m in ('sklearn', 'pandas', 'torch._dynamo', 'xgboost') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parents[1], check=True)
    assert out.stdout.strip() == "[]"


class Clock(trial.Clock):
    def __init__(self) -> None:
        super().__init__("cpu", 0.0)


def test_further_scores_are_reported_and_those_of_the_test_part_hidden(classification):
    run = classification.start(CONFIG, 0)

    class Context:
        should_stop = staticmethod(never)

    report = trial.one_epoch(Context(), run, Clock())  # type: ignore[arg-type]
    assert report is not None
    assert report["test_f1"] == run.evaluate("test")["f1"]
    assert report["validation_f1"] == run.evaluate("validation")["f1"]
    visible = recorder._visible(report)
    assert "validation_f1" in visible
    assert not [name for name in visible if name.startswith("test")]


def test_the_usual_loop_runs(classification, tmp_path):
    config = {name: value for name, value in ALL.items() if name != "warmup"}
    for options in ({"target": "wealth"}, {"metric": "r2"}):
        given = spec(data=write(tmp_path / "a.csv"), **options)
        asked = iter([False, False, True])
        plain.plain_loop(given, config, torch.device("cpu"), 0)(lambda: next(asked))  # noqa: B023
        assert list(asked) == []
        assert plain.units_per_step(given, config) == 32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pool", "simulated"])
def test_the_command(harness, tmp_path, backend):
    path = write(tmp_path / "mixed.csv")
    done = harness("task=uci", f"task.data={path}", "task.target=wealth", "task.metric=f1", "scheduler=asha",
                   "ohgw=off,on", "budget.epochs=4", "n_workers=1", "backend.threads=1", "tracker=none",
                   f"backend={backend}", "ohgw.batch_size=32")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(tmp_path.glob("results/*/*/events.jsonl"))
    assert len(logs) == 2
    reports = [
        event for log in logs for line in log.read_text().splitlines() if (event := json.loads(line))["e"] == "report"
    ]
    assert len(reports) == 8
    assert all({"test_accuracy", "validation_accuracy"} <= set(event["result"]) for event in reports)
    warm = [event["result"]["warm_start"] for event in reports if event["result"].get("warm_start")]
    assert warm
    assert all(record["estimator"] == "lookahead" and record["fallback"] is None for record in warm)
