"""Real worker processes, shared where a test does not break them."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from backends.function_backend import FunctionBackend, Status
from backends.pool import WorkerPool

FUNCTIONS = "tests.backends.functions"


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Two warm workers."""
    with WorkerPool(2, threads=1, stop_grace=1.0) as pool:
        yield pool


def follow(
    backend: FunctionBackend, trial_ids: list[int], until: Callable[[dict[int, str], list], Any], seconds: float = 30
):
    """Fetch as the Tuner does until ``until(statuses, results)``; returns both."""
    results: list[tuple[int, dict[str, Any]]] = []
    statuses: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status, new = backend.fetch_status_results(trial_ids)
        statuses.update({trial_id: state for trial_id, (_, state) in status.items()})
        results += new
        if until(statuses, results):
            return statuses, results
    raise AssertionError(f"waited in vain: {statuses}, {results}, {[backend.failure(k) for k in trial_ids]}")


def finish(backend: FunctionBackend, trial_ids: list[int], seconds: float = 30):
    """Follow the trials to their end; statuses, and the reports of each."""
    statuses, results = follow(
        backend, trial_ids, lambda status, _: all(status[k] != Status.in_progress for k in trial_ids), seconds
    )
    return statuses, {k: [report for trial_id, report in results if trial_id == k] for k in trial_ids}


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def epochs(reports: list[dict[str, Any]]) -> list[int]:
    return [report["epoch"] for report in reports]


def own_children() -> list[int]:
    """Processes this one has started and that are alive."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and is_alive(int(entry)):
            with open(f"/proc/{entry}/stat") as file:
                if int(file.read().rsplit(")", 1)[1].split()[1]) == os.getpid():
                    found.append(int(entry))
    return found
