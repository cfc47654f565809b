"""The cluster that the tests of Slurm run on does what they take for granted."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.conftest import wait_until
from tests.conftest import ROOT
from tests.slurm.cluster import Cluster, ClusterError


def command_line(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "slurm" / "cluster.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_needs_no_slurm():
    done = command_line("--help")
    assert done.returncode == 0
    assert "revive DIR" in done.stdout


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder with somebody's file, its path short enough for a cluster's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "thesis.tex").touch()
        yield Path(folder)
        assert os.listdir(folder) == ["thesis.tex"]


def test_a_folder_that_holds_no_cluster_is_not_removed(foreign):
    done = command_line("down", str(foreign))
    assert done.returncode == 2
    assert "there is no cluster in" in done.stderr


def test_a_folder_that_holds_something_else_is_not_used(foreign, monkeypatch):
    monkeypatch.setattr("tests.slurm.cluster.missing", lambda: None)
    with pytest.raises(ClusterError, match="holds something else"):
        Cluster(foreign).up()


@pytest.mark.slurm
def test_a_job_has_the_gpus_of_its_node_and_a_row_of_accounting(cluster, tmp_path):
    log = tmp_path / "log"
    command = ["--wrap", "echo $CUDA_VISIBLE_DEVICES $SLURMD_NODENAME", f"--output={log}", "--mem=100M"]
    job = cluster.run("sbatch", "--parsable", "--gres=gpu:4", *command).strip()
    asked = ("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,AllocTRES")
    wait_until(lambda: "COMPLETED" in cluster.run(*asked), 60)
    assert "gres/gpu=4" in cluster.run(*asked)
    devices, node = log.read_text().split()
    assert devices == "0,1,2,3"
    assert node in cluster.nodes
