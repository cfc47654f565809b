"""Shared fixtures: the real command, run as a user would run it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).resolve().parent.parent

os.environ["NETRC"] = os.devnull  # tracker=auto must not find the account of whoever runs the tests
os.environ.pop("WANDB_API_KEY", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: two test processes share the cores


# Begun first, for one begun last would run alone: the Slurm tests, then the files that take longest (--durations=30).
_FIRST = (
    "tests/slurm",
    "tests/harness/test_report_build.py",
    "tests/test_scripts.py",
    "tests/harness/test_experiment.py",
    "tests/harness/test_faults.py",
    "tests/harness/test_simulated.py",
    "tests/backends/test_faults.py",
    "tests/harness/test_report_processes.py",
    "tests/harness/test_tracking_mlflow.py",
    "tests/harness/test_ohgw_example.py",
    "tests/test_readme.py",
)


class _ByFile(LoadScopeScheduling):
    """Hands out whole files, for their tests share fixtures; the Slurm tests, which share a cluster, as if one file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "tests/slurm" if file.startswith("tests/slurm/") else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        first = next((scope for scope in _FIRST if scope in self.workqueue), None)
        if first is not None:
            self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.fixture
def environment() -> dict[str, str]:
    """The user's environment, with the checkout importable from any directory and no tracker account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return env | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


@pytest.fixture
def harness(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``harness("scheduler=asha", ...)`` runs ``python -m harness`` in an empty folder, with a time limit."""

    def run(*arguments: str, module: str = "harness", timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def run_tracked(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m harness`` with a small net, tracker=wandb and no account in ``folder``; it must succeed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": str(ROOT), **variables}
    small = ["task.model=mlp", "backend.threads=1", "n_workers=1", "budget.epochs=6", "tracker=wandb"]
    keys = {word.split("=")[0] for word in words}
    command = [sys.executable, "-m", "harness", *(word for word in small if word.split("=")[0] not in keys), *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker failed" not in done.stdout + done.stderr
    return done


@pytest.fixture
def start_harness(tmp_path: Path, environment: dict[str, str]):
    """The same without waiting: returns the Popen object; killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file that may still be growing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]


@pytest.fixture
def browser(tmp_path: Path):
    """A headless Chromium, driven by selenium: Debian's packages chromium and chromium-driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path / 'chromium'}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()
