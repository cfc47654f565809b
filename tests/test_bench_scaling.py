"""The bench of scaling: its models, their hyper-gradient, what it prints and writes, and what it leaves out."""

import csv
import json
import math
import os
import re

import pytest
import torch

from backends.curve_store import Row
from harness.ohgw import finite_difference, lookahead, lookahead_objective, peak_memory
from harness.ohgw.coordinates import Coordinate
from scripts import bench_scaling
from scripts.bench_scaling import (
    CONFIG,
    MASKS,
    SPACE,
    STEP,
    Shape,
    Skipped,
    available_memory,
    main,
    measure_model,
    one_warm_start,
    synthetic_problem,
    training_step,
    transformer,
)

CPU = torch.device("cpu")
TINY = ["--batch-size", "4", "--tokens", "8", "--device", "cpu"]


def rows_of(folder):
    with open(folder / "scaling.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("millions", [0.002, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000])
@pytest.mark.parametrize("tokens", [8, 16, 128])
def test_a_shape_has_about_the_parameters_asked_for(millions, tokens):
    shape = Shape.of_size(1e6 * millions, tokens)
    if 1e6 * millions > 50 * (bench_scaling.VOCABULARY + tokens):  # else one unit of width is more than that
        assert shape.parameters == pytest.approx(1e6 * millions, rel=0.1)
    with torch.device("meta"):
        model = bench_scaling.Transformer(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_the_hyper_gradient_is_that_of_finite_differences():
    problem = synthetic_problem(transformer(Shape(2, 2, 8, 6), CPU, torch.float64), batch_size=3)
    with torch.no_grad():  # at its own scale the initial network hardly responds to anything
        for p in problem.model.parameters():
            if p.dim() > 1:
                p.mul_(15.0)
    config, batches = {**CONFIG, "lr": 0.05, "noise": 0.7}, problem.draw(0)
    coordinates = {name: Coordinate(domain) for name, domain in SPACE.continuous.items()}
    found = lookahead(problem, config, batches, coordinates)
    expected = finite_difference(lambda x: lookahead_objective(problem, x, batches), config, coordinates, h=1e-5)
    assert found.loss == expected.loss
    assert min(abs(value) for value in found.gradient.values()) > 1e-7  # nothing is compared with zero
    assert found.gradient == pytest.approx(expected.gradient, rel=1e-5)


def test_a_training_step_changes_no_weight_and_no_global_generator():
    state = torch.get_rng_state()
    problem = synthetic_problem(transformer(Shape(1, 1, 8, 4), CPU), batch_size=2)
    before = [p.clone() for p in problem.model.parameters()]
    step = training_step(problem)
    step()
    step()
    assert all(torch.equal(a, b) for a, b in zip(before, problem.model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("millions", "batch_size", "tokens"), [(0.01, 4, 8), (0.03, 32, 16), (0.3, 4, 64), (1, 1, 4)])
def test_the_memory_needed_is_not_underestimated_nor_far_off(millions, batch_size, tokens):
    shape = Shape.of_size(1e6 * millions, tokens)
    problem = synthetic_problem(transformer(shape, CPU), batch_size)
    training_step(problem)()
    both = 2 * 4 * shape.parameters  # weights and momentum
    held = both + max(peak_memory(one_warm_start(problem, mask, batch_size), CPU) for mask in MASKS.values())
    assert held <= shape.memory(batch_size) <= 3 * held


def test_models_are_measured_printed_written_and_drawn(tmp_path, capsys):
    main(["--parts", "models", "--millions", ".01,.03", "--repeats", "2", *TINY, "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "n = 2" in output
    assert "11250 steps (45000 examples)" in output
    rows = rows_of(tmp_path / "out")
    sizes = sorted({int(row["parameters"]) for row in rows})
    assert sizes == pytest.approx([1e4, 3e4], rel=0.1)
    assert {row["series"] for row in rows} == {STEP, *MASKS}
    assert len(rows) == 2 * (3 + len(MASKS) * 7)
    for row in rows:
        low, median, high = (float(row[name]) for name in ("min", "median", "max"))
        assert 0 < low <= median <= high < math.inf
        assert row["n"] == ("2" if row["quantity"].startswith(("time", "share")) else "1")
    assert all(re.search(rf"^  {re.escape(name)} +[\d.e-]+ \[", output, re.MULTILINE) for name in MASKS)
    for name, start in (("scaling.png", b"\x89PNG"), ("scaling.pdf", b"%PDF")):
        assert (tmp_path / "out" / name).read_bytes().startswith(start)
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert len(written["rows"]) == len(rows)
    assert written["skipped"] == []


def test_more_coordinates_take_more_operations():
    rows = measure_model(Shape.of_size(3e4, 8), batch_size=4, repeats=1, steps=10, device=CPU)
    flops = {row.series: row.median for row in rows if row.quantity == "operations"}
    assert list(flops) == [STEP, *MASKS]
    assert sorted(flops.values()) == list(flops.values())
    assert flops["lr, wd, momentum"] == pytest.approx(2 * flops[STEP], rel=0.3)
    over = {row.series: row for row in rows if row.quantity == "time over a training step's"}
    for row in rows:
        if row.quantity == "share of the first rung":
            ratio = over[row.series].values[0]
            assert row.values == [pytest.approx(100 * ratio / (ratio + 10))]


def test_what_does_not_fit_is_left_out_and_said(tmp_path, capsys, monkeypatch):
    free = Shape.of_size(1e4, 8).memory(4) / bench_scaling.MEMORY_SHARE + 1
    monkeypatch.setattr(bench_scaling, "available_memory", lambda device: int(free))
    main(["--parts", "models", "--millions", ".01,300", "--repeats", "1", *TINY, "--out", str(tmp_path)])
    assert "300 M parameters: left out, about" in capsys.readouterr().out
    assert len({row["parameters"] for row in rows_of(tmp_path)}) == 1
    assert len(json.loads((tmp_path / "scaling.json").read_text())["skipped"]) == 1


def test_nothing_that_fits_is_no_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_scaling, "available_memory", lambda device: 1000)
    main(["--parts", "models", "--millions", ".01", *TINY, "--out", str(tmp_path)])
    assert "nothing to draw" in capsys.readouterr().out
    assert rows_of(tmp_path) == []


def test_running_out_of_memory_is_a_reason_and_other_errors_are_raised(monkeypatch):
    def out_of_memory(*arguments):
        torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error

    monkeypatch.setattr(bench_scaling, "_measure_model", out_of_memory)
    with pytest.raises(Skipped, match="out of memory"):
        measure_model(Shape(1, 1, 8, 4), 1, 1, 1, CPU)
    monkeypatch.setattr(bench_scaling, "_measure_model", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        measure_model(Shape(1, 1, 8, 4), 1, 1, 1, CPU)


def test_a_fallback_is_not_measured():
    problem = synthetic_problem(transformer(Shape(1, 1, 8, 4), CPU), batch_size=2)
    with torch.no_grad():
        problem.model.get_parameter("norm.bias").fill_(math.nan)
    with pytest.raises(RuntimeError, match="not what was to be measured"):
        one_warm_start(problem, (), 2)()


def test_free_memory_is_between_nothing_and_the_machine():
    assert 2**20 < available_memory(CPU) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "modles"], "possible: models, workers"),
        (["--millions", "0"], "at least 0.002"),
        (["--workers", "0"], "not positive"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_mistakes_are_answered(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def summary(wallclock, warm, train):
    share = {"busy": warm / (warm + train)}
    busy = {"warm_start": warm, "train": train}
    return {"busy": busy, "epochs": 10, "wallclock": wallclock, "trials": 3, "warm_start_share": share}


def test_shares_and_delays_of_workers_are_in_pairs():
    off = [summary(10, 0, 40), summary(20, 0, 60)]
    on = [summary(12, 10, 40), summary(18, 20, 60)]
    free = [summary(10, 0, 40), summary(15, 0, 60)]
    of = {(row.series, row.quantity): row.values for row in bench_scaling.worker_rows(4, off, on, free)}
    assert of["on", bench_scaling.BUSY_SHARE] == [20.0, 25.0]
    assert of["on", bench_scaling.HELD_SHARE] == pytest.approx([1000 / 48, 2000 / 72])
    assert of["on / off", "virtual wall-clock"] == [1.2, 0.9]
    assert of["on / off", "training time of an epoch"] == [1.0, 1.0]
    assert of["on / on in 0 s", "virtual wall-clock"] == [1.2, 1.2]


def test_a_store_of_free_warm_starts_keeps_all_other_seconds(tmp_path):
    report = Row({"epoch": 1, "busy": {"warm_start": 2.0, "train": 3.0}})
    failure = Row(None, failure="diverged", details={"busy": {"warm_start": 1.0, "train": 0.5}})
    with bench_scaling.FreeWarmStarts(tmp_path / "free.sqlite") as store:
        store.put({"key": 1}, {}, [report])
        store.append(store.curve({"key": 1}), failure)
        ((_, _, rows),) = store.export()
    assert rows[0].report == {"epoch": 1, "busy": {"warm_start": 0.0, "train": 3.0}}
    assert rows[1].details == {"busy": {"warm_start": 0.0, "train": 0.5}}
    assert rows[1].failure == "diverged"


@pytest.mark.slow
def test_workers_are_simulated_printed_and_drawn(tmp_path, capsys):
    words = ["--workers", "1,3", "--seeds", "2", "--epochs-per-worker", "4", "--out", str(tmp_path)]
    main(["--parts", "workers", *words])
    assert "W = 3 over W = 1 in pairs of a seed" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert {row["workers"] for row in rows} == {"1", "3"}
    assert {row["n"] for row in rows} == {"2"}
    delays = [row for row in rows if row["series"] == "on / on in 0 s"]
    assert len(delays) == 2
    assert all(float(row["min"]) > 1.0 for row in delays if row["workers"] == "1")  # nothing but warm starts between
    for row in rows:
        assert 0 < float(row["min"]) <= float(row["median"]) <= float(row["max"])
        if row["unit"] == "%":
            assert float(row["max"]) < 100
    assert (tmp_path / "scaling.png").exists()
