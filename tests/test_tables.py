"""Tables of curves: recorded in batches, replayed in virtual time, carried elsewhere as a Parquet file."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from backends.curve_store import CurveStore
from tests.conftest import ROOT, read_lines

TASK = ["task.model=mlp", "task.max_epochs=3", "ohgw=off,normalized"]
CELLS = ["backend=simulated", "scheduler=asha", "budget.epochs=null", "budget.trials=8", "n_workers=2"]


@pytest.fixture
def script(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / name), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


def curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    with CurveStore(path) as store:
        return {f"{key['ohgw']} {sorted(key['config'].items())}": [row.report or {} for row in rows]
                for key, _, rows in store.export()}  # fmt: skip


@pytest.mark.slow
def test_a_recorded_table_is_what_live_trials_would_have_reported(tmp_path, script, harness):
    done = script("record_table.py", "--configs", "9", "--sample", "2", "--chunk", "5", *TASK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one at a time, 1 thread:" in done.stdout
    assert "times as many" in done.stdout
    replayed = harness(*CELLS, *TASK, "name=table")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert " 0 run (0 epochs)" in replayed.stdout
    assert harness(*CELLS, *TASK, "name=live", "backend.store=live.sqlite").returncode == 0
    table, live = curves(tmp_path / "results" / "curves.sqlite"), curves(tmp_path / "live.sqlite")
    assert len(table) == 18
    assert 12 <= len(live) <= 16
    for key, reports in live.items():
        assert set(reports[0]) == set(table[key][0]), "the same fields"
        for mine, theirs in zip(table[key], reports, strict=False):
            assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-3)
            assert mine["flops"] == theirs["flops"]
            assert set(mine["busy"]) == set(theirs["busy"])
            if "warm_start" in mine:
                measured = ("seconds", "peak_memory")
                assert {k: v for k, v in mine["warm_start"].items() if k not in measured} == {
                    k: v for k, v in theirs["warm_start"].items() if k not in measured
                }


def test_a_table_carried_elsewhere_replays_the_same(tmp_path, script, harness):
    words = [*CELLS[:1], "scheduler=asha", "budget.epochs=30", *TASK]
    assert harness(*words, "name=here").returncode == 0
    exported = script("curve_store.py", "export", "results/curves.sqlite", "table.parquet")
    assert exported.returncode == 0, exported.stderr
    table = pq.read_table(tmp_path / "table.parquet").to_pandas()
    assert set(table["estimator"]) == {"off", "lookahead"}
    assert table["test_score"].between(0, 1).all()
    assert (table["seconds"] > 0).all()
    imported = script("curve_store.py", "import", "table.parquet", "there/curves.sqlite")
    assert imported.returncode == 0, imported.stderr
    shown = script("curve_store.py", "show", "there/curves.sqlite")
    assert "Digits/mlp  ohgw=off" in shown.stdout
    done = harness(*words, "name=there", "backend.store=there/curves.sqlite")
    assert " 0 run (0 epochs)" in done.stdout
    for cell in (tmp_path / "results" / "here").glob("*/events.jsonl"):
        assert cell.read_bytes() == (tmp_path / "results" / "there" / cell.parent.name / "events.jsonl").read_bytes()
        assert read_lines(cell)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("record_table.py", "backend=pool"), "backend=pool is not possible here"),
        (("record_table.py", "--configs", "0"), "--configs must be at least 1"),
        (("record_table.py", "--epochs", "30"), "is more than task.max_epochs=27"),
        (("record_table.py", "ohgw=of"), "did you mean off"),
        (("curve_store.py", "show", "nothing.sqlite"), "there is no curve store nothing.sqlite"),
        (("curve_store.py", "import", "text", "new.sqlite"), "cannot read text as a Parquet file"),
        (("curve_store.py", "import", "other.parquet", "new.sqlite"), "is no table of curves"),
    ],
)
@pytest.mark.slow
def test_mistakes(words, message, tmp_path, script):
    import pandas as pd

    (tmp_path / "text").write_text("no table")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    done = script(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
