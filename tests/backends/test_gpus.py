"""GPUs, on machines that have none: with a fake nvidia-smi."""

import pytest

from backends.context import UserError
from backends.gpus import Gpu, check_supported, default_n_workers, visible_gpus

TABLE = [
    "0, GPU-aa11, Tesla V100-SXM2-16GB, 7.0",
    "1, GPU-bb22, NVIDIA A100-SXM4-40GB, 8.0",
    "2, GPU-cc33, NVIDIA GeForce RTX 3090, 8.6",
]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """``nvidia_smi(lines, code)`` puts a fake one on PATH."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def fake(lines: list[str], code: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {code}\n")
        script.chmod(0o755)

    return fake


def gpu(capability: tuple[int, int]) -> Gpu:
    return Gpu(0, "GPU-x", "Tesla V100", capability)


def test_all_gpus(nvidia_smi):
    nvidia_smi(TABLE)
    found = visible_gpus()
    assert [g.index for g in found] == [0, 1, 2]
    assert found[0] == Gpu(0, "GPU-aa11", "Tesla V100-SXM2-16GB", (7, 0))
    assert default_n_workers() == 3


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("2,0", [2, 0]), ("", []), ("-1", []), ("1", [1]), ("0,7,1", [0]), ("GPU-bb", [1]), (" 1 , 2 ", [1, 2])],
)
def test_cuda_visible_devices(nvidia_smi, monkeypatch, visible, indices):
    nvidia_smi(TABLE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [g.index for g in visible_gpus()] == indices


def test_mig_slices_are_refused(nvidia_smi, monkeypatch):
    nvidia_smi(TABLE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(UserError, match="MIG"):
        visible_gpus()


def test_no_driver(nvidia_smi, tmp_path):
    assert visible_gpus() == []
    nvidia_smi(["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."], code=9)
    assert visible_gpus() == []
    assert default_n_workers() == 2


@pytest.mark.parametrize(
    ("capability", "archs", "supported"),
    [
        ((7, 0), CU130, False),
        ((7, 0), CU126, True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["compute_80"], True),
        ((7, 0), ["compute_80"], False),
        ((12, 0), CU130, True),
        ((12, 1), CU130, True),
        ((9, 0), ["sm_90a"], True),
        ((8, 0), [], False),
    ],
)
def test_which_gpus_a_torch_build_supports(capability, archs, supported):
    if supported:
        check_supported([gpu(capability)], archs)
    else:
        with pytest.raises(UserError, match="Tesla V100"):
            check_supported([gpu(capability)], archs)


def test_v100_is_refused_by_name_with_the_remedy():
    with pytest.raises(UserError) as refused:
        check_supported([gpu((7, 0))], CU130)
    for words in ("Tesla V100", "7.0", "sm_70", "cu126", "uv pip install", "sm_75"):
        assert words in str(refused.value)
