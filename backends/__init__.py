"""Syne Tune backends for trial functions: ``PoolBackend`` (warm workers), ``SlurmBackend`` (warm workers that are Slurm
jobs), ``LocalTrialBackend`` (a process a trial) and ``SimulatedBackend`` (virtual workers over a store of curves)."""

import importlib
from typing import Any

_HOMES = {
    "CurveStore": "backends.curve_store",
    "LocalTrialBackend": "backends.local",
    "PoolBackend": "backends.pool",
    "SimulatedBackend": "backends.simulated",
    "SlurmBackend": "backends.slurm",
    "SlurmWorkers": "backends.slurm",
    "WorkerPool": "backends.pool",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import on first use: worker processes need neither Syne Tune nor the pool."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'backends' has no attribute {name!r}")
