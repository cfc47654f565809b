"""The script that prints what Slurm costs still runs (small), and prints it."""

import pytest

from tests.test_scripts import run


@pytest.mark.slurm
def test_bench_slurm(cluster, environment, tmp_path):
    small = ["--trials", "1", "--many", "4", "--workers", "4", "--seconds", "6", "--epoch", "1", "--cells", "1"]
    output = run("bench_slurm.py", *small, "--folder", str(tmp_path), environment=environment)
    assert "one sbatch per trial" in output
    assert "driver's CPU share of one core" in output
    assert "cells a minute" in output
