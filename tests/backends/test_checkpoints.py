"""Checkpoints: atomic, fenced by attempt, and damaged ones skipped."""

from typing import Any

import pytest
import torch

from backends.context import Checkpoint, CheckpointStore, checkpoint_files, copy_checkpoint, trial_seed


def store(folder, attempt: str) -> CheckpointStore:
    return CheckpointStore(folder, attempt)


def load(folder, attempt: str) -> Checkpoint:
    checkpoint = store(folder, attempt).load()
    assert checkpoint is not None
    return checkpoint


def test_round_trip(tmp_path):
    state: dict[str, Any] = {
        "w": torch.arange(3.0),
        "epoch": 2,
        "name": "a",
        "nested": {"list": [1, None, (2, 3)], "nan": float("inf")},
    }
    store(tmp_path, "0001-0001").save(Checkpoint(state, 2, [{"st_worker_iter": 1, "loss": float("nan")}]))
    loaded = load(tmp_path, "0001-0002")
    assert torch.equal(loaded.state.pop("w"), state.pop("w"))
    assert loaded.state == state
    assert loaded.reports == 2
    assert loaded.unconfirmed[0]["st_worker_iter"] == 1


def test_nothing_to_load(tmp_path):
    assert store(tmp_path / "absent", "0001-0001").load() is None


def test_first_save_of_an_attempt_deletes_older_ones(tmp_path):
    store(tmp_path, "0001-0001").save(Checkpoint({"n": 1}, 1))
    assert load(tmp_path, "0001-0002").state == {"n": 1}
    store(tmp_path, "0001-0002").save(Checkpoint({"n": 2}, 2))
    assert [path.name for path in checkpoint_files(tmp_path)] == ["0001-0002.pt"]


def test_ghost_cannot_touch_the_newer_attempt(tmp_path):
    store(tmp_path, "0001-0001").save(Checkpoint({"by": "ghost"}, 1))
    store(tmp_path, "0002-0001").save(Checkpoint({"by": "new"}, 2))
    store(tmp_path, "0001-0001").save(Checkpoint({"by": "ghost"}, 9))
    assert load(tmp_path, "0002-0002").state == {"by": "new"}
    assert load(tmp_path, "0001-0001").state == {"by": "ghost"}, "it reads nothing newer than itself either"


def test_a_ghosts_trial_of_the_same_number_hands_on_no_checkpoint(tmp_path):
    ghost = store(tmp_path, "0001-0001")
    ghost.save(Checkpoint({"by": "ghost"}, 1))
    assert CheckpointStore(tmp_path, "0002-0001", oldest="0002-0000").load() is None
    assert CheckpointStore(tmp_path, "0002-0001", oldest="0001-0000").load() == Checkpoint({"by": "ghost"}, 1)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"x" + b]
)
def test_damaged_checkpoint_is_skipped_for_the_next_older(tmp_path, damage):
    store(tmp_path, "0001-0002").save(Checkpoint({"n": 2}, 2))
    store(tmp_path, "0001-0001").save(Checkpoint({"n": 1}, 1))
    newest = tmp_path / "0001-0002.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match="0001-0002.pt is unreadable"):
        assert load(tmp_path, "0001-0003").state == {"n": 1}


def test_failed_save_leaves_the_last_checkpoint(tmp_path):
    mine = store(tmp_path, "0001-0001")
    mine.save(Checkpoint({"n": 1}, 1))
    with pytest.raises(TypeError):
        mine.save(Checkpoint({"n": 2}, 2, [{"no json": object()}]))
    assert load(tmp_path, "0001-0001").state == {"n": 1}


def test_copy_counts_reports_from_zero(tmp_path):
    store(tmp_path / "a", "0001-0001").save(Checkpoint({"n": 1}, 5, [{"st_worker_iter": 4}]))
    copy_checkpoint(tmp_path / "a", tmp_path / "b", "0001-0000")
    assert load(tmp_path / "b", "0001-0001") == Checkpoint({"n": 1}, 0, [])
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        copy_checkpoint(tmp_path / "c", tmp_path / "d", "0001-0000")


def test_trial_seed_depends_on_both_and_fits_torch():
    seeds = {trial_seed(seed, trial) for seed in range(10) for trial in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert trial_seed(3, 4) == trial_seed(3, 4)
