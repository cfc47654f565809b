"""Trials on workers that are jobs of a real Slurm: started late, lost in every way, never outliving their driver."""

import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from backends import slurm, slurm_commands
from backends.context import UserError
from backends.function_backend import Status
from backends.slurm import SlurmBackend
from backends.workers import PoolError
from tests.backends.conftest import FUNCTIONS, epochs, finish, follow, is_alive, wait_until
from tests.conftest import ROOT, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


@pytest.fixture
def start(cluster, tmp_path, monkeypatch):
    """``start("count", n_workers=2)``: a SlurmBackend with one ready worker, closed at the end."""
    monkeypatch.chdir(tmp_path)
    backends = []

    def make(function: str, n_workers: int = 1, wait: bool = True, **options) -> SlurmBackend:
        common = {"gres": "gpu:1", "cpus": 1, "mem": "500M", "path": str(tmp_path / "exp"), "warm": ()}
        backend = SlurmBackend(f"{FUNCTIONS}.{function}", n_workers=n_workers, **{**common, **options})
        backends.append(backend)
        if wait:
            backend.pool.wait_ready(60)
        return backend

    yield make
    for backend in backends:
        backend.close()


def all_ready(backend: SlurmBackend) -> None:
    polling_until(backend, lambda: all(info["startup"] for info in backend.pool.info()))


def polling_until(backend: SlurmBackend, condition: Callable[[], bool]) -> None:
    def holds() -> bool:
        backend.pool.poll(0.1)
        return condition()

    wait_until(holds, 120)


def node_of(backend: SlurmBackend) -> str:
    return backend.pool.info()[0]["node"]


def running(backend: SlurmBackend, trial_id: int, reports: int = 2) -> None:
    """Wait until the trial has reported some epochs."""
    follow(backend, [trial_id], lambda _, results: len(results) >= reports, 60)


def test_trials_run_on_jobs_of_one_array_and_leave_nothing(start, tmp_path):
    backend = start("count", n_workers=3, warm=("torch",))
    trials = [backend.start_trial({"epochs": 4, "x": 1.0}).trial_id for _ in range(7)]
    statuses, reports = finish(backend, trials)
    assert set(statuses.values()) == {Status.completed}
    assert all(epochs(reports[k]) == [1, 2, 3, 4] for k in trials)
    all_ready(backend)
    jobs = [info["job"] for info in backend.pool.info()]
    assert len({job.split("_")[0] for job in jobs}) == 1
    assert len(set(jobs)) == 3
    backend.close()
    wait_until(lambda: not any(slurm_commands.jobs()[job].active for job in jobs), 20)
    assert not (tmp_path / "slurm-workers").exists()


def test_the_key_is_for_this_user_only_and_strangers_are_not_heard(start, tmp_path):
    backend = start("count")
    (file,) = (tmp_path / "slurm-workers").glob("*/connection.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    order = json.loads(file.read_text())
    mark = tmp_path / "unpickled"
    bomb = pickle.dumps(type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(mark),))})())
    for message in (b"", b"\x00" * 64, len(bomb).to_bytes(4, "big") + bomb):
        with socket.create_connection(tuple(order["address"])) as stranger:
            stranger.sendall(message)
            backend.pool.poll(0.1)
    trial = backend.start_trial({"epochs": 2, "x": 1.0}).trial_id
    assert finish(backend, [trial])[0] == {trial: Status.completed}
    assert not mark.exists()
    script = next((tmp_path / "slurm-workers").glob("*/worker.sh")).read_text()
    assert order["key"] not in script + str(slurm_commands.jobs())


def test_trials_start_as_soon_as_some_workers_have(start):
    """Eight GPUs for twelve workers."""
    backend = start("report_only", n_workers=12)
    trials = [backend.start_trial({"epochs": 2, "x": 1.0}).trial_id for _ in range(12)]
    assert set(finish(backend, trials, 60)[0].values()) == {Status.completed}
    assert sum(info["startup"] is not None for info in backend.pool.info()) <= 8


def test_a_queue_that_does_not_start_workers_is_reported(start, monkeypatch):
    monkeypatch.setattr(slurm, "FIRST_WORD", 3.0)
    backend = start("count", wait=False, extra=["--begin=now+1hour"])
    said: list[str] = []
    backend.pool.warn = said.append
    with pytest.raises(UserError, match=r"no worker is ready after 9 s: 1 PENDING \(BeginTime\) in Slurm"):
        backend.pool.wait_ready(9)
    assert said[-1] == "0 of 1 workers have started; 1 PENDING (BeginTime) in Slurm"


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(start):
    backend = start("dies_once", n_workers=2)
    trial = backend.start_trial({}).trial_id
    statuses, reports = finish(backend, [trial], 60)
    assert statuses == {trial: Status.completed}
    assert epochs(reports[trial]) == [1, 2, 3, 4, 5, 6]
    assert "closed its connection" in backend.failure(trial)
    all_ready(backend)
    assert len(backend.pool.info()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_that_is_told_to_go_lets_its_trial_checkpoint_and_that_counts_as_no_retry(start, number):
    """SIGTERM: preemption; SIGUSR1: the time limit is near."""
    backend = start("polite", max_retries=0)
    trial = backend.start_trial({"epochs": 12, "sleep": 0.2}).trial_id
    running(backend, trial)
    job = backend.pool.info()[0]["job"]
    subprocess.run(["scancel", "--batch", f"--signal={number.name}", job], check=True)
    statuses, reports = finish(backend, [trial], 60)
    assert statuses == {trial: Status.completed}
    assert epochs(reports[trial])[-1] == 12
    assert reports[trial][-1]["resumed_at"] > 2  # the epoch in flight was not lost
    assert f"was told to go by {number.name}" in backend.failure(trial)
    assert backend.pool.info()[0]["job"] != job


def test_a_preempted_worker_comes_back(start, cluster):
    backend = start("polite", max_retries=0, extra=["--nodelist=node1", "--exclusive"])
    trial = backend.start_trial({"epochs": 4000, "sleep": 0.1}).trial_id
    running(backend, trial)
    job = backend.pool.info()[0]["job"]
    wish = ["--partition=high", "--nodelist=node1", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"]
    subprocess.run(["sbatch", *wish], check=True, capture_output=True)
    _, results = follow(backend, [trial], lambda _, results: results and results[-1][1]["resumed_at"] > 0, 120)
    assert results[-1][1]["resumed_at"] > 2
    assert backend.pool.info()[0]["job"] != job
    assert "was told to go by SIGTERM" in backend.failure(trial)
    backend.stop_all()


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_trial_goes_on_elsewhere_when_a_node_fails(start, cluster, how):
    """crash: the node is gone with all its processes. hang: only its slurmd is; the worker runs on until Slurm gives
    the node up, and then has to end."""
    backend = start("polite", max_retries=1)
    trial = backend.start_trial({"epochs": 2000, "sleep": 0.1}).trial_id
    running(backend, trial)
    first = node_of(backend)
    pid = follow(backend, [trial], lambda _, results: results)[1][-1][1]["pid"]
    getattr(cluster, how)(first)
    polling_until(backend, lambda: node_of(backend) not in ("", first))
    _, results = follow(backend, [trial], lambda _, results: results and results[-1][1]["pid"] != pid, 60)
    assert results[-1][1]["resumed_at"] > 0
    wait_until(lambda: not is_alive(pid), 20)
    backend.stop_all()


def test_workers_cannot_start(start, tmp_path):
    with pytest.raises(PoolError, match=r"no such thing[\s\S]*Slurm job"):
        start("count", setup=["echo no such thing >&2", "exit 7"])


def test_workers_that_cannot_reach_the_driver_say_so(start, monkeypatch):
    monkeypatch.setattr(slurm, "CONNECT_SECONDS", 1.0)
    write = slurm._write_order
    unreachable = {"address": ["localhost", 9]}  # the discard port: nobody answers
    monkeypatch.setattr(slurm, "_write_order", lambda folder, order, setup: write(folder, order | unreachable, setup))
    with pytest.raises(PoolError, match=r"cannot reach the driver at .* port 9: .*backend.host and backend.port"):
        start("count", n_workers=2)


def test_what_slurm_refuses_is_one_sentence(start, tmp_path):
    with pytest.raises(UserError, match="invalid partition specified: nope"):
        start("count", partition="nope")
    with pytest.raises(UserError, match="'rm -rf' is no option of sbatch"):
        start("count", extra=["rm -rf"])
    with pytest.raises(UserError, match=r"invalid partition specified: a;b \$\(touch x\)"):
        start("count", partition="a;b $(touch x)")
    with pytest.raises(UserError, match=r"the driver's host 'no.such.host.invalid' has no address"):
        start("count", host="no.such.host.invalid")
    assert [path.name for path in tmp_path.iterdir()] == []


DRIVER = """
import sys, time
from backends.slurm import SlurmBackend
b = SlurmBackend("{functions}.polite", n_workers=3, gres="gpu:4", path=sys.argv[1], folder=sys.argv[1] + "/workers")
b.pool.wait_ready()
trial = b.start_trial({{"epochs": 5000, "sleep": 0.1}}).trial_id
seen = []
while len(seen) < 2:
    seen += b.fetch_status_results([trial])[1]
print(seen[0][1]["pid"], *(info["job"] for info in b.pool.info()), flush=True)
time.sleep(600)
"""


def test_workers_do_not_survive_a_killed_driver(cluster, tmp_path):
    """Two of the three run, the third one waits for a node."""
    script = DRIVER.format(functions=FUNCTIONS)
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    pid, *jobs = driver.stdout.readline().split()
    killed_at = time.monotonic()
    driver.kill()
    driver.wait()
    wait_until(lambda: not is_alive(int(pid)), 60)
    wait_until(lambda: not any(slurm_commands.jobs()[job].active for job in jobs), 90)
    assert time.monotonic() - killed_at < 60  # what is promised: not more than a minute


def test_the_same_command_goes_on_after_its_driver_was_killed(cluster, start_harness, harness, tmp_path):
    words = ["backend=slurm", "backend.gres=gpu:1", "backend.cpus=1", "n_workers=2", "task.model=mlp", "ohgw=off"]
    words += ["budget.epochs=60", "tracker=none"]
    driver = start_harness(*words)
    cells = tmp_path / "results" / "default"

    def reports() -> int:
        return sum(event["e"] == "report" for file in cells.glob("*/events.jsonl") for event in read_lines(file))

    wait_until(lambda: reports() > 5, 60)
    driver.kill()
    driver.wait()
    before = reports()
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing where it stopped" in done.stdout
    (cell,) = [file.parent for file in cells.glob("*/summary.json")]
    events = read_lines(cell / "events.jsonl")
    assert sum(event["e"] == "report" for event in events) == 60 > before
    served = [event for event in events if event["e"] == "worker"]
    assert {event["run"] for event in events if event["e"] == "open"} == {1, 2}
    assert len({event["job"] for event in served}) >= 2
    assert not (cells / ".workers").exists()  # what the killed driver left is gone as well
    assert not [job for job in slurm_commands.jobs().values() if job.active]
