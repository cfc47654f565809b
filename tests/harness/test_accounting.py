"""Slurm's account beside our own, from recorded outputs of sacct (a script that prints them stands for it)."""

import json
import os
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.slurm_commands import Incarnation
from harness.record import CellPaths, EventLog, read_events
from harness.report import load_results
from harness.report.__main__ import main as report_main
from harness.report.overhead import section
from harness.report.study import Study
from harness.slurm import accounting
from harness.slurm.accounting import (
    PARTS,
    Attempt,
    Share,
    account,
    allocation,
    cgroup_usage,
    divide,
    main,
    use_of_slurm,
)
from tests.harness.fake_results import FakeCell, write_study

BEGUN = 1_700_000_000  # unix seconds at which the first job began


def driver(job="12", restart=0, gpus=2):
    return {"job": job, "restart": restart, "cluster": "ours", "node": "node1", "gpus": gpus}


def write_cell(folder, opens, seed=0, closed=True, scores=6, workers=()):
    """A cell of ``scores`` reports, one every 10 s (busy: 10 s, and 0.5 s for test). ``opens``: of each attempt how
    many reports there were before it, when it began (seconds after BEGUN) and its driver's job. ``workers``: (number of
    the attempt, job)."""
    paths = FakeCell([(0.5, 0.5)] * scores, seconds=10.0, seed=seed, close="finished" if closed else None).write(folder)
    lines = [json.loads(line) for line in paths.events.read_text().splitlines()]
    reports = [event for event in lines if event["e"] != "open"]
    paths.events.unlink()
    with EventLog(paths.events) as log:
        done = 0
        for number, (before, at, slurm) in enumerate(opens):
            while done < before:
                event = reports.pop(0)
                done += event["e"] == "report"
                log.append(event)
            last = 10.0 * done
            opened = {
                "e": "open",
                "t": last,
                "run": number + 1,
                "time": BEGUN - 1e6,
                "opened": BEGUN + at,
                "commit": "0",
            }
            log.append(opened | ({"slurm": slurm} if slurm else {}))
            for attempt, job in workers:
                if attempt == number:
                    log.append({"e": "worker", "t": last, "job": job, "node": "node1"})
        for event in reports:
            log.append(event)
    return paths


def stamp(seconds):
    return "Unknown" if seconds is None else datetime.fromtimestamp(BEGUN + seconds).strftime("%Y-%m-%dT%H:%M:%S")


def row(job, state, begin, end, gpus=2, rss="65380K", energy="0", tres=None):
    """A run of a job as sacct shows it: its row and that of its batch step; ``begin``, ``end``: seconds after BEGUN."""
    elapsed = 0 if end is None else end - begin
    tres = f"billing=1,cpu=1,gres/gpu={gpus},mem=1000M,node=1" if tres is None else tres
    times = f"{stamp(begin)}|{stamp(end)}"
    return (
        f"{job}|369|{state}|{elapsed}|{tres}|node1|{times}|||0:0\n"
        f"{job}.batch|369.batch|{state.split()[0]}|{elapsed}|cpu=1|node1|{times}|{rss}|{energy}|0:15\n"
    )


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """``slurm(sacct's output, squeue's)``: from now on the commands print that."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setattr(accounting, "POLL_SECONDS", 0.01)

    def says(sacct, squeue=""):
        for name, text in (("sacct", sacct), ("squeue", squeue)):
            (programs / f"{name}.txt").write_text(text)
            script = f'#!/bin/sh\necho "$@" >> {programs}/{name}.calls\nexec /bin/cat {programs}/{name}.txt\n'
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        return programs

    return says


def check_adds_up(found):
    assert sum(found["gpu_seconds"].values()) == pytest.approx(found["gpu_hours"] * 3600)
    of_runs = sum(run["gpus"] * (run["inside"] + run["outside"] + run["lost"]) for run in found["runs"])
    assert of_runs == pytest.approx(found["gpu_hours"] * 3600)
    assert found["busy_hours"] == pytest.approx((found["gpu_seconds"]["busy"] + found["gpu_seconds"]["test"]) / 3600)


def test_a_job_that_was_requeued_after_a_kill(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 5, driver()), (3, 120, driver(restart=1))])
    slurm(row("12", "REQUEUED", 0, 45) + row("12", "COMPLETED", 112, 160, rss="70000K"))
    (found,) = account(paths.root.parent).values()
    assert json.loads(paths.slurm.read_text()) == found
    assert found["gpu_seconds"] == pytest.approx(
        {
            "busy": 60,
            "test": 6 * 0.5,
            "idle": 2 * (30 + 30) - 63,  # both attempts made three reports of 10 s
            "outside": 2 * (5 + 8 + 10),  # 5 s before the first one; 8 s before and 10 s after the second
            "lost": 2 * 10,  # its last event was 35 s after the first job began
        }
    )
    assert found["gpu_hours"] == pytest.approx(2 * (45 + 48) / 3600)
    assert [(run["state"], run["max_rss"], run["energy"]) for run in found["runs"]] == [
        ("REQUEUED", 65380 * 1024, None), ("COMPLETED", 70000 * 1024, None)
    ]  # fmt: skip
    assert (found["wallclock"], found["attempts"], found["jobs"]) == (60, 2, ["12"])
    check_adds_up(found)


def test_a_run_that_left_no_event_is_lost(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 100, driver(restart=1))])
    slurm(row("12", "NODE_FAIL", 0, 50) + row("12", "COMPLETED", 90, 170, rss=""))
    (found,) = account(paths.root.parent).values()
    assert found["gpu_seconds"]["lost"] == 2 * 50
    assert found["gpu_seconds"]["outside"] == 2 * 20
    assert [run["max_rss"] for run in found["runs"]] == [65380 * 1024, None], "a short step was not sampled"
    check_adds_up(found)


RECORDED = """\
372|372|REQUEUED|2|billing=1,cpu=1,gres/gpu=2,mem=1000M,node=1|node1|2026-11-26T01:11:35|2026-11-26T01:11:37|||0:0
372.batch|372.batch|CANCELLED|2|cpu=1,gres/gpu=2,node=1|node1|2026-11-26T01:11:35|2026-11-26T01:11:37|65460K|0|0:15
372|372|CANCELLED by 0|0||None assigned|None|2026-11-26T01:11:38||0|0:0
"""  # of Slurm 22.05: a job that was requeued, and cancelled while it waited


def test_a_job_that_was_cancelled_while_it_waited_again(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 0, driver("372"))], scores=0)
    slurm(RECORDED)
    (found,) = account(paths.root.parent).values()
    assert [(run["state"], run["elapsed"], run["begin"]) for run in found["runs"]][1] == ("CANCELLED", 0, None)
    assert found["gpu_hours"] == pytest.approx(2 * 2 / 3600)
    check_adds_up(found)


def test_workers_of_their_own_jobs_beside_a_driver_outside_of_slurm(tmp_path, slurm):
    workers = [(0, "20_0"), (0, "20_1"), (0, "20_1")]
    paths = write_cell(tmp_path, [(0, 10, None)], workers=workers)
    slurm(
        row("20_0", "CANCELLED by 0", 5, 75, gpus=1, energy="1000")
        + row("20_1", "NODE_FAIL", 0, 30, gpus=1)
        + row("20_1", "COMPLETED", 40, 80, gpus=1)
    )
    (found,) = account(paths.root.parent).values()
    assert found["gpu_hours"] == pytest.approx((70 + 30 + 40) / 3600)
    inside = 60 + 20 + 30
    assert found["gpu_seconds"] == pytest.approx(
        {"busy": 60, "test": 3, "idle": inside - 63, "outside": (5 + 5) + 10 + 10, "lost": 0}
    )
    assert [run["energy"] for run in found["runs"]] == [1000, None, None]
    check_adds_up(found)


def test_a_job_that_served_two_cells_is_divided(tmp_path, slurm):
    first = write_cell(tmp_path, [(0, 10, driver())])
    write_cell(tmp_path, [(0, 80, driver())], seed=1, scores=3)
    other = write_cell(tmp_path, [(0, 0, driver("13"))], seed=2)
    slurm(row("12", "COMPLETED", 0, 130) + row("13", "COMPLETED", 0, 60))
    one, two, alone = account(first.root.parent).values()
    assert [found["gpu_seconds"]["outside"] for found in (one, two)] == [2 * 20, 2 * 20], "40 of 130 s are nobody's"
    assert one["gpu_hours"] + two["gpu_hours"] == pytest.approx(2 * 130 / 3600)
    assert alone["gpu_hours"] == pytest.approx(2 * 60 / 3600)
    assert json.loads(other.slurm.read_text())["runs"][0]["cells"] == 1
    for found in (one, two, alone):
        check_adds_up(found)


def test_rows_that_come_late_are_waited_for(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 0, driver()), (3, 100, driver(restart=1))])
    programs = slurm("")
    early = row("12", "REQUEUED", 0, 40) + row("12", "RUNNING", 95, None)
    late = row("12", "REQUEUED", 0, 40) + row("12", "COMPLETED", 95, 140)
    for name, text in (("1", ""), ("2", row("12", "REQUEUED", 0, 40)), ("3", early), ("4", late)):
        (programs / name).write_text(text)
    calls = f"{programs}/sacct.calls"
    script = f'#!/bin/sh\necho "$@" >> {calls}\nexec /bin/cat {programs}/$(/usr/bin/wc -l < {calls})\n'
    (programs / "sacct").write_text(script)
    (found,) = account(paths.root.parent, wait_seconds=60).values()
    assert [run["state"] for run in found["runs"]] == ["REQUEUED", "COMPLETED"]
    assert "-j 12 " in (programs / "sacct.calls").read_text()


@pytest.mark.parametrize(
    ("sacct", "why"),
    [
        ("", "sacct shows nothing of one of its jobs"),
        (row("12", "REQUEUED", 0, 40), "sacct does not show all runs"),
        (row("12", "COMPLETED", 0, 40) + row("12", "RUNNING", 50, None), "or not how they ended"),
        (row("12", "COMPLETED", 0, 40, tres="cpu=1") + row("12", "COMPLETED", 50, 90, tres="cpu=1"), "lacks gres/gpu"),
    ],
)
def test_what_is_missing_is_said_and_asked_for_again(sacct, why, tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 0, driver()), (3, 50, driver(restart=1))])
    slurm(sacct)
    (found,) = account(paths.root.parent, wait_seconds=0.05).values()
    assert why in found["missing"]
    assert found["busy_hours"] == pytest.approx(63 / 3600)
    assert json.loads(paths.slurm.read_text()) == found
    slurm(row("12", "REQUEUED", 0, 40) + row("12", "COMPLETED", 50, 90))
    (found,) = account(paths.root.parent).values()
    assert found["gpu_hours"] == pytest.approx(2 * 80 / 3600)


def test_without_sacct_that_is_said(tmp_path, monkeypatch):
    paths = write_cell(tmp_path, [(0, 0, driver())])
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = account(paths.root.parent).values()
    assert "there is no squeue on PATH" in found["missing"]
    assert json.loads(paths.slurm.read_text())["jobs"] == ["12"]


def test_a_job_that_runs_is_not_waited_for(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 0, driver())])
    slurm(row("12", "RUNNING", 0, None), "12|RUNNING|node1||12|0|None|N/A|N/A|node1\n")
    (found,) = account(paths.root.parent, wait_seconds=1e9).values()
    assert found["missing"] == "not all of its jobs have ended"
    assert not paths.slurm.exists()


def test_what_is_complete_is_not_asked_for_again_until_the_cell_goes_on(tmp_path, slurm, monkeypatch):
    paths = write_cell(tmp_path, [(0, 0, driver())], closed=False, scores=3)
    programs = slurm(row("12", "TIMEOUT", 0, 45))
    before = account(paths.root.parent)
    (programs / "sacct.calls").unlink()
    assert account(paths.root.parent) == before
    assert not (programs / "sacct.calls").exists()
    with EventLog(paths.events) as log:
        log.append({"e": "open", "t": 30.0, "run": 2, "opened": BEGUN + 100, "slurm": driver("14")})
        log.append({"e": "close", "t": 31.0, "why": "scheduler"})
    slurm(row("12", "TIMEOUT", 0, 45) + row("14", "COMPLETED", 95, 105))
    (found,) = account(paths.root.parent).values()
    assert found["jobs"] == ["12", "14"]
    assert found["gpu_seconds"]["lost"] == 2 * 15


def test_cells_outside_of_slurm_have_no_account(tmp_path, slurm):
    write_study(tmp_path, seeds=range(2))
    programs = slurm("")
    assert account(tmp_path / "default") == {}
    assert not (programs / "sacct.calls").exists()
    assert not list((tmp_path / "default").glob("*/slurm.json"))


def test_only_the_attempts_in_slurm_count(tmp_path, slurm):
    paths = write_cell(tmp_path, [(0, 0, None), (3, 100, driver())])
    slurm(row("12", "COMPLETED", 100, 130))
    (found,) = account(paths.root.parent).values()
    assert (found["gpu_seconds"]["busy"], found["wallclock"], found["attempts"]) == (30, 30, 2)
    check_adds_up(found)


moments = st.floats(0, 200, allow_nan=False)


@given(
    st.lists(st.tuples(st.integers(0, 3), moments, moments, st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 150),
    st.integers(0, 100),
    st.integers(0, 50),
)
def test_every_second_of_a_run_is_divided_among_its_cells_once(attempts, begin, length, suspended):
    run = Incarnation("7", "7", "COMPLETED", max(0, length - suspended), 1, 1, "n", begin, begin + length)
    cells: dict[str, list[Attempt]] = {}
    for cell, one, other, closed, own in attempts:
        restarts = {"7": 0} if own else {}
        found = Attempt(min(one, other), max(one, other), closed, frozenset("7"), restarts)
        cells.setdefault(str(cell), []).append(found)
    shares = divide(run, 0, cells)
    assert sum(s.inside + s.outside + s.lost for s in shares.values()) == pytest.approx(run.elapsed)
    assert all(min(s.inside, s.outside, s.lost) >= 0 for s in shares.values())
    assert set(shares) <= set(cells)


def test_an_attempt_belongs_to_its_own_run_of_the_job():
    """sacct's times are whole seconds: an attempt's end may seem to lie in the next run."""
    attempt = Attempt(1.0, 10.7, False, frozenset(["7"]), {"7": 0})
    first = Incarnation("7", "7", "REQUEUED", 10, 1, 1, "n", 0, 10)
    second = Incarnation("7", "7", "FAILED", 5, 1, 1, "n", 10, 15)
    assert divide(first, 0, {"a": [attempt]}) == {"a": Share(inside=9.0, outside=1.0, lost=0.0)}
    assert divide(second, 1, {"a": [attempt]}) == {"a": Share(lost=5.0)}


def test_the_open_event_names_the_job(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("SLURM") or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)
    assert allocation() is None
    variables = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "n3", "SLURM_GPUS_ON_NODE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert allocation() == {"job": "5", "restart": 2, "cluster": None, "node": "n3", "gpus": 4}
    for visible, gpus in (("0,1", 2), ("", 0), ("GPU-1", 1), ("NoDevFiles", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert (allocation() or {})["gpus"] == gpus


def test_events_of_workers_are_read_and_harmless(tmp_path):
    paths = write_cell(tmp_path, [(0, 0, None)], workers=[(0, "20_0")])
    events, problems = read_events(paths.events)
    assert not problems
    use = use_of_slurm(paths, events)
    assert use is not None
    assert use.jobs == ["20_0"]


# ---- the command and the report


def test_the_command_prints_what_it_found(tmp_path, slurm, capsys, monkeypatch):
    monkeypatch.setattr(accounting, "WAIT_SECONDS", 0.05)
    write_cell(tmp_path, [(0, 0, driver())])
    write_cell(tmp_path, [(0, 0, driver("99"))], seed=1)
    slurm(row("12", "COMPLETED", 0, 60))
    assert main([str(tmp_path / "default")]) == 0
    head, line, missing = capsys.readouterr().out.splitlines()
    assert head.split() == ["cell", "ours", "(h)", "Slurm", "(h)", *f"{' (%) '.join(PARTS)} (%)".split()]
    assert line.split()[1:] == ["0.0175", "0.0333", "50.0", "2.5", "47.5", "0.0", "0.0"]
    assert "sacct shows nothing of one of its jobs (jobs 99)" in missing
    assert main([str(tmp_path / "absent")]) == 2
    assert "is no folder of results" in capsys.readouterr().err


def report(folder):
    found = section(Study(load_results(folder / "default")))
    return found, {table.name: table for table in found.tables}


def test_the_report_has_both_accounts(tmp_path, slurm):
    for seed in range(3):
        write_cell(tmp_path, [(0, 5, driver(f"1{seed}"))], seed=seed)
    slurm(
        row("10", "COMPLETED", 0, 75, energy="7200000") + row("11", "COMPLETED", 0, 65, rss="80000K", energy="3600000")
    )
    account(tmp_path / "default", wait_seconds=0.05)
    found, tables = report(tmp_path)
    (variant,) = tables["slurm-accounting_all"].frame.to_dict("records")
    assert (variant["cells"], variant["missing"], variant["max RSS"]) == (2, 1, 80000 * 1024)
    assert variant["Slurm's GPU-hours"] == pytest.approx(2 * 70 / 3600)
    assert variant["ratio"] == pytest.approx(2 * 70 / 63)
    assert variant["energy (kWh)"] == pytest.approx(1.5)
    shares = ["busy", "test", "idle GPUs", "start and end of jobs", "lost attempts"]
    assert sum(variant[name] for name in shares) == pytest.approx(1)
    cells = tables["slurm-cells_all"].frame
    assert list(cells["jobs"]) == ["10", "11"]
    assert list(cells["states"]) == ["1 COMPLETED"] * 2
    assert any("1 cells ran in Slurm jobs, but are not in the table" in note for note in found.notes)
    assert any("Slurm charges" in text for text in found.text)


def test_the_report_says_nothing_of_slurm_where_there_is_none(tmp_path):
    write_study(tmp_path, seeds=range(2))
    found, tables = report(tmp_path)
    assert not any("slurm" in name for name in tables)
    assert "Slurm" not in " ".join(found.text + found.notes)


def test_the_report_asks_slurm_by_itself(tmp_path, slurm, capsys):
    paths = write_cell(tmp_path, [(0, 5, driver())])
    slurm(row("12", "COMPLETED", 0, 75))
    assert report_main([str(tmp_path / "default"), "--summary"]) == 0
    assert "missing" not in json.loads(paths.slurm.read_text())
    paths.slurm.unlink()
    assert report_main([str(paths.root), "--summary"]) == 0, "of one cell as well"
    assert CellPaths.of(paths.root).slurm.exists()
    capsys.readouterr()


V2 = {"memory.peak": "5000\n", "cpu.stat": "usage_usec 2500000\nuser_usec 1\n"}
V1 = {"memory/memory.max_usage_in_bytes": "5000\n", "cpuacct/cpuacct.usage": "2500000000\n"}


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_kernel_counted_for_the_job_where_a_site_has_cgroups(version, tmp_path):
    own = tmp_path / "cgroup"
    if version == 2:
        own.write_text("0::/system.slice/slurmstepd.scope/job_12/step_batch/user/task_0\n")
        files = {f"system.slice/slurmstepd.scope/job_12/{name}": text for name, text in V2.items()}
    else:
        own.write_text(
            "4:memory:/slurm/uid_0/job_12/step_batch\n3:cpuacct:/slurm/uid_0/job_12/step_batch\n1:name=x:/\n"
        )
        files = {name.replace("/", "/slurm/uid_0/job_12/"): text for name, text in V1.items()}
    for name, text in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text)
    assert cgroup_usage(tmp_path / "sys", own) == {"memory_peak": 5000, "cpu_seconds": pytest.approx(2.5)}


def test_no_cgroup_of_a_job_is_no_usage(tmp_path):
    (tmp_path / "own").write_text("0::/user.slice\n")
    assert cgroup_usage(tmp_path, tmp_path / "own") is None
    assert cgroup_usage(tmp_path, tmp_path / "nothing") is None
