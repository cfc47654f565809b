"""The bench of schedulers: its simulation, its tables, its verdicts, and the command itself at tiny size."""

import gzip
import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from harness.schedulers import ASHA, CandidateSampler, Origin, RandomSearch
from harness.space import Float, Integer, Space
from scripts.bench_schedulers import (
    REGRET_FLOOR,
    RunFile,
    Simulation,
    compare,
    log_regret,
    observations,
    paired,
    read_record,
    regret_after,
    run_time,
)
from scripts.curve_tables import (
    CNN_SPACE,
    DEBERTA_SPACE,
    GROUPS,
    IMAGENET_SPACE,
    TASKSET_SPACE,
    Table,
    TableError,
    load_tables,
    resample,
    synthetic,
    table_names,
)
from tests.conftest import ROOT

SPACE = Space({"x": Float(0.0, 1.0), "k": Integer(1, 9)})


def make_table(values, seconds=None) -> Table:
    configs = [{"x": i / 10, "k": i + 1} for i in range(len(values))]
    return Table("tiny", SPACE, configs, np.array(values, dtype=float), seconds, range(len(values)))


class InOrder:
    """Gives the rows of a table one after another."""

    def __init__(self, table: Table):
        self._configs = iter(table.configs)

    def suggest(self):
        return next(self._configs, None)


def random_search(table: Table) -> RandomSearch:
    return RandomSearch(SPACE.config_space(), "score", mode="max", max_t=table.max_t, searcher=InOrder(table))


def asha(table: Table) -> ASHA:
    return ASHA(SPACE.config_space(), "score", mode="max", max_t=table.max_t, searcher=InOrder(table))


# --- the simulation


def test_one_worker_trains_one_configuration_after_the_other():
    table = make_table([[0.1, 0.3, 0.2], [0.2, 0.25, 0.9]])
    simulation = Simulation(random_search(table), table)
    simulation.run(100)
    assert simulation.improvements == [(1, 0.1), (2, 0.3), (6, 0.9)]
    assert (simulation.epochs, simulation.now, simulation.failures) == (6, 6.0, 0)


def test_workers_report_in_the_order_of_their_ids_and_epochs_count_over_all():
    table = make_table([[0.1, 0.5], [0.2, 0.6], [0.3, 0.4]])
    simulation = Simulation(random_search(table), table, workers=2)
    simulation.run(100)
    assert simulation.improvements == [(1, 0.1), (2, 0.2), (3, 0.5), (4, 0.6)]
    assert (simulation.epochs, simulation.now) == (6, 4.0)


def test_recorded_seconds_order_the_reports():
    table = make_table([[0.1, 0.5], [0.2, 0.6]], seconds=np.array([[5.0, 5.0], [2.0, 2.0]]))
    simulation = Simulation(random_search(table), table, workers=2, in_seconds=True)
    simulation.run(100)
    assert simulation.improvements == [(1, 0.2), (2, 0.6)]
    assert simulation.now == 10.0


def test_a_diverged_configuration_fails_and_its_epoch_counts():
    table = make_table([[0.1, math.nan], [0.2, 0.6]])
    simulation = Simulation(random_search(table), table)
    simulation.run(100)
    assert simulation.improvements == [(1, 0.1), (3, 0.2), (4, 0.6)]
    assert simulation.failures == 1
    assert simulation.scheduler.failed == {0}


def test_asha_promotes_the_better_of_two_and_goes_on_where_it_paused():
    table = make_table([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.2, 0.2, 0.2], [0.3, 0.3, 0.3]])
    simulation = Simulation(asha(table), table)
    simulation.run(4)
    assert simulation.improvements == [(1, 0.1), (2, 0.5), (3, 0.6), (4, 0.7)]
    assert [ask.new for ask in simulation.asks] == [True, True, False]


def test_a_configuration_that_is_not_in_the_table_or_comes_twice_is_an_error():
    table = make_table([[0.1], [0.2]])
    for configs, message in (([{"x": 0.77, "k": 1}], "not in the table"), (table.configs[:1] * 2, "again")):
        scheduler = random_search(table)
        scheduler.searcher = InOrder(Table("t", SPACE, configs, table.values))
        with pytest.raises(RuntimeError, match=message):
            Simulation(scheduler, table).run(10)


class Fake(RandomSearch):
    """Random search that says its suggestions are a model's."""

    def suggest(self):
        suggestion = super().suggest()
        self.origin = Origin("model")
        return suggestion


def test_time_is_measured_right_after_observations_and_with_none_in_between(monkeypatch):
    table = synthetic(1000, n=200, steps=3)
    monkeypatch.setattr(
        "scripts.bench_schedulers.make_scheduler",
        lambda name, table, seed: Fake(table.space.config_space(), "score", mode="max", max_t=3,
                                       searcher=CandidateSampler(table.configs, seed)),
    )  # fmt: skip
    line = run_time("fake", table, 0, 50)
    assert line["observations"] == 50
    assert [len(line[key]) for key in ("refit_wall", "refit_cpu", "idle_wall", "idle_cpu")] == [10] * 4


def test_observations_are_values_at_rung_levels_or_what_the_scheduler_says():
    table = make_table([[0.1, 0.2, 0.3]])
    simulation = Simulation(random_search(table), table)
    simulation.run(3)
    assert observations(simulation.scheduler) == 3
    simulation.scheduler.observations = 17
    assert observations(simulation.scheduler) == 17


# --- regret and verdicts


def test_regret_is_the_distance_to_the_best_of_the_table():
    improvements = [(3, 0.2), (10, 0.75)]
    assert [regret_after(improvements, n) for n in (2, 3, 9, 10)] == [1.0, 0.8, 0.8, 0.25]
    assert log_regret(0.01) == pytest.approx(-2)
    assert log_regret(0.0) == log_regret(REGRET_FLOOR) == pytest.approx(-4)


def test_verdicts():
    zero = [0.0] * 20
    noise = np.random.default_rng(0).normal(0, 1, 20).tolist()
    better = compare([value - 2 for value in noise], zero)
    assert (better.word, compare(zero, [value - 2 for value in noise]).word) == ("beats", "loses")
    assert compare(noise, zero).word == "even"
    assert better.mean == pytest.approx(np.mean(noise) - 2)
    # the percentile interval of a mean of 20 is about 1.96 standard errors to either side
    error = np.std(noise) / math.sqrt(20)
    assert better.high - better.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert compare(noise, zero) == compare(noise, zero)


def test_pairs_are_what_both_have():
    first = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 5.0}
    second = {("a", 0): 0.5, ("b", 0): 5.0, ("b", 1): 7.0}
    pooled, one = paired(first, second), paired(first, second, "a")
    assert pooled is not None
    assert one is not None
    assert (pooled.n, pooled.mean) == (2, 0.25)
    assert (one.n, one.mean) == (1, 0.5)
    assert paired(first, second, "c") is None


def test_the_record_is_read_by_the_rows_of_the_task_file(tmp_path):
    table = Table("taskset-t", SPACE, [], np.array([[0.1, 0.2], [0.5, 0.9]]), rows=[4, 7])
    run = {"task": "FixedTextRNNClassification_imdb_t", "seed": 3, "selected": [[4, 1], [7, 1], [7, 2]]}
    path = tmp_path / "record.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [run, {"hp": [1]}, {**run, "task": "another"}]))
    record = read_record(path, [table], [1, 2, 3, 4])
    assert record[1] == {("taskset-t", 3): pytest.approx(math.log10(0.9))}
    assert record[2] == {("taskset-t", 3): pytest.approx(math.log10(0.5))}
    assert record[3] == {("taskset-t", 3): pytest.approx(-1.0)}
    assert record[4] == {}


# --- the tables


def test_synthetic_tables_are_scaled_repeatable_and_cross():
    table = synthetic(5, n=200)
    assert np.array_equal(table.values, synthetic(5, n=200).values, equal_nan=True)
    assert not np.array_equal(table.values, synthetic(6, n=200).values, equal_nan=True)
    assert (np.nanmin(table.values), np.nanmax(table.values)) == (0.0, 1.0)
    diverged = np.isnan(table.values)
    assert 0 < diverged[:, -1].mean() < 0.2
    assert (diverged[:, 1:] >= diverged[:, :-1]).all()
    early, late = (np.argsort(np.argsort(table.values[~diverged[:, -1], t])) for t in (0, -1))
    assert 0.1 < np.corrcoef(early, late)[0, 1] < 0.9


def test_groups_share_no_table():
    assert not set(GROUPS["dev"]) & set(GROUPS["test"])
    assert table_names("dev,convnext,synthetic-7") == [*GROUPS["dev"], "synthetic-7"]
    with pytest.raises(TableError, match="no table 'nonsense'"):
        table_names("nonsense")


def taskset_entry(losses):
    return {"hp": dict.fromkeys(TASKSET_SPACE, 0.5), "valid": {"loss": losses}}


def test_taskset_is_filtered_and_scaled_as_in_the_record(tmp_path):
    losses = [[math.e**2, math.e], [1.0, math.nan], [math.e, 1.0], [math.e**2, math.e**4]]
    file = tmp_path / "taskset" / "FixedTextRNNClassification_imdb_patch32_GRU128_bs128.json"
    file.parent.mkdir()
    file.write_text(json.dumps([taskset_entry(row) for row in losses]))
    # without the NaN row the 95 % quantiles are e^2 at step 1, beyond e^2 at step 2: rows that reach e^2 go
    (table,) = load_tables(["taskset-patch32_GRU128_bs128"], tmp_path)
    assert list(table.rows) == [2]
    losses[0][0] = math.e
    file.write_text(json.dumps([taskset_entry(row) for row in losses]))
    (table,) = load_tables(["taskset-patch32_GRU128_bs128"], tmp_path)
    assert list(table.rows) == [0, 2]
    assert table.values.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert set(table.configs[0]) == set(TASKSET_SPACE)


def imagenet_entry(epochs, values):
    curve = [{"time": 10.0 * (i + 1), "epoch": i, "top_1": value} for i, value in enumerate(values)]
    return dict.fromkeys(IMAGENET_SPACE, 20) | {"epochs": epochs, "lr": 1.0, "learning_curve": curve}


def test_opda_from_an_archive_steps_are_shares_of_the_training(tmp_path):
    whole = [i / 40 for i in range(1, 41)]
    entries = [imagenet_entry(40, whole), imagenet_entry(20, [0.0, 0.1]), imagenet_entry(30, [])]
    folder = tmp_path / "source" / "opda" / "convnext"
    folder.mkdir(parents=True)
    file = folder / "convnext-tiny_tuning.results.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in entries))
    with tarfile.open(tmp_path / "opda.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "source" / "opda", "opda")
    (table,) = load_tables(["convnext"], tmp_path)
    assert table.values.shape == (3, 20)
    assert table.values[0].tolist() == pytest.approx([i / 20 for i in range(1, 21)])
    assert table.values[1, :2].tolist() == pytest.approx([0.0, 0.1])
    assert np.isnan(table.values[1, 2:]).all()
    assert np.isnan(table.values[2]).all()
    assert table.seconds is not None
    assert table.seconds[0].tolist() == pytest.approx([20.0] * 20)
    assert table.seconds[1].tolist() == pytest.approx([10.0] * 20)
    assert np.isfinite(table.seconds).all()


def test_deberta_uses_the_matched_curve(tmp_path):
    entry = dict.fromkeys(DEBERTA_SPACE, 2) | {"total_model_steps": 6135}
    matched = [[step, step / 1e4] for step in (1000, 2000, 3000, 4000, 5000, 6000, 6135)]
    curves = {"matched": matched, "mismatched": [[step, 0.0] for step, _ in matched]}
    file = tmp_path / "opda" / "deberta" / "deberta-base_tuning.results.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(entry | {"learning_curves": curves}))
    (table,) = load_tables(["deberta-base"], tmp_path)
    assert table.values[0].tolist() == pytest.approx([0.0, *[i * 1000 / 5135 for i in range(1, 5)], 1.0])
    assert table.seconds is None


def test_resampling_never_looks_ahead():
    assert resample([1.0, 2.0, 3.0, 4.0], [0.2, 0.4, 0.9, 1.0], [1, 2, 3, 4], 2) == ([2.0, 4.0], [2.0, 4.0])
    values, _ = resample([1.0, 2.0], [0.6, 1.0], [1, 2], 2)
    assert all(math.isnan(value) for value in values)  # the first half has no evaluation


def test_cnn_errors_are_minimised(tmp_path):
    folder = tmp_path / "cnn-cifar10-curves"
    folder.mkdir()
    lines = [{"config": dict.fromkeys(CNN_SPACE, 5.0), "learning_curve": curve, "time_steps": [3.0, 5.0]}
             for curve in ([0.9, 0.5], [0.7, 0.1])]  # fmt: skip
    content = "\n".join(json.dumps(line) for line in lines).encode()
    (folder / "configs_0_255.jsonl.gz").write_bytes(gzip.compress(content))
    (table,) = load_tables(["cnn-cifar10"], tmp_path)
    assert table.values.ravel().tolist() == pytest.approx([0.0, 0.5, 0.25, 1.0])
    assert table.seconds is not None
    assert table.seconds.tolist() == [[3.0, 2.0], [3.0, 2.0]]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(TableError, match="neither opda/convnext"):
        load_tables(["convnext"], tmp_path)
    folder = tmp_path / "cnn-cifar10-curves"
    folder.mkdir()
    (folder / "configs_0_255.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(TableError, match="cnn-cifar10"):
        load_tables(["cnn-cifar10"], tmp_path)


# --- the file and the command


def test_the_file_drops_a_torn_line_and_finds_longer_runs(tmp_path):
    path = tmp_path / "runs.jsonl"
    file = RunFile(path)
    file.add({"scheduler": "asha", "seed": 0, "epochs": 100})
    with path.open("a") as torn:
        torn.write('{"scheduler": "as')
    file = RunFile(path)
    file.add({"scheduler": "asha", "seed": 1, "epochs": 100})
    file = RunFile(path)
    assert [line["seed"] for line in file.lines] == [0, 1]
    assert file.find(scheduler="asha", seed=0, epochs=50) is not None
    assert file.find(scheduler="asha", seed=0, epochs=200) is None


def bench(*words, environment):
    command = [sys.executable, str(ROOT / "scripts" / "bench_schedulers.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_prints_regrets_and_verdicts_and_continues(tmp_path, environment):
    out = tmp_path / "runs.jsonl"
    words = ["--tables", "synthetic-3", "--schedulers", "random,asha", "--epochs", "20,40", "--out", str(out)]
    done = bench(*words, "--seeds", "0..1", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "asha against random" in done.stdout
    assert "n = 2 pairs" in done.stdout
    first = out.read_text()
    done = bench(*words, "--seeds", "0..2", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith(first)
    assert len(out.read_text().splitlines()) == 6
    result = json.loads(done.stdout)
    assert len(result["regrets"]) == 6
    assert {verdict["n"] for verdict in result["verdicts"]} == {3}


@pytest.mark.parametrize(
    "words",
    [("--tables", "nonsense"), ("--tables", "convnext"), ("--schedulers", "best"), ("--seeds", "3..1"),
     ("--epochs", "0"), ("--tables", "synthetic-3", "--seconds"), ("--workers", "x")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(words, environment):
    done = bench(*words, environment=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
