"""What decides the curve of a trial: its address in the curve store (``backends/curve_store.py``)."""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.function_backend import threads_per_worker
from backends.gpus import default_n_workers
from harness.sweep import Cell, deciding

TRIAL_MODULE = "harness.trial"
WORKER_MODULE = "backends.worker"
OHGW_PACKAGE = "harness.ohgw"


def curve_identity(cell: Cell) -> dict[str, Any]:
    """Task, warm start, code and CPU threads of a cell's trials: with configuration and seed, all that their reports
    depend on on one machine.

    Scheduler, budget, workers and the target are not part of it, nor are the machine and the version of torch, which
    the store notes beside a curve: a table recorded on a GPU can be replayed on a laptop.
    """
    parts, backend = deciding(cell.config), cell.config["backend"]
    warm, each = parts["ohgw"]["estimator"] != "off", parts["task"].get("gpus_per_trial", 1)
    return {
        "task": parts["task"],
        "ohgw": parts["ohgw"],
        "code": code_version(parts["task"]["_target_"], warm),
        "threads": backend["threads"] or threads_per_worker(backend["processes"] or default_n_workers(each)),
    }


@functools.cache
def code_version(task: str, warm: bool) -> str:
    """16 hex digits of the source of the task class ``task`` (dotted name), the trial loop, the worker and all modules
    of their packages that they import, those of OHGW if ``warm``. Comments and layout do not count."""
    roots = [task.rpartition(".")[0], TRIAL_MODULE, WORKER_MODULE]
    packages = {root.partition(".")[0] for root in roots}
    digest = hashlib.sha256()
    trees: dict[str, str] = {}
    while roots:
        module = roots.pop()
        outside = module.partition(".")[0] not in packages or (not warm and module.startswith(OHGW_PACKAGE))
        if module in trees or outside or (file := _source(module)) is None:
            continue
        tree = ast.parse(file.read_bytes())
        trees[module] = ast.dump(tree)
        roots += _imported(tree)
    for module in sorted(trees):
        digest.update(f"{module}\n{trees[module]}\n".encode())
    return digest.hexdigest()[:16]


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imported(tree: ast.Module) -> list[str]:
    """Dotted names that ``tree`` imports, wherever in the file; of ``from a import b``, both a and a.b."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def shown_counts(counts: Mapping[str, int], path: Path) -> str:
    """One sentence on what a sweep asked of the store and what had to be trained."""
    reused = counts["trainings"] - counts["trainings_run"]
    return (
        f"curve store {path}: {counts['trainings']} trainings asked ({counts['epochs']} epochs), "
        f"{counts['trainings_run']} run ({counts['epochs_run']} epochs), {reused} reused"
    )
