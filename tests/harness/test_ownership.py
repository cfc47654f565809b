"""Taking a cell over from a process that still runs: real processes, real locks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from harness.ownership import CellBusy, Superseded, cell_lock, given_up_by_slurm, own_slurm
from harness.record import CellPaths, EventLog, detach, read_events
from tests.conftest import read_lines
from tests.harness.test_faults import SMALL, cells, check_complete, reports, wait_for

GHOST = """
import sys, time
from harness.ownership import Superseded, cell_lock
from harness.record import CellPaths, EventLog, write_json

paths = CellPaths.of(sys.argv[1])
with cell_lock(paths.lock) as ownership:
    paths.root.mkdir(parents=True, exist_ok=True)
    log = EventLog(paths.events, sync_seconds=float(sys.argv[2]))
    others = [open(path, "a") for path in (paths.trials, paths.decisions, paths.stdout, paths.stderr)]
    print("holds", flush=True)
    try:
        for k in range(10**9):
            log.append({"e": "open", "t": k, "by": "ghost"})
            for other in others:
                print("by ghost", file=other, flush=True)
            time.sleep(0.001)
    except Superseded as newer:
        print("log:", newer, flush=True)
    assert not ownership.owned()
    try:
        with ownership.guarded():
            write_json(paths.summary, {"by": "ghost"})
    except Superseded as newer:
        print("guard:", newer, flush=True)
"""

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def python(environment) -> Iterator[Run]:
    """``python(script, *arguments, VARIABLE=...)`` starts a process, which is killed in the end."""
    with contextlib.ExitStack() as started:

        def start(script: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", script, *map(str, arguments)]
            process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment | variables)
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def held_by(process: subprocess.Popen[str]) -> Callable[..., bool]:
    return lambda holder: holder["pid"] == process.pid


@pytest.fixture
def paths(tmp_path) -> CellPaths:
    return CellPaths(tmp_path, "default", "cell")


def ghost_of(paths: CellPaths, python: Run, sync_seconds: float = 0.2) -> subprocess.Popen[str]:
    ghost = python(GHOST, paths.root, sync_seconds)
    assert line(ghost) == "holds\n"
    wait_for(lambda: len(read_lines(paths.events)) > 20)
    return ghost


def test_nothing_that_a_ghost_goes_on_writing_is_in_the_new_attempts_record(paths, python):
    ghost = ghost_of(paths, python)
    with (
        open(paths.events) as as_the_ghost_sees_it,
        cell_lock(paths.lock, held_by(ghost), lambda: detach(paths)) as own,
    ):
        before = {path: path.read_text() for path in paths.root.iterdir()}
        with EventLog(paths.events) as log:
            for k in range(300):
                log.append({"e": "open", "t": k, "by": "the new one"})
        assert line(ghost).startswith("log: continued by a newer attempt")
        assert line(ghost).startswith("guard: continued by a newer attempt")
        assert ghost.wait() == 0
        assert own.owned()
        later = len(as_the_ghost_sees_it.readlines()) - len(before[paths.events].splitlines())
    assert later > 0, "it did go on"
    events = [event["by"] for event in read_events(paths.events)[0]]
    assert events[-300:] == ["the new one"] * 300
    assert len(events) - 300 <= len(before[paths.events].splitlines())
    assert all(path.read_text() == text for path, text in before.items() if path != paths.events)
    assert not paths.summary.exists()


def test_one_of_many_takes_a_cell_over(paths, python):
    ghost = ghost_of(paths, python, sync_seconds=1e9)
    taker = """
import sys
from harness.ownership import CellBusy, cell_lock
try:
    with cell_lock(sys.argv[1], lambda holder: holder["pid"] == int(sys.argv[2])):
        print("has it", flush=True)
        sys.stdin.read()
except CellBusy as busy:
    print(busy, flush=True)
"""
    takers = [python(taker, paths.lock, ghost.pid) for _ in range(4)]
    lines = {taker.pid: line(taker).strip() for taker in takers}
    (owner,) = (pid for pid, said in lines.items() if said == "has it")
    assert all(f"process {owner} on" in said for pid, said in lines.items() if pid != owner)
    with pytest.raises(CellBusy, match=f"process {owner} on"), cell_lock(paths.lock, held_by(ghost)):
        pass


def test_whoever_is_faster_keeps_the_cell(paths, python):
    ghost = ghost_of(paths, python, sync_seconds=1e9)
    with contextlib.ExitStack() as meanwhile:

        def superseded(holder):
            if holder["pid"] != ghost.pid:
                return False
            meanwhile.enter_context(cell_lock(paths.lock, held_by(ghost)))
            return True

        with pytest.raises(CellBusy, match=f"process {os.getpid()} on"), cell_lock(paths.lock, superseded):
            pass


def test_a_ghost_that_ends_leaves_the_cell_to_whoever_took_it_over(paths, python):
    ghost = ghost_of(paths, python)
    with cell_lock(paths.lock, held_by(ghost), lambda: detach(paths)) as own:
        ghost.wait()
        with pytest.raises(CellBusy, match=f"process {os.getpid()} on"), cell_lock(paths.lock):
            pass
        with own.guarded():
            pass


def test_a_cell_that_is_taken_over_twice_belongs_to_the_last(paths, python):
    ghost = ghost_of(paths, python, sync_seconds=1e9)
    with cell_lock(paths.lock, held_by(ghost)) as second, cell_lock(paths.lock, lambda holder: True) as third:
        assert (second.owned(), third.owned()) == (False, True)
        assert third.number == second.number + 1 == 3
        with pytest.raises(Superseded, match="continued by a newer attempt"), second.guarded():
            pass
        with third.guarded():
            pass


def test_the_lock_of_a_silent_machine_may_be_lost_while_it_runs(paths):
    """As when a file server forgets it: the lock is free, its owner elsewhere is fenced off all the same."""
    detached = []
    with cell_lock(paths.lock, detach=lambda: detached.append(1)) as elsewhere:
        holder = json.loads(paths.lock.read_bytes()) | {"host": "node7"}
        paths.lock.unlink()
        paths.lock.write_text(json.dumps(holder))
        with cell_lock(paths.lock, detach=lambda: detached.append(2)):
            assert not elsewhere.owned()
        with cell_lock(paths.lock, detach=lambda: detached.append(3)):
            pass
    assert detached == [1, 2], "the last owner was on this machine, where a free lock is a sure sign of its end"


def test_a_lock_file_that_is_deleted_changes_nothing_until_somebody_takes_the_cell(paths):
    with cell_lock(paths.lock) as own:
        paths.lock.unlink()
        with own.guarded():
            pass
        with cell_lock(paths.lock), pytest.raises(Superseded), own.guarded():
            pass


def test_what_failed_before_the_cell_changed_hands_is_done_by_the_next(paths, python):
    ghost = ghost_of(paths, python, sync_seconds=1e9)

    def full_disk():
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), cell_lock(paths.lock, held_by(ghost), full_disk):
        pass
    done: list[bool] = []
    with cell_lock(paths.lock, held_by(ghost), lambda: done.append(True)):
        assert done


# ---- Slurm's rule


@pytest.fixture
def in_job(monkeypatch):
    """``in_job("12_3", restart)``: as if this process ran there; all of Slurm's variables are gone otherwise."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def enter(job: str, restart: int | None = None) -> None:
        array, _, task = job.partition("_")
        variables = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
        variables |= {"SLURM_JOB_ID": "99" if task else job, "SLURM_CLUSTER_NAME": "ours"}
        variables |= {} if restart is None else {"SLURM_RESTART_COUNT": str(restart)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


def holder(job: str | None, restart: int = 0, cluster: str = "ours") -> dict:
    slurm = {} if job is None else {"slurm": {"job": job, "restart": restart, "cluster": cluster}}
    return {"pid": 1, "host": "node1", "number": 1, **slurm}


def test_the_lock_names_its_holders_job(paths, in_job):
    with cell_lock(paths.lock):
        shown = json.loads(paths.lock.read_bytes())
        assert (shown["pid"], shown["host"]) == (os.getpid(), socket.gethostname())
        assert "slurm" not in shown
    in_job("12_3")
    with cell_lock(paths.lock):
        assert json.loads(paths.lock.read_bytes())["slurm"] == {"job": "12_3", "restart": 0, "cluster": "ours"}
        with pytest.raises(CellBusy, match=r"on .*, Slurm job 12_3\)"), cell_lock(paths.lock):
            pass
    in_job("12_3", 2)
    assert own_slurm() == {"job": "12_3", "restart": 2, "cluster": "ours"}


def test_an_earlier_run_of_the_same_job_is_given_up(in_job):
    in_job("12_3", 1)
    assert given_up_by_slurm(holder("12_3", 0))
    assert not given_up_by_slurm(holder("12_3", 1)), "another process of this very run"
    assert not given_up_by_slurm(holder("12_3", 2)), "then this process is the ghost"
    assert not given_up_by_slurm(holder(None)), "outside of Slurm nobody knows"


def test_a_cell_whose_job_cannot_be_asked_after_is_left_alone(paths, in_job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    in_job("12", 1)
    with cell_lock(paths.lock):
        in_job("13")
        with pytest.raises(
            CellBusy, match=r"Slurm job 12\); whether .* there is no squeue on PATH.* delete .*cell\.lock"
        ):
            with cell_lock(paths.lock, given_up_by_slurm):
                pass
    with pytest.raises(CellBusy, match="of another cluster, theirs"):
        with cell_lock(paths.lock), cell_lock(paths.lock, lambda _: given_up_by_slurm(holder("12", 0, "theirs"))):
            pass


# ---- the real command


@pytest.mark.slow
def test_a_job_goes_on_beside_its_own_ghost(tmp_path, start_harness, environment):
    """Slurm gave a node up and started the job again; the first run was not dead, and wakes up when all is done."""
    words = [*SMALL[:-2], "seed=0", "budget.epochs=90", "save_model=best", "backend.threads=1"]
    environment |= {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}
    ghost = start_harness(*words)
    root = tmp_path / "results" / "default"
    wait_for(lambda: root.exists() and cells(tmp_path) and len(reports(cells(tmp_path)[0])) >= 15)
    ghost.send_signal(signal.SIGSTOP)
    (cell,) = cells(tmp_path)
    old = open(cell / "events.jsonl")  # noqa: SIM115  keeps the ghost's file
    seen = len(old.readlines())

    environment["SLURM_RESTART_COUNT"] = "1"
    done = start_harness(*words)
    output, _ = done.communicate(timeout=200)
    assert done.returncode == 0, output
    assert "continuing where it stopped" in output
    check_complete(cell, epochs=90)
    assert [e["run"] for e in read_lines(cell / "events.jsonl") if e["e"] == "open"] == [1, 2]
    (model,) = (cell / "models").iterdir()
    kept = {path: path.read_bytes() for path in cell.glob("*") if path.is_file()} | {model: model.read_bytes()}

    ghost.send_signal(signal.SIGCONT)
    output, _ = ghost.communicate(timeout=200)
    assert ghost.returncode in (0, 3), output
    assert "continued by a newer attempt" in output
    assert "Traceback" not in output
    assert len(old.readlines()) > 0, f"it did go on after line {seen}"
    assert {path: path.read_bytes() for path in kept} == kept
    assert [p.name for p in (cell / "models").glob("*.pt")] == [model.name]
