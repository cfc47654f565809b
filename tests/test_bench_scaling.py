"""scripts/bench_scaling.py: its models, its gradients, what it prints and draws."""

import csv
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from harness.ohgw import lookahead, lookahead_objective
from harness.ohgw.coordinates import Coordinate
from scripts import bench_scaling
from tests.test_scripts import run

OPTIONS = Namespace(millions=[0.03], batch_size=2, rung_examples=100, repeats=2, device="cpu")


@pytest.mark.parametrize("millions", [0.3, 1, 3, 10, 30])
def test_models_have_the_size_asked_for(millions):
    parameters = sum(w.numel() for w in bench_scaling.build(millions, torch.device("meta")).parameters())
    assert parameters == pytest.approx(1e6 * millions, rel=0.1)


@pytest.mark.parametrize("millions", [100, 300])
def test_large_shapes_have_the_size_asked_for(millions):
    width, depth = bench_scaling.shape(millions)
    parameters = 12 * depth * width**2 + 13 * depth * width + bench_scaling.VOCABULARY * width
    assert parameters == pytest.approx(1e6 * millions, rel=0.1)


def test_the_gradient_is_that_of_the_objective_in_float64():
    p = bench_scaling.problem(bench_scaling.build(0.03, torch.device("cpu")).double(), 2, torch.device("cpu"))
    space = {name: Coordinate(domain) for name, domain in bench_scaling.SPACE.continuous.items()}
    gradient = lookahead(p, bench_scaling.CONFIG, p.draw(0), space).gradient
    for name, coordinate in space.items():
        psi, h = coordinate.psi(bench_scaling.CONFIG[name]), 1e-5 * coordinate.width
        ends = [{**bench_scaling.CONFIG, name: coordinate.value(psi + d)} for d in (h, -h)]
        above, below = (lookahead_objective(p, end, p.draw(0)) for end in ends)
        assert gradient[name] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-9), name


def test_the_table_of_models_and_its_files(tmp_path, capsys):
    rows = list(bench_scaling.bench_models(OPTIONS))
    bench_scaling.write(rows, tmp_path)
    printed = capsys.readouterr().out
    for what in bench_scaling.MOVED:
        assert f"  {what} " in printed
    with open(tmp_path / "scaling.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 2 + 5 * len(bench_scaling.MOVED)
    assert all(0 < float(row["least"]) <= float(row["median"]) <= float(row["most"]) for row in table)
    steps = {row["what"]: float(row["median"]) for row in table if row["measure"] == "peak memory over a step's"}
    assert steps["+ embedding noise"] > steps["lr, wd, momentum"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert (tmp_path / "scaling.pdf").exists()


def test_a_model_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench_scaling, "available", lambda device: 1e6)
    assert list(bench_scaling.bench_models(OPTIONS)) == []
    assert "0.03 M: left out, needs about" in capsys.readouterr().out


def test_the_memory_estimate_grows_with_model_and_batch():
    assert (
        bench_scaling.bytes_needed(3, 8) > bench_scaling.bytes_needed(1, 8) > bench_scaling.bytes_needed(1, 2) > 3.2e7
    )
    assert bench_scaling.available(torch.device("cpu")) > 1e8


@pytest.mark.slow
def test_workers(environment, tmp_path: Path):
    words = ["--parts", "workers", "--workers", "1,4", "--seeds", "2", "--epochs", "4", "--out", str(tmp_path)]
    output = run("bench_scaling.py", *words, environment=environment)
    assert "4 workers: warm starts take" in output
    with open(tmp_path / "scaling.csv") as file:
        shares = [
            float(row["median"]) for row in csv.DictReader(file) if row["unit"] == "%" and "share" in row["measure"]
        ]
    assert len(shares) == 2
    assert all(0 < share < 100 for share in shares)
