"""scripts/example_plain_pytorch.py: the hook takes at most 20 lines, and the script runs with and without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "scripts" / "example_plain_pytorch.py"


def split() -> tuple[list[str], list[str]]:
    """(lines outside the marks, lines between them)."""
    plain: list[str] = []
    added: list[str] = []
    inside = False
    for line in EXAMPLE.read_text().splitlines():
        mark = line.strip() in ("# OHGW begin", "# OHGW end")
        inside = inside != mark
        if not mark:
            (added if inside else plain).append(line)
    assert not inside
    return plain, added


def test_the_hook_takes_at_most_twenty_lines():
    plain, added = split()
    assert 0 < len(added) <= 20
    body = "\n".join(plain).split('"""', 2)[2]
    assert "ohgw" not in body.lower()
    assert "warm" not in body.lower()


@pytest.mark.slow
@pytest.mark.parametrize("hooked", [True, False])
def test_the_script_tunes_with_and_without_the_hook(hooked: bool, tmp_path: Path):
    script = EXAMPLE if hooked else tmp_path / "example_without.py"
    if not hooked:
        script.write_text("\n".join(split()[0]) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SYNETUNE_FOLDER": str(tmp_path / "results")}
    command = [sys.executable, str(script), "--trials", "2", "--epochs", "2", "--workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "best trial:" in done.stdout
    [table] = [pd.read_csv(file) for file in (tmp_path / "results").rglob("results.csv.zip")]
    assert table["trial_id"].nunique() >= 2
    assert ("warm_start" in table) == hooked
    if hooked:
        records = table["warm_start"].dropna()
        assert len(records) == table["trial_id"].nunique()
        for text in records:
            record = json.loads(text.replace("'", '"').replace("None", "null"))
            assert record["estimator"] == "lookahead"
            assert record["x"] != record["x_prime"]
