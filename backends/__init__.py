"""Syne Tune backends for trial functions: ``PoolBackend`` (warm workers), ``LocalTrialBackend`` (a process a trial)."""

from typing import Any

__all__ = ["LocalTrialBackend", "PoolBackend", "WorkerPool"]


def __getattr__(name: str) -> Any:
    """Import on first use: worker processes need neither Syne Tune nor the pool."""
    if name == "LocalTrialBackend":
        from backends.local import LocalTrialBackend

        return LocalTrialBackend
    if name in __all__:
        from backends import pool

        return getattr(pool, name)
    raise AttributeError(f"module 'backends' has no attribute {name!r}")
