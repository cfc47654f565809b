"""A process that Slurm wants to go has its trials checkpoint first."""

import signal
import subprocess
import sys

from backends.context import checkpoint_files, reports_before
from tests.backends.conftest import wait_until
from tests.conftest import read_lines

LEAVING = """
import signal, sys
from harness.leaving import leaving_on
from harness.runner import run_alone
from harness.sweep import make_plan
words = ["scheduler=random", "ohgw=off", "task.model=mlp", "task.max_epochs=5000", "budget.epochs=5000", "n_workers=2",
         "backend.threads=1", "tracker=none"]
with leaving_on({signal.SIGUSR1: 20.0}):
    outcome = run_alone(make_plan(words).cells[0], words)
print("interrupted", outcome.interrupted)
"""


def test_trials_in_flight_checkpoint_and_nothing_that_was_reported_is_lost(tmp_path, environment):
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVING], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )

    def epochs(trial: int) -> list[int]:
        files = tmp_path.glob("results/default/*/events.jsonl")
        events = [event for file in files for event in read_lines(file)]
        return [event["result"]["epoch"] for event in events if event["e"] == "report" and event["trial"] == trial]

    try:
        wait_until(lambda: len(epochs(0)) > 3 and len(epochs(1)) > 3, 60)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "interrupted True" in output, output
    (trials,) = tmp_path.glob("results/default/*/trials")
    for trial in (0, 1):
        saved = reports_before(checkpoint_files(trials / str(trial))[-1].read_bytes())
        assert saved >= epochs(trial)[-1] > 3
