"""Named random streams: fixed by seed and name, and by nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.seeds import rng, stream, torch_seed

NAME = st.lists(st.text(max_size=5) | st.integers(0, 99), min_size=1, max_size=3)
SEED = st.integers(0, 2**32)


@given(seed=SEED, name=NAME)
def test_a_stream_is_fixed_by_seed_and_name(seed, name):
    assert rng(seed, *name).random(4).tolist() == rng(seed, *name).random(4).tolist()


@given(first=st.tuples(SEED, NAME), second=st.tuples(SEED, NAME))
def test_different_seeds_or_names_give_different_streams(first, second):
    equal = first == second
    draws = [tuple(stream(seed, *name).generate_state(4)) for seed, name in (first, second)]
    assert (draws[0] == draws[1]) == equal


@pytest.mark.parametrize(("a", "b"), [((1,), ("1",)), (("a", "b"), ("ab",)), (("a", 1), ("a", 1, 0))])
def test_names_that_look_alike_differ(a, b):
    assert rng(0, *a).random() != rng(0, *b).random()


@given(seed=SEED, name=NAME)
def test_torch_accepts_the_seed(seed, name):
    torch.Generator().manual_seed(torch_seed(seed, *name))
    assert 0 <= torch_seed(seed, *name) < 2**63


def test_streams_are_those_of_earlier_versions():
    """Records of finished experiments can only be continued if these never change."""
    assert torch_seed(0, "init") == 1161179812306890763
    assert rng(7, "configuration", 3).random() == 0.5407594169406221


def test_streams_do_not_depend_on_the_hash_seed():
    code = "from harness.seeds import torch_seed; print(torch_seed(5, 'batches', 2))"
    root = str(Path(__file__).resolve().parents[2])
    for hash_seed in ("0", "77"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert int(done.stdout) == torch_seed(5, "batches", 2)
