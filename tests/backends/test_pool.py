"""PoolBackend on real worker processes."""

import os
import signal
import time
from multiprocessing.connection import Client

import pytest

from backends.context import RestoredTrial, UserError, checkpoint_files, reports_before
from backends.function_backend import WAIT, Status
from backends.pool import PoolBackend, PoolError, WorkerPool
from tests.backends.conftest import FUNCTIONS, epochs, finish, follow, is_alive, wait_until


def backend(pool: WorkerPool, function: str, path, **options) -> PoolBackend:
    return PoolBackend(f"{FUNCTIONS}.{function}", pool=pool, path=path, **options)


def test_reports_arrive_once_in_order_before_the_end(pool, tmp_path):
    b = backend(pool, "report_only", tmp_path, seed=5)
    for x in (1.0, 2.0):
        b.start_trial({"epochs": 20, "x": x})
    statuses, reports = finish(b, [0, 1])
    assert statuses == {0: Status.completed, 1: Status.completed}
    assert epochs(reports[0]) == epochs(reports[1]) == list(range(1, 21))
    assert [r["st_worker_iter"] for r in reports[0]] == list(range(20))
    assert reports[0][3]["loss"] == 0.25
    assert reports[0][0]["seed"] != reports[1][0]["seed"]
    assert reports[0][0]["more"]["none"] is None
    assert b._trial_dict[0].metrics == reports[0]


def test_more_trials_than_workers_are_queued(pool, tmp_path):
    b = backend(pool, "report_only", tmp_path)
    for _ in range(7):
        b.start_trial({"epochs": 2, "x": 1.0, "sleep": 0.05})
    assert len(b.busy_trial_ids()) == 7
    statuses, reports = finish(b, list(range(7)))
    assert set(statuses.values()) == {Status.completed}
    assert all(epochs(r) == [1, 2] for r in reports.values())
    assert b.busy_trial_ids() == []


def test_fetching_for_nobody_does_not_block(pool, tmp_path):
    b = backend(pool, "report_only", tmp_path)
    pool.wait_ready()
    took = []
    for _ in range(5):
        started = time.perf_counter()
        assert b.fetch_status_results([]) == ({}, [])
        took.append(time.perf_counter() - started)
    assert min(took) < WAIT, "the others may have waited for a core"


def test_fetching_blocks_while_nothing_happens_but_not_for_long(pool, tmp_path):
    b = backend(pool, "report_only", tmp_path)
    b.start_trial({"epochs": 1, "x": 1.0, "sleep": 5})
    pool.wait_ready()
    b.fetch_status_results([0])
    started = time.perf_counter()
    assert b.fetch_status_results([0])[1] == []
    assert WAIT / 2 < time.perf_counter() - started < 4  # the report comes after 5 s
    b.stop_all()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("diverge", "loss is nan at epoch 2"),
        ("raise", "typo in the trial function"),
        ("exit", "SystemExit: 3"),
        ("memory", "MemoryError"),
        ("torch_memory", "allocate memory"),
        ("unjsonable", "not JSON-able"),
    ],
)
def test_a_failing_trial_fails_alone(pool, tmp_path, how, reason):
    workers = {info["pid"] for info in pool.info()}
    b = backend(pool, "misbehaves", tmp_path)
    b.start_trial({"how": how})
    b.start_trial({"how": "nothing"})
    statuses, reports = finish(b, [0, 1])
    assert statuses == {0: Status.failed, 1: Status.completed}
    assert epochs(reports[0]) == [1]
    assert reason in b.failure(0)
    assert reason in "".join(b.stderr(0))
    assert {info["pid"] for info in pool.info()} == workers, "on a CPU the worker lives on"


def test_a_trial_without_a_report_has_failed(pool, tmp_path):
    b = backend(pool, "silent", tmp_path)
    b.start_trial({})
    assert finish(b, [0])[0] == {0: Status.failed}
    assert "without a single report" in b.failure(0)


@pytest.mark.parametrize("function", ["no.such.module.train", f"{FUNCTIONS}.absent"])
def test_a_function_that_does_not_exist(pool, tmp_path, function):
    b = PoolBackend(function, pool=pool, path=tmp_path)
    b.start_trial({})
    assert finish(b, [0])[0] == {0: Status.failed}
    assert function.rpartition(".")[2] in b.failure(0)


@pytest.mark.parametrize("function", ["train", "__main__.train", "my module.train", ""])
def test_a_function_no_other_process_could_import(pool, function):
    with pytest.raises(UserError, match="dotted name"):
        PoolBackend(function, pool=pool)


def test_stop_in_the_middle_of_an_epoch_is_quick(pool, tmp_path):
    b = backend(pool, "batches", tmp_path)
    b.start_trial({})
    _, results = follow(b, [0], lambda _, results: results)
    started = time.perf_counter()
    b.stop_trial(0, results[0][1])
    assert b.fetch_status_results([0])[0][0][1] == Status.stopped
    b.stop_all()
    assert b.busy_trial_ids() == []
    assert time.perf_counter() - started < pool.stop_grace
    assert is_alive(results[0][1]["pid"]), "the worker is used again"


def test_pause_and_resume(pool, tmp_path):
    b = backend(pool, "count", tmp_path)
    b.start_trial({"epochs": 2, "x": 1.0})
    statuses, reports = finish(b, [0])
    b.pause_trial(0, reports[0][-1])  # as the Tuner does, also to a trial that has completed
    assert b._trial_dict[0].status == Status.paused
    b.resume_trial(0, {"epochs": 5, "x": 1.0})
    statuses, more = finish(b, [0])
    assert statuses == {0: Status.completed}
    assert epochs(more[0]) == [3, 4, 5]
    assert {r["attempt"] for r in more[0]} == {"0001-0002"}
    assert [r["st_worker_iter"] for r in b._trial_dict[0].metrics] == list(range(5))


def test_what_a_paused_trial_did_too_much_is_delivered_after_the_resume(pool, tmp_path):
    b = backend(pool, "overruns", tmp_path)
    b.start_trial({})
    _, results = follow(b, [0], lambda _, results: len(results) >= 3)
    second = results[1][1]
    b.pause_trial(0, second)  # the scheduler looked at the second report only
    while b.busy_trial_ids():
        time.sleep(0.01)
    assert epochs(b._trial_dict[0].metrics) == [1, 2]
    b.resume_trial(0)
    _, reports = finish(b, [0])
    assert epochs(reports[0]) == [3, 4, 5, 6, 7, 8]


def test_stubborn_trial_is_killed_and_its_worker_replaced(pool, tmp_path):
    b = backend(pool, "stubborn", tmp_path)
    b.start_trial({})
    _, results = follow(b, [0], lambda _, results: results)
    report = results[0][1]
    started = time.perf_counter()
    b.pause_trial(0, report)
    b.set_entrypoint(f"{FUNCTIONS}.report_only")
    b.resume_trial(0, {"epochs": 3, "x": 1.0})  # has to wait for the end of the first attempt
    statuses, reports = finish(b, [0])
    assert statuses == {0: Status.completed}
    assert epochs(reports[0]) == [2, 3], "report 0 was delivered before"
    assert pool.stop_grace <= time.perf_counter() - started < 20
    wait_until(lambda: not is_alive(report["pid"]) and not is_alive(report["child"]))
    pool.wait_ready()
    assert len(pool.info()) == 2
    assert b.failure(0) == "", "nothing went wrong as far as the trial is concerned"


def test_killed_worker_is_replaced_and_the_trial_goes_on(pool, tmp_path):
    events: list[dict] = []
    b = backend(pool, "dies_once", tmp_path)
    b.on_event = events.append
    b.start_trial({})
    statuses, reports = finish(b, [0])
    assert statuses == {0: Status.completed}
    assert epochs(reports[0]) == [1, 2, 3, 4, 5, 6]
    assert [r["attempt"] for r in reports[0]] == ["0001-0001"] * 3 + ["0001-0002"] * 3
    assert [(e["e"], e["trial"], e["attempt"]) for e in events] == [("retry", 0, "0001-0001")]
    assert "SIGKILL" in events[0]["reason"]


def test_repeated_epochs_are_not_reported_twice(pool, tmp_path):
    b = backend(pool, "repeats_epochs", tmp_path)
    b.start_trial({})
    statuses, reports = finish(b, [0])
    assert statuses == {0: Status.completed}
    assert epochs(reports[0]) == [1, 2, 3, 4, 5, 6]


def test_a_trial_that_keeps_killing_workers_fails(pool, tmp_path):
    b = backend(pool, "always_dies", tmp_path, max_retries=1)
    b.start_trial({})
    assert finish(b, [0])[0] == {0: Status.failed}
    assert "SIGKILL" in b.failure(0)
    assert "after 1 retries" in b.failure(0)
    pool.wait_ready()


def test_reused_worker_gives_bit_for_bit_what_a_fresh_one_gives(tmp_path):
    with WorkerPool(1, threads=1) as fresh:
        b = backend(fresh, "stochastic", tmp_path / "fresh", seed=1)
        b.start_trial({})
        expected = losses(finish(b, [0])[1][0])
        b = backend(fresh, "spoils", tmp_path / "spoils")
        b.start_trial({})
        assert finish(b, [0])[0] == {0: Status.completed}, b.failure(0)
        b = backend(fresh, "misbehaves", tmp_path / "fails")
        b.start_trial({"how": "raise"})
        finish(b, [0])
        b = backend(fresh, "environment", tmp_path / "environment")
        b.start_trial({})
        report = finish(b, [0])[1][0][0]
        assert (report["directory"], report["spoilt"]) == (os.getcwd(), None)
        b = backend(fresh, "stochastic", tmp_path / "reused", seed=1)
        b.start_trial({})
        assert losses(finish(b, [0])[1][0]) == expected


def losses(reports: list[dict]) -> list[tuple]:
    return [(r["loss"], r["weights"], r["dtype"]) for r in reports]


def test_leftovers_of_an_earlier_backend_are_stopped_and_not_heard_of(pool, tmp_path):
    former = backend(pool, "batches", tmp_path / "former")
    for _ in range(4):
        former.start_trial({})
    follow(former, [0, 1, 2, 3], lambda _, results: len(results) == 2)
    b = backend(pool, "report_only", tmp_path / "next")
    b.start_trial({"epochs": 3, "x": 1.0})
    assert epochs(finish(b, [0])[1][0]) == [1, 2, 3]
    assert former._fresh == []


def test_stop_all_keeps_checkpoints_unless_told_otherwise(pool, tmp_path):
    for delete in (False, True):
        b = backend(pool, "count", tmp_path / str(delete), delete_checkpoints=delete)
        b.start_trial({"epochs": 10**6, "x": 1.0})
        follow(b, [0], lambda _, results: results)
        b.stop_all()
        assert b._trial_dict[0].status == Status.stopped
        assert bool(list(b.trial_path(0).glob("*.pt"))) is not delete


def test_copied_checkpoint_starts_another_trial(pool, tmp_path):
    b = backend(pool, "count", tmp_path)
    b.start_trial({"epochs": 3, "x": 1.0})
    finish(b, [0])
    b.start_trial({"epochs": 5, "x": 1.0}, checkpoint_trial_id=0)
    assert epochs(finish(b, [1])[1][1]) == [4, 5]


def test_files_of_an_earlier_experiment_are_not_mistaken_for_checkpoints(pool, tmp_path):
    for _ in range(2):
        b = backend(pool, "count", tmp_path)
        b.start_trial({"epochs": 2, "x": 1.0})
        assert epochs(finish(b, [0])[1][0]) == [1, 2]


def test_restored_trials_go_on_where_the_scheduler_left_them(pool, tmp_path):
    b = backend(pool, "count", tmp_path)
    for _ in range(2):
        b.start_trial({"epochs": 4, "x": 1.0})
    reports = finish(b, [0, 1])[1]
    again = backend(pool, "count", tmp_path, run=2)
    seen = [{k: v for k, v in r.items() if not k.startswith("st_")} for r in reports[0][:2]]
    again.restore(
        [
            RestoredTrial(1, {"epochs": 4, "x": 1.0}, reports[1], "completed"),
            RestoredTrial(0, {"epochs": 6, "x": 1.0}, seen, "Paused"),
        ]
    )
    again.resume_trial(0)
    statuses, more = finish(again, [0])
    assert statuses == {0: Status.completed}
    assert epochs(more[0]) == [3, 4, 5, 6], "3 and 4 come from the checkpoint"
    assert again.start_trial({"epochs": 1, "x": 1.0}).trial_id == 2
    assert again.fetch_status_results([1])[0][1][1] == Status.completed
    with pytest.raises(ValueError, match="fresh backend"):
        again.restore([])
    with pytest.raises(ValueError, match="numbered"):
        backend(pool, "count", tmp_path).restore([RestoredTrial(1, {}, [], "paused")])


def test_output_of_a_trial(pool, tmp_path):
    b = backend(pool, "chatty", tmp_path / "a path with spaces")
    b.start_trial({})
    finish(b, [0])
    assert b.stdout(0) == ["a line for stdout\n"]
    assert b.stderr(0) == ["a line for stderr\n"]
    b.set_entrypoint(f"{FUNCTIONS}.report_only")
    b.start_trial({"epochs": 1, "x": 1.0})
    finish(b, [1])
    assert b.stdout(1) == b.stderr(1) == []
    wait_until(lambda: list(b.trial_path(1).iterdir()) == [])


def test_tuner_path_does_not_override_a_given_one(pool, tmp_path):
    given, free = backend(pool, "count", tmp_path), PoolBackend(f"{FUNCTIONS}.count", pool=pool)
    for b in (given, free):
        b.set_path("/elsewhere", "tuner")
    assert given.trial_path(0) == tmp_path / "trials" / "0"
    assert str(free.trial_path(0)) == "/elsewhere/trials/0"
    assert given.entrypoint_path().stem == "functions"


def test_limits_and_settings_reach_the_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with WorkerPool(1, threads=2, warm=(), env={"MKL_NUM_THREADS": "1"}, gpus=["3"]) as pool:
        b = backend(pool, "environment", tmp_path, settings={"a": [1, None]})
        b.start_trial({})
        report = finish(b, [0])[1][0][0]
        pool.wait_ready()
    assert report["threads"]["OMP_NUM_THREADS"] == "2"
    assert report["threads"]["MKL_NUM_THREADS"] == "1"
    assert report["settings"] == {"a": [1, None]}
    assert report["device"] == "cuda:0"


def test_prepare_runs_in_every_worker_and_in_replacements(pool, tmp_path):
    file = tmp_path / "prepared"
    pool.prepare(f"{FUNCTIONS}.prepare", {"file": str(file)})
    assert len(file.read_text().splitlines()) == 2
    os.kill(pool.info()[0]["pid"], 9)
    wait_until(lambda: pool.poll(0.1) or len(file.read_text().splitlines()) == 3)
    with pytest.raises(UserError, match="fetch it with `fetch`"):
        pool.prepare(f"{FUNCTIONS}.prepare_without_data", {})
    with pytest.raises(PoolError, match="ZeroDivisionError"):
        pool.prepare(f"{FUNCTIONS}.prepare_broken", {})
    with pytest.raises(UserError, match="no function 'absent'"):
        pool.prepare(f"{FUNCTIONS}.absent", {})
    b = backend(pool, "report_only", tmp_path)
    b.start_trial({"epochs": 1, "x": 1.0})
    assert finish(b, [0])[0] == {0: Status.completed}


def test_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import module_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool(1, warm=("broken_module",)) as pool:
        with pytest.raises(PoolError, match="No module named 'module_that_is_missing'"):
            pool.wait_ready()


def test_wrong_key_is_refused_and_harmless(pool, tmp_path):
    from multiprocessing import AuthenticationError

    pool.wait_ready()
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Client(pool._address, authkey=b"guess")
    b = backend(pool, "report_only", tmp_path)
    b.start_trial({"epochs": 2, "x": 1.0})
    assert epochs(finish(b, [0])[1][0]) == [1, 2]


def test_close_leaves_nothing_behind():
    pool = WorkerPool(2, warm=())
    pool.wait_ready()
    folder, workers = pool._folder, [info["pid"] for info in pool.info()]
    pool.close()
    pool.close()
    assert not any(map(is_alive, workers))
    assert not folder.exists()
    with pytest.raises(UserError, match="n_workers"):
        WorkerPool(0)


def test_an_interrupted_backend_leaves_checkpoints_of_the_epochs_in_flight(pool, tmp_path):
    b = backend(pool, "polite", tmp_path)
    for _ in range(3):  # the third one has not begun
        b.start_trial({"epochs": 1000, "sleep": 0.02})
    _, results = follow(b, [0, 1, 2], lambda _, results: all(sum(k == i for k, _ in results) > 2 for i in (0, 1)))
    b.interrupt(20.0)
    assert b.busy_trial_ids() == []
    for k in (0, 1):
        reported = sum(trial == k for trial, _ in results)
        saved = reports_before(checkpoint_files(b.trial_path(k))[-1].read_bytes())
        assert saved >= reported > 1, "nothing that was reported is trained again"
    assert not checkpoint_files(b.trial_path(2))
    again = backend(pool, "polite", tmp_path, run=2)
    known = [report for trial, report in results if trial == 0]
    again.restore([RestoredTrial(0, {"epochs": saved + 40, "sleep": 0.02}, known, "paused")])
    again.resume_trial(0)
    more = epochs(finish(again, [0])[1][0])
    assert epochs(known) + more == list(range(1, saved + 41))


def test_sigterm_is_for_the_driver_and_processes_that_trials_fork_have_their_own_again(pool, tmp_path):
    """Slurm sends it to every process of a job that has to end."""
    b = backend(pool, "forks", tmp_path)
    b.start_trial({})
    _, results = follow(b, [0], lambda _, results: results)
    os.kill(results[0][1]["pid"], signal.SIGTERM)
    statuses, reports = finish(b, [0])
    assert statuses == {0: Status.completed}
    assert reports[0][-1] == reports[0][-1] | {"epoch": 2, "pid": results[0][1]["pid"], "child": -signal.SIGTERM}


def test_info(pool):
    pool.wait_ready()
    for info in pool.info():
        assert info["device"] == "cpu"
        assert info["threads"] == 1
        assert 0 < info["startup"] < 120
