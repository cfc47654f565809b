import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from harness import record
from harness.ownership import CellBusy, cell_lock
from harness.record import (
    CellPaths,
    EventLog,
    RecordError,
    plain,
    read_config,
    read_events,
    read_summary,
    read_trials,
    report_columns,
    set_aside,
    summarize,
    time_to,
    trial_rows,
    write_atomic,
)
from tests.harness.fake_results import FakeCell

OPEN = {"e": "open", "t": 0.0, "run": 1}
START = {"e": "start", "t": 0.1, "trial": 0, "config": {"lr": 0.1}}


def report(trial, epoch, t, validation, test, **more):
    result = {"epoch": epoch, "validation_score": validation, "test_score": test, **more}
    return {"e": "report", "t": t, "trial": trial, "decision": "CONTINUE", "result": result}


def write(path, *events):
    with EventLog(path) as log:
        for event in events:
            log.append(event)


def test_paths_of_a_cell_are_all_below_its_folder_but_the_lock(tmp_path):
    paths = CellPaths(tmp_path, "default", "digits-asha-off-0-abc")
    assert paths.root == tmp_path / "default" / "digits-asha-off-0-abc"
    assert paths.events.parent == paths.config.parent == paths.checkpoints.parent == paths.root
    assert paths.root not in paths.lock.parents
    assert CellPaths.of(paths.root) == paths


def test_events_come_back_as_written(tmp_path):
    events = [OPEN, {"e": "start", "t": 0.5, "trial": 0, "config": {"lr": np.float64(0.1), "name": "é\n"}}]
    write(tmp_path / "e", *events, report(0, 1, 1.0, math.nan, 0.5))
    got, problems = read_events(tmp_path / "e")
    assert problems == []
    assert got[:2] == events
    assert math.isnan(got[2]["result"]["validation_score"])


def test_a_missing_record_has_no_events(tmp_path):
    assert read_events(tmp_path / "none") == ([], [])


def test_a_kill_at_any_byte_of_the_last_line_loses_that_line_only(tmp_path):
    path = tmp_path / "events.jsonl"
    last = report(0, 1, 1.0, 0.5, 0.5)
    write(path, OPEN, START, last)
    whole = path.read_bytes()
    first = whole.rindex(b"\n", 0, -1) + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        events, problems = read_events(path)
        complete = end >= len(whole) - 1  # an object is complete before its newline
        assert events == ([OPEN, START, last] if complete else [OPEN, START])
        torn = first < end < len(whole) - 1
        assert [(p.line, p.fatal) for p in problems] == ([(3, False)] if torn else [])

        write(path, {**OPEN, "run": 2}, report(0, 2, 2.0, 0.6, 0.6))  # the same command again
        assert path.read_bytes().startswith(whole[:end])  # nothing is rewritten in place
        events, problems = read_events(path)
        assert [e["e"] for e in events] == ["open", "start", *(["report"] if complete else []), "open", "report"]
        assert not any(problem.fatal for problem in problems)
        assert len(problems) == torn


def test_a_kill_while_reopening_after_a_kill_is_still_only_torn(tmp_path):
    path = tmp_path / "e"
    write(path, OPEN)
    path.write_bytes(path.read_bytes() + b'{"e": "rep')
    torn_once = path.read_bytes()
    write(path, {**OPEN, "run": 2})
    path.write_bytes(path.read_bytes()[: len(torn_once) + 9])
    write(path, {**OPEN, "run": 3})
    events, problems = read_events(path)
    assert [e["run"] for e in events] == [1, 3]
    assert [(p.line, p.fatal) for p in problems] == [(2, False), (3, False)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"e": "report", "t": 1.0, "tr', "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("", "not a JSON object"),
        ('{"e": "start", "t": 1.0, "trial": 0, "config": "\xe9"}', "not a JSON object"),
        ('{"t": 1.0}', "needs a kind"),
        ('{"e": "start", "t": 1.0}', "lacks trial, config"),
        ('{"e": "report", "t": 1.0, "trial": 0, "result": 3}', "no result"),
        ('{"e": "report", "t": 1.0, "trial": 0, "result": {"epoch": 1, "test_score": 0}}', "lacks validation_score"),
    ],
)
def test_a_damaged_line_in_the_middle_is_fatal_and_named(tmp_path, line, what):
    path = tmp_path / "events.jsonl"
    after = report(0, 1, 2.0, 0.5, 0.5)
    path.write_bytes("\n".join([json.dumps(OPEN), json.dumps(START), line, json.dumps(after), ""]).encode("latin-1"))
    events, (problem,) = read_events(path)
    assert events == [OPEN, START, after]
    assert problem.fatal
    assert problem.line == 3
    assert what in str(problem)
    assert f"{path} line 3" in str(problem)


def test_two_damaged_lines_before_a_reopening_are_not_both_torn(tmp_path):
    path = tmp_path / "e"
    path.write_text("\n".join([json.dumps(OPEN), '{"e": "star', '{"e": "repo', json.dumps(OPEN), ""]))
    assert [(p.line, p.fatal) for p in read_events(path)[1]] == [(2, False), (3, True)]


def test_an_epoch_reported_twice_is_fatal(tmp_path):
    starts = [START, {**START, "trial": 1}]
    epochs = [report(0, 1, 1.0, 0.5, 0.5), report(1, 1, 1.5, 0.5, 0.5), report(0, 1, 2.0, 0.5, 0.5)]
    write(tmp_path / "e", OPEN, *starts, *epochs)
    (problem,) = read_events(tmp_path / "e")[1]
    assert (problem.fatal, problem.line) == (True, 6)
    assert "epoch 1 of trial 0" in problem.what


def test_a_record_without_its_beginning_is_fatal(tmp_path):
    write(tmp_path / "e", START, report(0, 1, 1.0, 0.5, 0.5))
    (problem,) = read_events(tmp_path / "e")[1]
    assert problem.fatal
    assert "begin" in problem.what


def test_a_report_of_a_trial_that_was_never_started_is_fatal(tmp_path):
    write(tmp_path / "e", OPEN, START, report(1, 1, 1.0, 0.5, 0.5))
    (problem,) = read_events(tmp_path / "e")[1]
    assert problem.fatal
    assert "trial 1 was never started" in problem.what


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write(tmp_path / "e", OPEN)
    assert read_events(tmp_path / "e") == ([OPEN], [])


def test_a_full_disk_is_an_error_that_names_the_file():
    with EventLogOnFullDisk() as log, pytest.raises(OSError, match="/dev/full") as caught:
        log.append(OPEN)
    assert caught.value.errno == errno.ENOSPC


class EventLogOnFullDisk(EventLog):
    """/dev/full takes no fsync, which close() would do."""

    def __init__(self):
        super().__init__("/dev/full")

    def close(self):
        os.close(self._fd)


def test_a_line_that_did_not_fit_is_taken_back(tmp_path, monkeypatch):
    real, left = os.write, [len(json.dumps(OPEN)) + 10]

    def limited(fd, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, data[: left[0]])
        left[0] -= written
        return written

    path = tmp_path / "e"
    log = EventLog(path)
    monkeypatch.setattr(os, "write", limited)
    log.append(OPEN)
    with pytest.raises(OSError, match="No space left"):
        log.append({"e": "none", "t": 1.0})
    monkeypatch.setattr(os, "write", real)
    log.append({"e": "none", "t": 2.0})
    log.close()
    assert read_events(path) == ([OPEN, {"e": "none", "t": 2.0}], [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        EventLog(tmp_path / "e")
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "f", "x")


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "cell").write_text("not a folder")
    with pytest.raises(NotADirectoryError):
        EventLog(tmp_path / "cell" / "events.jsonl")


def test_lines_are_synced_after_the_interval_and_on_close(tmp_path, monkeypatch):
    calls: list[int] = []
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", calls.append)
    log = EventLog(tmp_path / "e", sync_seconds=5.0)
    log.append(OPEN)
    assert len(calls) == 0
    now[0] = 6.0
    log.append(OPEN)
    log.append(OPEN)
    assert len(calls) == 1
    log.close()
    log.close()
    assert len(calls) == 2


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def fail(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


HOLD = """
import sys
from harness.ownership import cell_lock
with cell_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_hold_one_cell(tmp_path):
    lock = CellPaths(tmp_path, "default", "cell").lock
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CellBusy, match=f"process {other.pid} on "), cell_lock(lock):
            pass
        other.kill()
        other.wait()
        with cell_lock(lock):  # the kernel frees it, however its holder ends
            pass


def test_the_lock_outlives_setting_the_cell_aside_and_is_freed_by_an_error(tmp_path):
    paths = FakeCell().write(tmp_path)

    def fail_while_held():
        with cell_lock(paths.lock):
            set_aside(paths)
            with pytest.raises(CellBusy), cell_lock(paths.lock):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_while_held()
    with cell_lock(paths.lock):
        pass


def test_setting_aside_numbers_upwards(tmp_path):
    cell = FakeCell()
    names = []
    for _ in range(3):
        paths = cell.write(tmp_path)
        names.append(set_aside(paths).name)
        assert not paths.root.exists()
    assert names == [f"{cell.folder}.broken-{i}" for i in (1, 2, 3)]


def test_the_incumbent_is_the_first_best_on_validation():
    events = [OPEN, report(0, 1, 1.0, 0.5, 0.9), report(1, 1, 2.0, 0.7, 0.6), report(0, 2, 3.0, 0.7, 0.99),
              report(0, 3, 4.0, math.nan, 1.0), report(1, 2, 5.0, 0.8, 0.7)]  # fmt: skip
    columns = report_columns(events)
    assert columns["best_validation_score"] == [0.5, 0.7, 0.7, 0.7, 0.8]
    assert columns["incumbent_test_score"] == [0.9, 0.6, 0.6, 0.6, 0.7]
    summary = summarize({"labels": {}, "seed": 0, "task": {"tau": 0.7, "taus": [0.9, 0.99]}}, events)
    assert summary["incumbent"]["trial"] == 1
    assert summary["incumbent"]["epoch"] == 2
    assert (summary["best_validation_score"], summary["incumbent_test_score"]) == (0.8, 0.7)
    assert summary["t_tau"]["0.7"] == {
        "wallclock": 1.0, "gpu_hours": 0.0, "validation_wallclock": 2.0, "validation_gpu_hours": 0.0,
    }  # fmt: skip
    assert summary["t_tau"]["0.9"]["wallclock"] == 1.0
    assert summary["t_tau"]["0.99"]["wallclock"] is None


def test_smaller_is_better_where_the_task_says_so():
    events = [OPEN, report(0, 1, 1.0, 3.0, 3.5), report(0, 2, 2.0, 2.0, 2.5), report(0, 3, 3.0, 2.5, 1.0)]
    summary = summarize({"labels": {}, "seed": 0, "task": {"tau": 2.5, "mode": "min"}}, events)
    assert (summary["best_validation_score"], summary["incumbent_test_score"]) == (2.0, 2.5)
    assert summary["t_tau"]["2.5"]["wallclock"] == 2.0
    assert time_to(2.5, [math.nan, 2.6], [1.0, 2.0], "min") is None


def test_busy_seconds_flops_memory_and_failures_add_up():
    busy = {"startup": 1.0, "warm_start": 2.0, "train": 5.0, "validate": 1.0, "test": 7.0, "checkpoint": 1.0}
    warm = {"fallback": "not finite", "peak_memory": 30}
    events = [
        OPEN,
        {"e": "start", "t": 0.0, "trial": 0, "config": {}},
        report(0, 1, 1.0, 0.5, 0.5, busy=busy, flops={"train": 90, "warm_start": 10}, peak_memory=20, warm_start=warm),
        report(0, 2, 2.0, 0.6, 0.6, busy={"train": 5.0, "test": 1.0}, flops={"train": 100}, peak_memory=25),
        {"e": "error", "t": 3.0, "trial": 0, "reason": "diverged", "busy": {"train": 3.0}},
        {"e": "retry", "t": 3.5, "trial": 0, "attempt": "0001-0001", "reason": "lost"},
        {"e": "close", "t": 4.0, "why": "finished", "reason": "budget.epochs"},
    ]
    summary = summarize({"labels": {"task": "x"}, "seed": 3, "task": {}}, events)
    assert summary["busy"]["train"] == 13.0
    assert summary["gpu_hours"] == pytest.approx(18.0 / 3600)
    assert summary["flops"] == {"train": 190, "warm_start": 10}
    assert summary["peak_memory"] == {"train": 25, "warm_start": 30}
    assert summary["warm_start_share"] == {"busy": pytest.approx(2 / 18), "flops": pytest.approx(0.05)}
    assert {k: summary[k] for k in ("trials", "epochs", "failures", "retries", "warm_started", "fallbacks")} == {
        "trials": 1, "epochs": 2, "failures": 1, "retries": 1, "warm_started": 1, "fallbacks": 1,
    }  # fmt: skip
    assert (summary["stop_reason"], summary["wallclock"]) == ("budget.epochs", 4.0)
    assert report_columns(events)["gpu_hours"] == pytest.approx([10 / 3600, 15 / 3600])


def test_a_cell_without_reports_has_a_summary():
    summary = summarize({"labels": {}, "seed": 0, "task": {"tau": 0.9}}, [])
    assert summary["best_validation_score"] is None
    assert summary["t_tau"]["0.9"]["wallclock"] is None
    assert summary["stop_reason"] == "running or killed"


def test_trial_rows_follow_from_the_events(tmp_path):
    warm = {"x": {"lr": 0.1}, "x_prime": {"lr": 0.2}}
    events = [
        OPEN,
        {"e": "start", "t": 0.0, "trial": 0, "config": {"lr": 0.1}},
        {"e": "start", "t": 0.0, "trial": 1, "config": {"lr": 0.3}},
        report(0, 1, 1.0, 0.5, 0.5, warm_start=warm),
        report(1, 1, 2.0, 0.5, 0.5),
        report(0, 2, 3.0, 0.5, 0.5),
    ]
    rows = trial_rows(events)
    assert rows == [{"trial": 0, "t": 1.0, **warm}, {"trial": 1, "t": 2.0, "x": {"lr": 0.3}}]
    write(tmp_path / "trials.jsonl", *rows)
    with open(tmp_path / "trials.jsonl", "ab") as file:
        file.write(b'{"trial": 7, "t"')
    got, (problem,) = read_trials(tmp_path / "trials.jsonl")
    assert got == {0: rows[0], 1: rows[1]}
    assert not problem.fatal


def test_configurations_survive_yaml(tmp_path):
    paths = FakeCell(variant="on", warm_seconds=0.1).write(tmp_path)
    assert read_config(paths)["labels"]["variant"] == "on"  # not true
    paths.config.write_text("labels: [")
    with pytest.raises(RecordError, match=r"config\.yaml is not readable YAML"):
        read_config(paths)
    paths.config.write_text("x: 1")
    with pytest.raises(RecordError, match="no labels"):
        read_config(paths)
    paths.config.unlink()
    with pytest.raises(RecordError, match="missing"):
        read_config(paths)


def test_summaries_are_strict_json(tmp_path):
    paths = FakeCell(scores=[(math.nan, math.nan)]).write(tmp_path)
    summary = json.loads(paths.summary.read_text(), parse_constant=pytest.fail)
    assert summary["best_validation_score"] is None
    assert read_summary(paths) == summary
    paths.summary.write_text('{"labels"')
    with pytest.raises(RecordError, match=r"summary\.json is not readable JSON"):
        read_summary(paths)
    paths.summary.unlink()
    assert read_summary(paths) is None


def test_plain_is_for_strict_json():
    value = {1: (np.float32(0.5), math.inf), "path": record.Path("a"), "n": np.int64(3), "no": None}
    assert plain(value) == {"1": [0.5, None], "path": "a", "n": 3, "no": None}
