"""Which GPUs there are, and whether the installed torch can use them; without importing torch."""

import csv
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.context import UserError

CU126 = (
    "uv pip install --reinstall-package torch --reinstall-package torchvision --torch-backend=cu126 torch torchvision"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]  # compute capability, e.g. (7, 0)

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


def visible_gpus() -> list[Gpu]:
    """The GPUs ``nvidia-smi`` lists, in the order and selection of ``CUDA_VISIBLE_DEVICES``; [] without a driver.

    Errors: UserError if ``CUDA_VISIBLE_DEVICES`` selects something by a name this function cannot resolve (MIG).
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if found.returncode != 0:
        return []
    gpus = [_parse(row) for row in csv.reader(found.stdout.splitlines(), skipinitialspace=True) if len(row) == 4]
    return _selected(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _parse(row: list[str]) -> Gpu:
    major, minor = row[3].strip().split(".")
    return Gpu(int(row[0]), row[1].strip(), row[2].strip(), (int(major), int(minor)))


def _selected(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """CUDA's rule: a list of indices or UUID prefixes, cut off at the first index that does not exist."""
    if visible is None:
        return gpus
    selected: list[Gpu] = []
    for entry in filter(None, (entry.strip() for entry in visible.split(","))):
        if entry.startswith("MIG"):
            raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: MIG slices are not supported, name whole GPUs")
        match = [gpu for gpu in gpus if entry == str(gpu.index) or (entry[0] == "G" and gpu.uuid.startswith(entry))]
        if not match:
            break
        selected += match
    return selected


def check_supported(gpus: Iterable[Gpu], arch_list: Iterable[str]) -> None:
    """Refuse GPUs that the installed torch (``arch_list = torch.cuda.get_arch_list()``) has no kernels for.

    ``sm_XY`` runs on capability X.Z with Z >= Y; ``compute_XY`` (PTX) on anything from X.Y on. Errors: UserError.
    """
    archs = list(arch_list)
    for gpu in gpus:
        if any(_runs_on(arch, gpu.capability) for arch in archs):
            continue
        remedy = (
            f"install its cu126 build, which has them: {CU126}"
            if (5, 0) <= gpu.capability <= (9, 0)
            else "install a torch build that has them, or hide the GPU with CUDA_VISIBLE_DEVICES"
        )
        supported = ", ".join(archs) or "none: a CPU-only build"
        raise UserError(
            f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability[0]}.{gpu.capability[1]} ({gpu.sm}), "
            f"which the installed torch has no kernels for (it has {supported}); {remedy}"
        )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    kind, built = match[1], (int(match[2]), int(match[3]))
    if match[4] == "a":  # architecture-specific code, for exactly that capability
        return built == capability
    if kind == "compute" and not match[4]:
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def default_n_workers(gpus_each: int = 1) -> int:
    """One worker for every ``gpus_each`` GPUs; 2 if there are none. Errors: UserError if there are fewer."""
    return len(grouped([gpu.uuid for gpu in visible_gpus()], gpus_each)) or 2


def grouped(gpus: Sequence[str], each: int) -> list[str]:
    """The GPUs in groups of ``each`` as CUDA_VISIBLE_DEVICES names them; those left over are in none. Errors: UserError
    if there are some, but not enough for one group."""
    if 0 < len(gpus) < each:
        raise UserError(f"workers of {each} GPUs are asked for (task.gpus_per_trial), this machine shows {len(gpus)}")
    return [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]
