"""Decision for decision equality with the published ASHA, PASHA and synchronous Hyperband, on recorded traces."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle.factory import factory
from tests.oracle.replay import check_case, load, run

CASES = sorted((Path(__file__).parent / "dev").glob("*.jsonl"))


def test_all_kinds_of_scheduler_have_cases():
    kinds = {load(path)[0]["scheduler"] for path in CASES}
    assert kinds == {"asha_promotion", "asha_stopping", "pasha", "sync_hyperband"}


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_decisions_equal_the_published_scheduler(path):
    assert check_case(path, factory) is None


@pytest.mark.parametrize("name", ["ashaP_w4", "ashaS_w4", "pasha_w1", "sync_w4"])
def test_replay_notices_another_scheduler(name):
    path = Path(__file__).parent / "dev" / f"{name}.jsonl"

    def other(inp, suggest_config, next_bracket):
        return factory({**inp, "mode": "max"}, suggest_config, next_bracket)

    assert check_case(path, other) is not None


def test_pasha_with_fewer_than_three_levels_behaves_as_asha():
    inp, _ = load(Path(__file__).parent / "dev" / "pasha_w1.jsonl")
    short = {**inp, "max_t": 9, "workers": 4}
    asha = list(run({**short, "scheduler": "asha_promotion"}, factory))
    pasha = list(run(short, factory))
    assert any("resume" in event for event in asha)
    assert [{k: v for k, v in event.items() if k not in ("cap", "eps")} for event in pasha] == asha
    assert {event["cap"] for event in pasha if "cap" in event} == {9}


def test_factory_is_importable_from_any_directory(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from factory import factory; print(factory)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
