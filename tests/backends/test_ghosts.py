"""A driver that was given up but runs on, beside a newer run of itself, cannot touch the newer one's trials."""

import pytest

from backends.context import Checkpoint, CheckpointStore, RestoredTrial, checkpoint_files
from backends.local import LocalTrialBackend
from backends.pool import PoolBackend
from tests.backends.conftest import FUNCTIONS, epochs, finish


def names(backend: PoolBackend, trial_id: int) -> list[str]:
    return sorted(file.name for file in backend.trial_path(trial_id).iterdir())


def started(pool, path, run: int) -> PoolBackend:
    """A driver whose run of that number has trained trial 0, which has printed something."""
    backend = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=path, run=run)
    backend.start_trial({"epochs": 3, "x": 1.0})
    finish(backend, [0])
    (backend.trial_path(0) / f"000{run}-0001.out").write_text("printed\n")
    return backend


def test_a_ghost_that_starts_a_trial_of_the_same_number_deletes_nothing(pool, tmp_path):
    new = started(pool, tmp_path, run=2)
    before = names(new, 0)
    assert before == ["0002-0001.out", "0002-0001.pt"]
    ghost = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=tmp_path, run=1)
    ghost.start_trial({"epochs": 3, "x": 2.0})
    finish(ghost, [0])
    assert set(before) <= set(names(new, 0))
    assert checkpoint_files(new.trial_path(0))[-1].name == "0002-0001.pt", "the newest is what a later attempt loads"


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


def test_a_checkpoint_of_a_ghosts_trial_of_the_same_number_is_not_loaded(pool, tmp_path):
    new = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=tmp_path, run=2)
    new.start_trial({"epochs": 3, "x": 1.0, "sleep": 60})
    CheckpointStore(new.trial_path(0), "0001-0001").save(Checkpoint({"epoch": 2, "by": "ghost"}, 2))
    new.pause_trial(0)
    new.resume_trial(0, {"epochs": 3, "x": 1.0})
    assert epochs(finish(new, [0])[1][0]) == [1, 2, 3]
    third = PoolBackend(f"{FUNCTIONS}.count", pool=pool, path=tmp_path, run=3)
    new.trial_path(0).joinpath("0002-0002.pt").unlink()
    third.restore([RestoredTrial(0, {"epochs": 3, "x": 1.0}, [], "paused", run=2)])
    third.resume_trial(0)
    assert epochs(finish(third, [0])[1][0]) == [1, 2, 3]


def test_a_trial_that_starts_from_a_copy_keeps_it(pool, tmp_path):
    new = started(pool, tmp_path, run=2)
    new.copy_checkpoint(0, 1)
    ghost = PoolBackend(f"{FUNCTIONS}.report_only", pool=pool, path=tmp_path, run=1)
    for _ in range(2):
        ghost.start_trial({"epochs": 1, "x": 2.0})
    finish(ghost, [0, 1])
    assert names(new, 1) == ["0002-0000.pt"]


def test_what_a_ghosts_process_prints_is_not_taken_for_reports(tmp_path):
    new = LocalTrialBackend(f"{FUNCTIONS}.count", path=tmp_path, run=2, stop_grace=1.0)
    new.start_trial({"epochs": 3, "x": 1.0, "sleep": 1.0})
    ghost = LocalTrialBackend(f"{FUNCTIONS}.report_only", path=tmp_path, run=1, stop_grace=1.0)
    ghost.start_trial({"epochs": 10**6, "x": 7.0, "sleep": 0.001})
    try:
        reports = finish(new, [0], 60)[1][0]
        assert [(report["epoch"], report["loss"]) for report in reports] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert ghost.fetch_status_results([0])[1]
    finally:
        ghost.close()
        new.close()
