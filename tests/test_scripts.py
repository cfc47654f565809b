"""The scripts that print the project's figures still run (small), and print them."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*words: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, f"scripts/{words[0]}", *words[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
@pytest.mark.slow
def test_help(script, environment):
    assert "usage" in run(script, "--help", environment=environment)


@pytest.mark.slow
def test_bench_sweep(environment):
    output = run("bench_sweep.py", "--trials", "3", "--repeats", "1", "--skip-local", environment=environment)
    assert "over pure training" in output


@pytest.mark.slow
def test_bench_simulator(environment):
    output = run("bench_simulator.py", "--cells", "2", "--epochs", "40", environment=environment)
    assert "Syne Tune's simulator" in output
    assert "cells a minute" in output


@pytest.mark.slow
def test_bench_report(environment, tmp_path):
    words = ["--cells", "12", "--events", "60", "--repeats", "1", "--keep", str(tmp_path)]
    output = run("bench_report.py", *words, environment=environment)
    assert "load and report (the whole command): median" in output
    assert (tmp_path / "synthetic-12x60" / "report" / "index.html").exists()


@pytest.mark.slow
def test_bench_trial_start(environment):
    output = run("bench_trial_start.py", "--trials", "1", environment=environment)
    assert "local / pool" in output


@pytest.mark.slow
def test_bench_warm_start(environment):
    words = ["--task", "digits", "--model", "cnn", "--batch-size", "32", "--repeats", "1"]
    assert "lookahead: + augmentation" in run("bench_warm_start.py", *words, environment=environment)


@pytest.mark.slow
def test_bench_train(environment):
    words = ["task=digits", "--steps", "3", "--untimed", "1", "--repeats", "1", "--loader-workers", "0"]
    output = run("bench_train.py", *words, environment=environment)
    assert "ours fp32 / usual fp32" in output
    assert "images a second" in output


@pytest.mark.slow
@pytest.mark.parametrize("words", [["task=cifar10"], ["task=nosuch"], ["task=digits", "--data-dir", "x"]])
def test_bench_train_answers_mistakes_in_one_line(words, environment):
    command = [sys.executable, "scripts/bench_train.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
