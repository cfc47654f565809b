"""LocalTrialBackend: a process a trial, with the pool's guarantees."""

import os
import time

import pytest

from backends.context import RestoredTrial, UserError
from backends.function_backend import Status
from backends.local import LocalTrialBackend
from backends.pool import PoolBackend
from tests.backends.conftest import FUNCTIONS, epochs, finish, follow, is_alive, wait_until

pytestmark = pytest.mark.slow  # a process and an import of torch for every attempt


@pytest.fixture
def local(tmp_path):
    """``local("function", ...)`` in a folder whose name has spaces; what still runs is killed at the end."""
    backends: list[LocalTrialBackend] = []

    def make(function: str, **options) -> LocalTrialBackend:
        path = tmp_path / "a path with spaces"
        backends.append(LocalTrialBackend(f"{FUNCTIONS}.{function}", path=path, threads=1, stop_grace=3.0, **options))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def test_same_reports_as_the_pool(local, pool, tmp_path):
    for function, config in (("report_only", {"epochs": 5, "x": 1.0}), ("stochastic", {})):
        by_local = local(function, seed=3)
        by_local.start_trial(config)
        by_pool = PoolBackend(f"{FUNCTIONS}.{function}", pool=pool, path=tmp_path / function, seed=3)
        by_pool.start_trial(config)
        statuses, reports = finish(by_local, [0])
        assert statuses == {0: Status.completed}, by_local.failure(0)
        expected = finish(by_pool, [0])[1][0]
        timeless = [{k: v for k, v in r.items() if not k.startswith("st_worker_time")} for r in reports[0]]
        assert str(timeless) == str(
            [{k: v for k, v in r.items() if not k.startswith("st_worker_time")} for r in expected]
        )


@pytest.mark.parametrize(
    ("how", "reason"),
    [("diverge", "loss is nan at epoch 2"), ("raise", "typo in the trial function"), ("exit", "Exit: 3")],
)
def test_a_failing_trial_says_why(local, how, reason):
    b = local("misbehaves")
    b.start_trial({"how": how})
    statuses, reports = finish(b, [0])
    assert statuses == {0: Status.failed}
    assert epochs(reports[0]) == [1]
    assert reason in b.failure(0)
    assert reason in "".join(b.stderr(0))


def test_killed_process_is_replaced_and_the_trial_goes_on(local):
    events: list[dict] = []
    b = local("repeats_epochs")
    b.on_event = events.append
    b.start_trial({})
    statuses, reports = finish(b, [0], 60)
    assert statuses == {0: Status.completed}
    assert epochs(reports[0]) == [1, 2, 3, 4, 5, 6]
    assert [e["e"] for e in events] == ["retry"]
    assert "SIGKILL" in events[0]["reason"]


def test_pause_resume_and_restore(local):
    b = local("overruns")
    b.start_trial({})
    _, results = follow(b, [0], lambda _, results: len(results) >= 2)
    b.pause_trial(0, results[0][1])
    assert epochs(b._trial_dict[0].metrics) == [1]
    b.resume_trial(0)
    _, reports = finish(b, [0])
    assert epochs(reports[0]) == [2, 3, 4, 5, 6, 7, 8]
    again = local("overruns", run=2)
    again.restore([RestoredTrial(0, {}, [{"epoch": k} for k in range(1, 7)], "paused")])
    again.resume_trial(0)
    _, reports = finish(again, [0])
    assert epochs(reports[0]) == [7, 8]


def test_stop_is_quick_and_a_stubborn_trial_is_killed(local):
    b = local("batches")
    b.start_trial({})
    b.set_entrypoint(f"{FUNCTIONS}.stubborn")
    b.start_trial({})
    _, results = follow(b, [0, 1], lambda _, results: len(results) == 2)
    reports = dict(results)
    process = b._processes[0].process
    b.stop_trial(0, reports[0])
    assert process.wait(timeout=20) == 0, "it returned by itself"
    started = time.perf_counter()
    b.stop_all()
    assert 3.0 <= time.perf_counter() - started < 10
    assert not is_alive(reports[1]["pid"])
    wait_until(lambda: not is_alive(reports[1]["child"]))
    assert b.busy_trial_ids() == []


def test_environment_of_a_trial(local, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    b = local("environment", settings={"a": 1})
    b.start_trial({})
    report = finish(b, [0])[1][0][0]
    assert report["threads"]["OMP_NUM_THREADS"] == "1"
    assert (report["settings"], report["device"], report["directory"]) == ({"a": 1}, "cpu", os.getcwd())


def test_prepare(local, tmp_path):
    b = local("count")
    b.prepare(f"{FUNCTIONS}.prepare", {"file": str(tmp_path / "file")})
    assert "cpu" in (tmp_path / "file").read_text()
    with pytest.raises(UserError, match=r"^no data here: fetch it with `fetch`$"):
        b.prepare(f"{FUNCTIONS}.prepare_without_data", {})
    with pytest.raises(UserError, match="ZeroDivisionError"):
        b.prepare(f"{FUNCTIONS}.prepare_broken", {})
