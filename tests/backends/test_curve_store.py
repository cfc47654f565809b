"""The curve store: rows written once, by any number of processes, through kills; checkpoints in a bounded space."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.context import UserError
from backends.curve_store import CurveStore, Row
from tests.conftest import ROOT

KEY = {"task": {"name": "digits"}, "config": {"lr": 0.1, "depth": 3}, "seed": 2**62 + 1}
WRITER = """
import sys
from backends.curve_store import CurveStore, Row
path, who, curves, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with CurveStore(path) as store:
    for n in range(rows):
        for k in range(curves):
            curve = store.curve({"k": k})
            if len(curve.rows) <= n:
                store.append(curve, Row({"n": len(curve.rows), "who": who}))
                store.save_checkpoint(curve, len(curve.rows), b"x" * 1000)
        print(n, flush=True)
"""


def writer(path: Path, who: str, curves: int, rows: int) -> subprocess.Popen:
    arguments = [sys.executable, "-c", WRITER, str(path), who, str(curves), str(rows)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_rows_are_written_once_and_read_back_exactly(tmp_path):
    row = Row({"loss": 0.1 + 0.2, "nan": float("nan"), "busy": {"train": 1e-9}, "none": None}, seconds=0.25)
    with CurveStore(tmp_path / "s.sqlite") as one, CurveStore(tmp_path / "s.sqlite") as other:
        mine, theirs = one.curve(KEY), other.curve({"seed": 2**62 + 1, "config": {"depth": 3, "lr": 0.1}, **KEY})
        assert mine.id == theirs.id
        one.append(mine, row)
        other.append(theirs, Row({"loss": 9.0}))
        assert len(theirs.rows) == 1
        assert repr(theirs.rows[0]) == repr(mine.rows[0]) == repr(row)
        other.append(theirs, Row(None, failure="loss is nan", details={"busy": {"train": 2.0}}))
        one.refresh(mine)
        assert mine.rows[1] == theirs.rows[1]
    with CurveStore(tmp_path / "s.sqlite") as later:
        assert later.curve(KEY).rows[1].failure == "loss is nan"
        assert later.curve({**KEY, "seed": 0}).rows == []


def test_two_processes_write_the_same_curves_at_once(tmp_path):
    path = tmp_path / "s.sqlite"
    both = [writer(path, who, curves=5, rows=40) for who in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    with CurveStore(path) as store:
        for k in range(5):
            rows = store.curve({"k": k}).rows
            assert [row.report["n"] for row in rows] == list(range(40))  # type: ignore[index]
        assert store.counts()["rows"] == 200


def test_a_kill_loses_nothing_that_was_written(tmp_path):
    path = tmp_path / "s.sqlite"
    for attempt in range(3):
        process = writer(path, str(attempt), curves=3, rows=10**6)
        assert process.stdout is not None
        while int(process.stdout.readline()) < 30 * (attempt + 1):
            pass
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with CurveStore(path) as store:
            for k in range(3):
                numbers = [row.report["n"] for row in store.curve({"k": k}).rows]  # type: ignore[index]
                assert numbers == list(range(len(numbers)))
                assert len(numbers) > 30 * (attempt + 1)
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_least_recently_used_checkpoint_goes_first(tmp_path):
    with CurveStore(tmp_path / "s.sqlite", max_bytes=250) as store:
        a, b, c = (store.curve({"k": k}) for k in "abc")
        for curve in (a, b):
            store.append(curve, Row({"n": 0}))
            store.save_checkpoint(curve, 1, bytes(100))
        assert store.checkpoint(a) == bytes(100)
        store.save_checkpoint(c, 1, bytes(100))
        assert store.checkpoint(b) is None
        assert store.checkpoint(a) is not None
        assert store.checkpoint(c) is not None
        assert len(store.curve({"k": "b"}).rows) == 1, "only the checkpoint goes"
        store.save_checkpoint(b, 1, bytes(251))
        assert store.counts()["checkpoint_bytes"] == 200, "one that is larger than the limit costs nobody else's"


def test_an_older_checkpoint_does_not_replace_a_further_one(tmp_path):
    with CurveStore(tmp_path / "s.sqlite") as store:
        curve = store.curve(KEY)
        for rows, content in ((3, b"three"), (2, b"two")):
            store.save_checkpoint(curve, rows, content)
        assert store.checkpoint(curve) == b"three"


def test_a_file_that_is_no_store_is_the_users_mistake(tmp_path):
    (tmp_path / "text").write_text("this is no database, but it is long enough to be taken for one " * 50)
    with pytest.raises(UserError, match=r"cannot use .*text as a curve store"):
        CurveStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE rows (mine INTEGER)")
    other.close()
    with pytest.raises(UserError, match="no curve store"):
        CurveStore(tmp_path / "other.sqlite")
    with CurveStore(tmp_path / "s.sqlite") as store:
        store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99"):
        CurveStore(tmp_path / "s.sqlite")


def test_what_was_exported_can_be_put_elsewhere(tmp_path):
    with CurveStore(tmp_path / "a.sqlite", origin={"cpu": "A"}) as a, CurveStore(tmp_path / "b.sqlite") as b:
        curve = a.curve(KEY)
        a.complete(curve, [Row({"n": 0}), Row({"n": 1}), Row(None, failure="nan")])
        a.curve({"empty": True})
        exported = list(a.export())
        assert [(key, origin) for key, origin, _ in exported] == [(KEY, {"cpu": "A"})]
        assert sum(b.put(*entry) for entry in exported) == 3
        assert sum(b.put(*entry) for entry in exported) == 0
        assert list(b.export()) == exported


def test_rows_that_another_process_added_meanwhile_stay_in_their_places(tmp_path):
    rows = [Row({"n": n}) for n in range(9)]
    with CurveStore(tmp_path / "s.sqlite") as a, CurveStore(tmp_path / "s.sqlite") as b:
        stale, curve = b.curve(KEY), a.curve(KEY)
        assert a.complete(curve, rows[:3]) == 3
        assert b.complete(stale, rows) == 6
        assert stale.rows == b.curve(KEY).rows == rows
        ended = a.curve({"k": "ended"})
        a.complete(ended, [rows[0], Row(None, failure="nan")])
        b.append(b.curve({"k": "ended"}), rows[1])
        assert b.complete(b.curve({"k": "ended"}), rows) == 0
        assert len(b.curve({"k": "ended"}).rows) == 2


def test_a_failed_transaction_leaves_the_store_usable(tmp_path):
    with CurveStore(tmp_path / "s.sqlite") as store:
        curve = store.curve(KEY)
        size = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {size + 4}")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            store.complete(curve, [Row({"n": n, "text": "x" * 3000}) for n in range(50)])
        store._db.execute("PRAGMA max_page_count = 100000")
        assert store.complete(store.curve(KEY), [Row({"n": 0})]) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 80), st.booleans()), max_size=30))
def test_checkpoints_never_exceed_the_limit_and_the_newest_fitting_one_is_there(tmp_path_factory, steps):
    with CurveStore(tmp_path_factory.mktemp("store") / "s.sqlite", max_bytes=100) as store:
        for number, (name, size, read) in enumerate(steps, 1):
            curve = store.curve({"k": name})
            if read:
                store.checkpoint(curve)
            else:
                store.save_checkpoint(curve, number, bytes(size))
                assert store.checkpoint(curve) == bytes(size)
            assert store.counts()["checkpoint_bytes"] <= 100
