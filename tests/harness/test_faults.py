"""What happens when things break: the real command, really killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_lines

SMALL = ["scheduler=asha", "ohgw=normalized", "task.model=mlp", "seed=0..1", "budget.epochs=60"]


def cells(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "results" / "default").iterdir() if p.is_dir() and p.name[0] != ".")


def wait_for(condition, seconds: float = 120.0):
    """Poll until ``condition()`` is true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def reports(cell: Path) -> list[dict]:
    return [event for event in read_lines(cell / "events.jsonl") if event["e"] == "report"]


def workers_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [p for p in map(int, found) if b"worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def in_second_cell(tmp_path: Path) -> Path | None:
    """The second cell's folder, once the first is finished and the second has reports."""
    root = tmp_path / "results" / "default"
    found = cells(tmp_path) if root.exists() else []
    running = [c for c in found if not (c / "summary.json").exists() and len(reports(c)) >= 15]
    return running[0] if len(found) == 2 and running else None


def check_complete(cell: Path, epochs: int = 60) -> None:
    """The record is whole: every epoch of every trial once and in order, exactly the budget."""
    events = reports(cell)
    assert len(events) == epochs
    by_trial: dict[int, list[int]] = {}
    for event in events:
        by_trial.setdefault(event["trial"], []).append(event["result"]["epoch"])
    for trial, seen in by_trial.items():
        assert seen == list(range(1, len(seen) + 1)), f"trial {trial}: epochs {seen}"
    warm = Counter(line["trial"] for line in read_lines(cell / "trials.jsonl"))
    assert set(warm) == set(by_trial)
    assert set(warm.values()) == {1}
    assert (cell / "summary.json").exists()
    assert not (cell / "trials").exists(), "pause checkpoints are deleted when the cell ends"


SLOW_TERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, SLOW_TERM])
def test_driver_killed_mid_cell_then_the_same_command(how, tmp_path, start_harness, harness):
    process = start_harness(*SMALL)
    cell = wait_for(lambda: in_second_cell(tmp_path))
    workers = workers_of(process.pid)
    assert len(workers) == 2
    finished = next(c for c in cells(tmp_path) if c != cell)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), output
    if how != signal.SIGKILL:
        assert "interrupted" in output
        assert "Traceback" not in output
    wait_for(lambda: not any(map(alive, workers)), 30)
    before, untouched = (cell / "events.jsonl").read_bytes(), (finished / "summary.json").stat().st_mtime_ns
    done = harness(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in done.stdout
    assert (cell / "events.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert (finished / "summary.json").stat().st_mtime_ns == untouched
    check_complete(cell)
    check_complete(finished)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dyhpo", "hyperband_bo", "bohb", "boil"])
def test_a_model_based_cell_goes_on_with_the_same_decisions(scheduler, tmp_path, start_harness, harness):
    """Its models are fitted again to what was recorded, and have to decide as they did."""
    words = [f"scheduler={scheduler}", "ohgw=normalized", "task.model=mlp", "budget.epochs=90", "task.max_epochs=9"]
    process = start_harness(*words)

    def by_model() -> bool:
        found = cells(tmp_path) if (tmp_path / "results" / "default").exists() else []
        starts = [e for c in found for e in read_lines(c / "events.jsonl") if e["e"] == "start"]
        return sum(e["origin"]["by"] == "model" for e in starts) >= 3

    wait_for(by_model)
    process.kill()
    process.communicate()
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in done.stdout
    assert "set aside" not in done.stdout
    (cell,) = cells(tmp_path)
    check_complete(cell, epochs=90)


def test_killed_worker_is_replaced_and_its_trial_goes_on(tmp_path, start_harness):
    process = start_harness(*SMALL)
    cell = wait_for(lambda: in_second_cell(tmp_path))
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    check_complete(cell)
    retries = [e for e in read_lines(cell / "events.jsonl") if e["e"] == "retry"]
    assert retries
    assert not [e for e in read_lines(cell / "events.jsonl") if e["e"] == "error"]


@pytest.mark.slow
def test_torn_last_line_is_reported_and_recovered(tmp_path, start_harness, harness):
    process = start_harness(*SMALL)
    cell = wait_for(lambda: in_second_cell(tmp_path))
    process.kill()
    process.communicate()
    with open(cell / "events.jsonl", "ab") as file:
        file.write(b'{"e":"report","t":1.0,"tri')
    done = harness(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "events.jsonl" in done.stdout
    assert len(reports_of_damaged(cell)) == 60


def reports_of_damaged(cell: Path) -> list[dict]:
    from harness.record import read_events

    return [e for e in read_events(cell / "events.jsonl")[0] if e["e"] == "report"]


@pytest.mark.slow
def test_corrupt_record_is_named_set_aside_and_redone(tmp_path, start_harness, harness):
    process = start_harness(*SMALL)
    cell = wait_for(lambda: in_second_cell(tmp_path))
    process.kill()
    process.communicate()
    lines = (cell / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[5] = b'{"e": "report", garbage\n'
    (cell / "events.jsonl").write_bytes(b"".join(lines))
    done = harness(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "line 6" in done.stdout
    assert (cell.parent / f"{cell.name}.broken-1").exists()
    check_complete(cell)


@pytest.mark.slow
def test_two_commands_on_one_results_folder_do_not_collide(tmp_path, start_harness, harness):
    process = start_harness(*SMALL)
    wait_for(lambda: (tmp_path / "results" / "default").exists() and len(cells(tmp_path)) >= 1)
    second = harness(*SMALL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode in (0, 3), output
    assert second.returncode in (0, 3), second.stdout + second.stderr
    assert 0 in (process.returncode, second.returncode)
    assert len(cells(tmp_path)) == 2
    for cell in cells(tmp_path):
        check_complete(cell)
        assert sum(e["e"] == "open" for e in read_lines(cell / "events.jsonl")) == 1


@pytest.mark.slow
def test_half_deleted_cells_are_mended(tmp_path, harness):
    words = [*SMALL[:-1], "budget.epochs=10"]
    assert harness(*words).returncode == 0
    first, second = cells(tmp_path)
    (first / "summary.json").unlink()
    (first / "config.yaml").unlink()
    (second / "events.jsonl").unlink()
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "corrupt" not in done.stdout
    assert "set aside" in done.stdout
    check_complete(first, 10)
    check_complete(second, 10)


def test_ctrl_c_while_the_workers_start(tmp_path, start_harness):
    process = start_harness(*SMALL)
    wait_for(lambda: process.stdout.readline().startswith("starting"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output


def test_progress_reaches_the_user_while_a_cell_runs(tmp_path, environment):
    """On a pseudo-terminal: the live display shows trials and the best score before the cell has ended."""
    command = f"{sys.executable} -m harness {' '.join(SMALL)} seed=0".replace(" seed=0..1", "").replace("=60", "=400")
    done = subprocess.run(
        ["script", "-qec", f"stty cols 80; {command}", "/dev/null"],
        cwd=tmp_path,
        env=environment | {"TERM": "xterm", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"/400.*trials +best 0\.\d+", done.stdout)


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_sweep(tmp_path, environment):
    command = f"{sys.executable} -m harness {' '.join(SMALL)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert all((cell / "summary.json").exists() for cell in cells(tmp_path))
    assert len(cells(tmp_path)) == 2


def test_unwritable_results_directory(tmp_path, harness):
    (tmp_path / "results").write_text("a file where the folder should be")
    done = harness(*SMALL)
    assert done.returncode == 2
    assert "cannot write results" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a tiny disk")
def test_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path, environment):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {disk} || exit 77
        (until [ -s {disk}/default/*/events.jsonl ]; do sleep .05; done; head -c 9M /dev/zero >{disk}/filler) &
        {sys.executable} -m harness results_dir={disk} {" ".join(SMALL)}
        code=$?
        cp -r {disk} {tmp_path}/kept
        exit $code
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a tmpfs here")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    kept = [c for c in (tmp_path / "kept" / "default").iterdir() if c.is_dir()]
    assert any(read_lines(c / "events.jsonl") for c in kept)
