"""Where a result came from: command, commit, versions, hardware. Goes into every cell's meta.json."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("syne-tune", "torch", "torchvision", "numpy", "scipy", "hydra-core", "omegaconf", "scikit-learn")
DIFF_LIMIT = 200_000  # characters of an uncommitted diff that are kept
ROOT = Path(__file__).resolve().parent.parent
COMMIT_FILE = "commit.json"  # in a copy of the code (harness/slurm/snapshot.py): the commit and diff it was made of


def provenance(command: list[str], gpus: list[str]) -> dict[str, Any]:
    """One dict, JSON-able; ``commit`` is None outside a git checkout, ``diff`` the uncommitted changes."""
    commit, diff = commit_and_diff()
    return {
        "time": time.time(),
        "command": command,
        "commit": commit,
        "diff": diff,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "executable": sys.executable,
    }


def commit_and_diff() -> tuple[str | None, str]:
    """The commit of the code that runs, None if it is not known, and the uncommitted changes."""
    if (ROOT / COMMIT_FILE).exists():
        kept = json.loads((ROOT / COMMIT_FILE).read_bytes())
        return kept["commit"], kept["diff"]
    return _git("rev-parse", "HEAD"), (_git("diff", "HEAD") or "")[:DIFF_LIMIT]


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout this package lies in; None where it is no checkout (an installed wheel)."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
