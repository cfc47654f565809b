"""One cluster for all tests in this folder; each leaves it without jobs."""

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if (why := missing()) is not None:
        pytest.skip(f"a Slurm cluster {why}")
    cluster = Cluster(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster without jobs whose commands work in this process and those it starts."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(running_cluster.conf))
    yield running_cluster
    running_cluster.clear()
