"""The code as it is now, kept for jobs that start later, and a check that the environment is still the same then."""

import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from backends.context import UserError
from harness.provenance import COMMIT_FILE, PACKAGES, ROOT, commit_and_diff

PARTS = ("harness", "backends", "conf", "slurm")
ITSELF = "ohgw-harness"


def copy_code(target: Path) -> None:
    """Copy the project's packages, YAML files and batch script to the new folder ``target``, with the commit and diff
    that ``provenance`` reports there. Raises OSError."""
    for part in PARTS:
        for file in sorted((ROOT / part).rglob("*")):
            copy = target / file.relative_to(ROOT)
            if file.is_file() and not file.name.startswith(".") and file.parent.name != "__pycache__":
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    commit, diff = commit_and_diff()
    (target / COMMIT_FILE).write_text(json.dumps({"commit": commit, "diff": diff}))


def environment() -> dict[str, str]:
    """Versions of Python and of every installed distribution that the harness needs, directly or not."""
    found: dict[str, str] = {}
    todo = [ITSELF, *PACKAGES]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution.version
        needed = [line for line in distribution.requires or [] if "extra ==" not in line]
        todo += [match[0] for line in needed if (match := re.match(r"[\w.-]+", line))]
    found.pop(ITSELF, None)  # its code is in the snapshot
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def check_environment(then: Mapping[str, str]) -> None:
    """UserError if a version of ``then`` (``environment()`` at the submission) is another one now."""
    now = environment()
    changed = [
        f"{name} {version} -> {now.get(name, 'not installed')}"
        for name, version in then.items()
        if now.get(name) != version
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the environment has changed since the submission: {', '.join(changed[:5])}{more}; submit the cells again"
        )
