"""A driver that was given up but runs on, beside a newer run of itself, cannot touch the newer one's trials."""

import pytest

from backends.context import checkpoint_files
from backends.pool import PoolBackend
from tests.backends.conftest import FUNCTIONS, epochs, finish


def names(backend: PoolBackend, trial_id: int) -> list[str]:
    return sorted(file.name for file in backend.trial_path(trial_id).iterdir())


def started(pool, path, run: int) -> PoolBackend:
    """A driver whose run of that number has trained trial 0, which has printed something."""
    backend = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=path, run=run)
    backend.start_trial({"epochs": 3, "x": 1.0})
    finish(backend, [0])
    (backend.trial_path(0) / "std.out").write_text("printed\n")
    return backend


def test_a_ghost_that_starts_a_trial_of_the_same_number_deletes_nothing(pool, tmp_path):
    new = started(pool, tmp_path, run=2)
    before = names(new, 0)
    assert before == ["0002-0001.pt", "std.out"]
    ghost = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=tmp_path, run=1)
    ghost.start_trial({"epochs": 3, "x": 2.0})
    finish(ghost, [0])
    assert set(before) <= set(names(new, 0))
    assert checkpoint_files(new.trial_path(0))[-1].name == "0002-0001.pt", "and what a later attempt loads is the newest"


@pytest.mark.parametrize("run", [1, 2])
def test_what_earlier_runs_left_under_a_new_trials_number_is_deleted(run, pool, tmp_path):
    started(pool, tmp_path, run=1)
    again = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=tmp_path, run=run)
    folder = again.trial_path(0)
    for name in ("0001-0002.tmp", "0001-0001.reason", "0000-0000.pt"):
        (folder / name).write_text("left by a kill")
    again.start_trial({"epochs": 2, "x": 1.0})
    assert epochs(finish(again, [0])[1][0]) == [1, 2], "not from a checkpoint"
    assert names(again, 0) == [f"000{run}-0001.pt"]
